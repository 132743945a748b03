"""Backward, accumulation, clipping and stepping over prepared models and optimizers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import Config
from ..errors import PrepareError
from ..interfaces.precision import Precision
from ..interfaces.strategy import Strategy
from .boundary import Boundaries
from .clipping import placing, redirect_torch, total_norm
from .deferred import Filling, Tape
from .gradients import ExplicitWindow
from .loader import PreparedLoader
from .model import ModelPart, model_part, prepare_model, rebind
from .optimizer import OptimizerPart, optimizer_part, prepare_optimizer
from .process import Process


class Training(Process):
    """The part of an `Accelerator` that takes losses to parameters."""

    config: Config
    precision: Precision
    strategies: Sequence[Strategy]

    def __init__(self) -> None:
        self._active: list[PreparedLoader] = []
        self._loaders: list[PreparedLoader] = []
        self._window = ExplicitWindow(self.config.gradient_accumulation_steps, self._active)
        self._models: list[ModelPart] = []
        self._optimizers: list[OptimizerPart] = []
        self._replaced: dict[int, nn.Parameter] = {}
        self._tapes: list[Tape] = []
        redirect_torch(self.strategies, lambda: [part.model for part in self._models])
        self._verified: dict[int, int] = {}
        self._closing = self._window.length == 1
        self._boundaries = Boundaries(
            self._active, self._loaders, self.device, self._window_open, self._reached(), self._window.length > 1
        )

    def _reached(self) -> Callable[[], None] | None:
        """What is to be called at each step boundary."""
        return None

    def _window_open(self) -> bool:
        """Whether gradients of a started accumulation window wait for their step."""
        return self._window.open or any(part.window.held for part in self._optimizers)

    def _abandon_windows(self) -> None:
        """Forget started windows: weights and data go on from elsewhere."""
        self._window.abandon()
        for part in self._optimizers:
            part.abandon()
        self._boundaries.forget()

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Prepare one model, in place; all ranks. Raises PrepareError if the strategy cannot train it right."""
        if model_part(model) is None:
            filling = Filling(model, self._tapes, self.world, functools.partial(self._load_waiting, model))
            part = prepare_model(model, self.strategies, self.precision, self.device, self._must_watch, filling)
            self._replaced.update(part.replaced)
            self._models.append(part)
            for owner in self._optimizers:
                rebind(owner.optimizer, part.replaced)
                self._check_optimizer(owner.optimizer)
        return model

    @contextlib.contextmanager
    def empty_init(self) -> Iterator[None]:
        """Make models that take no memory until `prepare` has divided them among the processes; all ranks.

        Parameters of modules made inside are on the meta device. `prepare` gives each the value that it would have
        had, bit for bit, on rank 0: initialisation runs again, one parameter after the other. Buffers are real. For
        weights from a folder, call `load_model` before or after `prepare`.
        """
        tape = Tape()
        self._tapes.append(tape)
        with tape:
            yield

    def _load_waiting(self, model: nn.Module) -> set[str]:
        """Load weights that were asked for while the model had no memory; returns the names of its parameters."""
        return set()

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Prepare one optimizer, in place, made before or after its model was prepared."""
        if optimizer_part(optimizer) is None:
            rebind(optimizer, self._replaced)
            part = OptimizerPart(
                optimizer,
                self.precision,
                self._window,
                self._before_step,
                self._after_step,
                self._dropped,
                self._on_any_process,
            )
            self._check_optimizer(optimizer)
            prepare_optimizer(optimizer, part)
            self._optimizers.append(part)
        return optimizer

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        for strategy in self.strategies:
            strategy.check_optimizer(optimizer)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches in a window."""
        return self.config.gradient_accumulation_steps

    @property
    def sync_gradients(self) -> bool:
        """Whether the micro-batch under way ends a window: gradients are exchanged and optimizers step.

        Holds from `accumulate` or `backward` until the next micro-batch begins.
        """
        return self._window.closing if self._window.inside else self._closing

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether an optimizer's last step was skipped, on all ranks, because gradients overflowed."""
        return any(part.skipped for part in self._optimizers)

    @contextlib.contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """One micro-batch of an accumulation window. Without it, each call of `optimizer.step()` counts as one."""
        if self._window.enter():
            for part in self._optimizers:
                part.open = False
        try:
            yield
        finally:
            self._window.leave()

    @contextlib.contextmanager
    def no_sync(self, *models: nn.Module) -> Iterator[None]:
        """Backward passes inside only add gradients up on each process; the next one outside exchanges them."""
        parts = [self._part(model, "no_sync") for model in models] or list(self._models)
        for part in parts:
            part.exchange_off += 1
        try:
            yield
        finally:
            for part in parts:
                part.exchange_off -= 1

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute the body in the run's precision, as a model's forward does."""
        with self.precision.forward():
            yield

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Add the gradients of a loss, and exchange them if this ends a window; all ranks.

        `loss` is the mean over this process's samples of the batch (or has any shape, with `gradient=` as for
        `Tensor.backward`). Raises PrepareError if it depends on nothing that trains.
        """
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise PrepareError(
                f"backward: the loss must be a tensor that requires grad, got {_describe(loss)}; it was computed under "
                "torch.no_grad(), from detached tensors, or from frozen parameters only"
            )
        if self._must_watch:
            self._require_prepared()
            self._settle_models("backward")
        if self.precision.scales_loss and any(part.unscaled for part in self._optimizers):
            raise PrepareError(
                "backward: gradients were already unscaled, by clip_grad_norm_ or unscale_gradients, and a scaled one "
                "would come on top; call every backward of a step before clipping"
            )
        factor = self._loss_factor()
        scaled = self.precision.scale(loss if factor == 1.0 else loss * factor)
        self._closing = self._closes()
        for part in self._models:
            part.check_filled()
        exchanges = [self._exchanges(part) for part in self._models]
        scaled = self._before_backward(scaled, exchanges)
        scaled.backward(**options)  # type: ignore[no-untyped-call]
        self._after_backward(exchanges)
        self._mark_gradients()

    def _before_backward(self, loss: Tensor, exchanges: Sequence[bool]) -> Tensor:
        for part, exchange in zip(self._models, exchanges, strict=True):
            for strategy in self.strategies:
                now = exchange and not self._exchanges_afterwards(strategy)
                loss = strategy.before_backward(part.model, loss, now)
        return loss

    def _after_backward(self, exchanges: Sequence[bool]) -> None:
        for part, exchange in zip(self._models, exchanges, strict=True):
            for strategy in reversed(self.strategies):
                later = self._exchanges_afterwards(strategy)
                strategy.after_backward(part.model, exchange and not later)
                if exchange and later:
                    strategy.exchange(part.model)
            part.arrivals.clear()

    def _exchanges_afterwards(self, strategy: Strategy) -> bool:
        """Whether another strategy splits the backward pass, so that this one must wait for the end of all parts."""
        return not strategy.splits_backward and any(other.splits_backward for other in self.strategies)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale gradients so that their norm over all processes is at most `max_norm`; returns the norm before.

        All ranks. In the middle of an accumulation window nothing is scaled, since the gradient is not whole yet.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        limit = max_norm if self._finish_gradients(parameters) else float("inf")
        norm = total_norm(parameters, norm_type, self.strategies)
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamp each element of the gradients to [-clip_value, clip_value]; not in the middle of a window."""
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if self._finish_gradients(parameters):
            nn.utils.clip_grad_value_(parameters, clip_value)

    def unscale_gradients(self, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> None:
        """Make gradients plain again where losses are scaled; `clip_grad_norm_` does this by itself."""
        if not self.precision.scales_loss:
            return
        chosen = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
        for part in self._optimizers if chosen is None else filter(None, map(optimizer_part, chosen)):
            if not part.unscaled and part.has_gradients():
                self.precision.unscale(part)
                part.unscaled = True

    @property
    def _must_watch(self) -> bool:
        """Whether gradients that arrive outside `backward` could be wrong."""
        return self.world.size > 1 or self._window.length > 1 or self.precision.scales_loss

    @property
    def _scattered(self) -> bool:
        """Whether processes hold different parameters."""
        return bool(placing(self.strategies))

    def _loss_factor(self) -> float:
        """Divides by the window's micro-batches, and weighs this process's share of an uneven batch."""
        weight = self._active[-1].weight if self._active else 1.0
        if self._window.length == 1:
            return weight
        if self._window.inside:
            return weight / self._window.planned
        return weight / max((part.planned for part in self._optimizers), default=1)

    def _require_prepared(self) -> None:
        """Raise PrepareError if nobody would exchange these gradients, or undo what is done to the loss."""
        if not self._models:
            raise PrepareError(
                "backward: no model was prepared, so no gradients would be exchanged; call prepare(model)"
            )
        if self._optimizers or (self._window.length == 1 and not self.precision.scales_loss):
            return
        raise PrepareError(
            f"backward: no optimizer was prepared, but gradient_accumulation_steps: {self._window.length} and "
            f"mixed_precision: {self.config.mixed_precision.name} change when and how it must step; "
            "call prepare(optimizer)"
        )

    def _closes(self) -> bool:
        """Whether the window ends with this micro-batch."""
        if self._window.length == 1:
            return True
        return self._window.closing if self._window.inside else any(part.closing for part in self._optimizers)

    def _exchanges(self, part: ModelPart) -> bool:
        """Whether the coming backward pass must exchange the gradients of this model."""
        if part.exchange_off:
            return False
        if self._window.length == 1:
            return True
        if self._window.inside:
            return self._window.closing
        owners = self._owners(part.owned)
        return any(owner.closing for owner in owners) if owners else True

    def _owners(self, parameters: set[int]) -> list[OptimizerPart]:
        """The optimizers that update some of the parameters with these ids."""
        return [o for o in self._optimizers if not parameters.isdisjoint(map(id, o.parameters()))]

    def _mark_gradients(self) -> None:
        """Remember that there may be gradients that no optimizer has used yet."""
        for part in self._optimizers:
            part.spent = False
            if self._window.inside and self._window.length > 1:
                part.open = True

    def _finish_gradients(self, parameters: list[Tensor]) -> bool:
        """Make the gradients of these parameters whole and plain; returns whether their window closes now."""
        owners = self._owners({id(parameter) for parameter in parameters})
        if self._window.length > 1 and not all(owner.closing for owner in owners):
            return False
        self._settle_models("clip_grad_norm_")
        self.unscale_gradients([owner.optimizer for owner in owners])
        return True

    def _settle_models(self, call: str) -> None:
        """Deal with gradients that came from a bare `loss.backward()`: right, or refused."""
        for part in self._models:
            if part.arrivals:
                self._refuse_bare_backward(call)
                for strategy in reversed(self.strategies):
                    strategy.settle(part.model)
                part.arrivals.clear()

    def _refuse_bare_backward(self, call: str) -> None:
        """Raise PrepareError if the loss of a bare `loss.backward()` should have been scaled."""
        if self._window.length > 1:
            reason = f"gradient_accumulation_steps: {self._window.length} divides the loss"
        elif self.precision.scales_loss:
            reason = f"mixed_precision: {self.config.mixed_precision.name} scales the loss"
        elif self.world.size > 1 and any(loader.uneven is not False for loader in self._active):
            reason = "the last batch may be shared unevenly, which weighs the loss (drop_last=True avoids it)"
        else:
            return
        raise PrepareError(
            f"{call}: gradients came from a bare loss.backward(), but {reason}; call accelerator.backward(loss)"
        )

    def _before_step(self, part: OptimizerPart) -> None:
        self._verify(part)
        if self._must_watch:
            self._settle_models("optimizer.step()")

    def _after_step(self, part: OptimizerPart) -> None:
        self._boundaries.stepped()
        for strategy in self.strategies:
            for model in self._models:
                strategy.after_step(model.model)
        if self.precision.scales_loss:
            self.precision.update([o for o in self._optimizers if not (o.spent or o.unscaled) and o.has_gradients()])

    def _dropped(self, part: OptimizerPart) -> None:
        for strategy in self.strategies:
            for model in self._models:
                strategy.forget_gradients(model.model, part.parameters())

    def _on_any_process(self, flag: Tensor, divided: bool) -> Tensor:
        """The largest value of a scalar on any process whose gradients are not this one's; they all call it."""
        if self.world.size > 1 and (divided or self._scattered):
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag

    def _verify(self, part: OptimizerPart) -> None:
        """Raise PrepareError if the optimizer steps parameters that nobody exchanges or converts."""
        count = sum(len(group["params"]) for group in part.param_groups)
        if self._verified.get(id(part)) == count:
            return
        owned = set[int]().union(*(model.owned for model in self._models))
        if stray := [parameter for parameter in part.parameters() if id(parameter) not in owned]:
            raise PrepareError(
                f"optimizer.step(): {len(stray)} of {count} parameters of this {type(part.optimizer).__name__} "
                f"(the first of shape {tuple(stray[0].shape)}) belong to no prepared model; pass their model to "
                "prepare() too"
            )
        self._verified[id(part)] = count

    def _part(self, model: nn.Module, call: str) -> ModelPart:
        part = model_part(model)
        if part is None:
            raise PrepareError(f"{call}: this {type(model).__name__} was not prepared; pass it to prepare() first")
        return part


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__

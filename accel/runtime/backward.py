"""From losses to gradients that are whole: windows of micro-batches, and the exchange among processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import Config
from ..errors import PrepareError
from ..interfaces.precision import Precision
from ..interfaces.strategy import Strategy
from .clipping import placing
from .data.share import weight
from .gradients import ExplicitWindow
from .lines import warn
from .loader import PreparedLoader
from .model import ModelPart, model_part
from .optimizer import OptimizerPart
from .penalties import check_divided
from .points import BACKWARD, come_to, meet
from .process import Process


def _shares(loader: PreparedLoader) -> list[float]:
    return [weight(loader.counts, place) for place in range(len(loader.counts))]


class Backward(Process):
    """The part of an `Accelerator` that takes losses to gradients."""

    config: Config
    precision: Precision
    strategies: Sequence[Strategy]

    def __init__(self) -> None:
        self._active: list[PreparedLoader] = []
        self._taken: list[int] = []
        """Batches that each of those had given when it was last asked which the loop has in hand."""
        self._window = ExplicitWindow(self.config.gradient_accumulation_steps, self._active)
        self._models: list[ModelPart] = []
        self._optimizers: list[OptimizerPart] = []
        self._closing = self._window.length == 1
        self._splits = any(strategy.splits_backward for strategy in self.strategies)

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
        check_divided(loss)
        if self._must_watch:
            self._require_prepared()
            self._settle_models("backward")
        if self.precision.scales_loss and any(part.unscaled for part in self._optimizers):
            raise PrepareError(
                "backward: gradients were already unscaled, by clip_grad_norm_ or unscale_gradients, and a scaled one "
                "would come on top; call every backward of a step before clipping"
            )
        self._closing = self._closes()
        exchanges = [self._exchanges(part) for part in self._models]
        if any(exchanges):
            meet(BACKWARD)
        else:
            come_to(BACKWARD, self.strategies)
        for strategy in self.strategies:
            strategy.complete_loss(loss)
        loader = self._current_loader()
        share = 1.0 if loader is None else loader.weight
        factor = self._loss_factor() * (1.0 if isinstance(loss, DTensor) else share)
        scaled = self.precision.scale(loss if factor == 1.0 else loss * factor)
        for part in self._models:
            part.check_filled()
        scaled = self._before_backward(scaled, exchanges)
        scaled.backward(**options)  # type: ignore[no-untyped-call]
        self._after_backward(exchanges)
        self._mark_gradients()

    def _current_loader(self) -> PreparedLoader | None:
        """The loader whose batch the loop has in hand: of those under way the last, so of `zip(a, b)` that is b.

        A warning tells where a's batch is divided otherwise: of which of them a loss is, nobody can know.
        """
        inner = self._active[-1] if self._active else None
        taken = [loader.taken for loader in self._active]
        in_step = len(taken) == len(self._taken) and all(now > was for now, was in zip(taken, self._taken, strict=True))
        self._taken = taken
        for outer in self._active[:-1] if in_step and self.is_main_process else ():
            if inner is not None and _shares(outer) != _shares(inner):
                warn(
                    f"two loaders are iterated in step, as by zip(), and the processes have {outer.counts} and "
                    f"{inner.counts} samples of their batches: losses are weighed and metrics counted by the latter; "
                    "make both with drop_last=True, or with as many samples in the last batch"
                )
        return inner

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
        return self._splits and not strategy.splits_backward

    @property
    def _must_watch(self) -> bool:
        """Whether gradients that arrive outside `backward` could be wrong."""
        return self.world.size > 1 or self._window.length > 1 or self.precision.scales_loss

    @property
    def _scattered(self) -> bool:
        """Whether processes hold different parameters."""
        return bool(placing(self.strategies))

    def _loss_factor(self) -> float:
        """Divides by the window's micro-batches."""
        if self._window.length == 1:
            return 1.0
        if self._window.inside:
            return 1.0 / self._window.planned
        return 1.0 / max((part.planned for part in self._optimizers), default=1)

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

    def _part(self, model: nn.Module, call: str) -> ModelPart:
        part = model_part(model)
        if part is None:
            raise PrepareError(f"{call}: this {type(model).__name__} was not prepared; pass it to prepare() first")
        return part


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__

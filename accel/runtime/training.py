"""Preparing models and optimizers, clipping gradients and stepping."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import PrepareError
from .backward import Backward
from .boundary import Boundaries
from .clipping import redirect_torch, total_norm
from .deferred import Filling, Tape
from .derivatives import watch_derivatives
from .loader import PreparedLoader
from .model import model_part, prepare_model, rebind
from .optimizer import OptimizerPart, Owner, optimizer_part, prepare_optimizer
from .points import meeting


class Training(Backward):
    """The part of an `Accelerator` that takes losses to parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._loaders: list[PreparedLoader] = []
        whole = any(strategy.steps_whole for strategy in self.strategies)
        self._owner = Owner(
            self.precision, self._before_step, self._after_step, self._dropped, self._on_any_process, whole
        )
        self._replaced: dict[int, nn.Parameter] = {}
        self._tapes: list[Tape] = []
        redirect_torch(self.strategies, lambda: [part.model for part in self._models])
        watch_derivatives(self.strategies, self._trained)
        self._verified: dict[int, int] = {}
        self._boundaries = Boundaries(
            self._active, self._loaders, self.device, self._window_open, self._reached(), self._window.length > 1
        )

    def _reached(self) -> Callable[[], None] | None:
        """What is to be called at each step boundary."""
        return None

    def _trained(self) -> set[int]:
        """Ids of the parameters of prepared models that train now."""
        return {id(p) for part in self._models for p in part.model.parameters() if p.requires_grad}

    def _window_open(self) -> bool:
        """Whether gradients of a started accumulation window wait for their step."""
        return self._window.open or any(part.window.held for part in self._optimizers)

    def _abandon_windows(self) -> None:
        """Forget started windows: weights and data go on from elsewhere."""
        self._window.abandon()
        for part in self._optimizers:
            part.abandon()
        self._boundaries.forget()

    @meeting
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
            part = OptimizerPart(optimizer, self._window, self._owner)
            self._check_optimizer(optimizer)
            prepare_optimizer(optimizer, part)
            self._optimizers.append(part)
        return optimizer

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        for strategy in self.strategies:
            strategy.check_optimizer(optimizer)

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether an optimizer's last step was skipped, on all ranks, because gradients overflowed."""
        return any(part.skipped for part in self._optimizers)

    @meeting
    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale gradients so that their norm over all processes is at most `max_norm`; returns the norm before.

        All ranks. In the middle of an accumulation window nothing is scaled, since the gradient is not whole yet.
        """
        parameters = self._current(parameters)
        if self._must_watch:
            self._end_passes(self._owners({id(parameter) for parameter in parameters}))
        limit = max_norm if self._finish_gradients(parameters) else float("inf")
        norm = total_norm(parameters, norm_type, self.strategies)
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    @meeting
    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clamp each element of the gradients to [-clip_value, clip_value]; not in the middle of a window."""
        parameters = self._current(parameters)
        if self._finish_gradients(parameters):
            nn.utils.clip_grad_value_(parameters, clip_value)

    def _current(self, parameters: Any) -> list[Tensor]:
        """The parameters that train now, of those given, which may be from before `prepare`."""
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        return [self._replaced.get(id(parameter), parameter) for parameter in given]

    def unscale_gradients(self, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> None:
        """Make gradients plain again where losses are scaled; `clip_grad_norm_` does this by itself."""
        if not self.precision.scales_loss:
            return
        chosen = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
        for part in self._optimizers if chosen is None else filter(None, map(optimizer_part, chosen)):
            if not part.unscaled and part.has_gradients():
                self.precision.unscale(part)
                part.unscaled = True

    def _finish_gradients(self, parameters: list[Tensor]) -> bool:
        """Make the gradients of these parameters whole and plain; returns whether their window closes now."""
        owners = self._owners({id(parameter) for parameter in parameters})
        if self._window.length > 1 and not all(owner.closing for owner in owners):
            return False
        self._settle_models("clip_grad_norm_")
        self.unscale_gradients([owner.optimizer for owner in owners])
        return True

    def _before_step(self, part: OptimizerPart) -> None:
        self._verify(part)
        if self._must_watch:
            self._end_passes([part])
            self._settle_models("optimizer.step()")

    def _end_passes(self, owners: Sequence[OptimizerPart]) -> None:
        """Raise PrepareError if other processes wait in a bare `loss.backward()` that this one never comes to."""
        used = {id(parameter) for owner in owners if owner.spent for parameter in owner.parameters()}
        for model in self._models:
            if not used.isdisjoint(model.owned):
                for strategy in self.strategies:
                    strategy.end_passes(model.model)

    def _after_step(self, part: OptimizerPart) -> None:
        self._boundaries.stepped()
        for strategy in self.strategies:
            for model in self._models:
                strategy.after_step(model.model)
        if self.precision.scales_loss:
            self.precision.update([o for o in self._optimizers if not (o.spent or o.unscaled) and o.has_gradients()])

    def _dropped(self, part: OptimizerPart) -> None:
        parameters = part.parameters()
        for strategy in self.strategies:
            for model in self._models:
                strategy.forget_gradients(model.model, parameters)

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
        if id(part) in self._verified:  # a group was added
            self._check_optimizer(part.optimizer)
        self._verified[id(part)] = count

"""A prepared optimizer: the user's own object, which steps once for each accumulation window.

`step` and `zero_grad` act on the micro-batch that closes a window and only count on the others, so that a loop
written without accumulation accumulates by the setting alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..errors import PrepareError
from ..interfaces.precision import Precision
from .adopt import Adopted, Part, adopt, own_class, part_of
from .elementwise import on_parts, on_whole
from .gradients import ExplicitWindow, Window
from .shards import accept_whole_optimizer_states


@dataclass(frozen=True)
class Owner:
    """What a prepared optimizer asks of the `Accelerator` that prepared it."""

    precision: Precision

    before_step: Callable[[OptimizerPart], None]
    """Called when gradients are about to be used."""

    after_step: Callable[[OptimizerPart], None]
    """Called when parameters have changed."""

    dropped: Callable[[OptimizerPart], None]
    """Called when gradients have been dropped."""

    on_any_process: Callable[[Tensor, bool], Tensor]
    """The largest value of a scalar on any process whose gradients are not this one's; they all call it.

    Its second argument says whether the optimizer's parameters are divided among processes.
    """

    whole: bool
    """Whether optimizers step whole parameters, where processes hold parts."""


class OptimizerPart(Part):
    """What accel knows of one prepared optimizer, and what a precision sees of it: see `accel.interfaces.Steppable`.

    `explicit` is the window that `Accelerator.accumulate` counts.
    """

    def __init__(self, optimizer: Optimizer, explicit: ExplicitWindow, owner: Owner) -> None:
        super().__init__()
        self.optimizer, self.explicit, self.owner = optimizer, explicit, owner
        self.window = Window(explicit.length, explicit.sources)
        self.calls = 0
        self.steps = 0
        self.skipped = False
        self.unscaled = False
        self.open = False
        self.spent = True
        self.wholes: dict[Tensor, nn.Parameter] = {}
        """What takes a divided parameter's place while the optimizer steps whole ones."""
        self._entries = 0
        self._until: Callable[[], object] | None = None
        self._hook: Any = None

    def hold(self, until: Callable[[], object]) -> None:
        """Keep the optimizer's state as it is until this returns: steps, and who asks for the state, wait for it."""
        self.release()
        self._until = until
        self._hook = self.optimizer.register_step_pre_hook(lambda *_: self.settle())

    def settle(self) -> None:
        """Wait until the state may change."""
        until = self._until
        if until is not None:
            until()
            self._until = None

    def release(self) -> None:
        """The same, and let torch forget its hook, which is not to be done while it calls hooks."""
        self.settle()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters and their settings, as torch keeps them."""
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        """Step the user's own optimizer, unconditionally."""
        self.release()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        inner = self.shadowed.get("step") or super(PreparedOptimizer, self.optimizer).step  # type: ignore[misc]
        if closure is not None:
            return inner(closure)
        with on_whole(self.optimizer, self.wholes) if self.owner.whole else on_parts(self.optimizer):
            return inner()

    def on_any_process(self, flag: Tensor) -> Tensor:
        """The largest value of a scalar on any process whose gradients are not this one's; they all call it."""
        return self.owner.on_any_process(flag, any(isinstance(parameter, DTensor) for parameter in self.parameters()))

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of all groups."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def has_gradients(self) -> bool:
        """Whether any parameter holds a gradient."""
        return any(parameter.grad is not None for parameter in self.parameters())

    @property
    def closing(self) -> bool:
        """Whether the next call of `step` ends a window."""
        if self.window.length == 1:
            return True
        if self._is_explicit:
            return self.explicit.closing
        return self.window.closes_with(self.window.held + 1)

    @property
    def planned(self) -> int:
        """Micro-batches in the window under way."""
        return self.explicit.planned if self._is_explicit else self.window.planned

    def step_if_closing(self, closure: Any) -> Any:
        """What `optimizer.step()` does."""
        if closure is not None and self.window.length > 1:
            raise PrepareError(
                "optimizer.step(closure): an optimizer that calls the model itself cannot accumulate gradients; "
                f"set gradient_accumulation_steps: 1, got {self.window.length}"
            )
        if closure is not None and self.owner.whole:
            raise PrepareError(
                "optimizer.step(closure): parameters are whole while the optimizer steps, and a closure would compute "
                "with parts; call it before, and then step() without it"
            )
        self.calls += 1
        if not self.closing:
            self._count()
            return None
        if closure is None:
            self.owner.before_step(self)
        stepped, result = self.owner.precision.step(self, self.unscaled, closure)
        self.skipped, self.unscaled, self.open, self.spent = not stepped, False, False, True
        self.steps += stepped
        self.window.restart()
        self._entries = self.explicit.entries
        self.owner.after_step(self)
        return result

    def abandon(self) -> None:
        """Forget the window under way, with its gradients."""
        self.window.restart()
        self.open, self.spent = False, True
        self.zero_grad_if_open(set_to_none=True)

    def zero_grad_if_open(self, set_to_none: bool) -> None:
        """What `optimizer.zero_grad()` does: nothing while a window is under way."""
        if not self.open:
            super(PreparedOptimizer, self.optimizer).zero_grad(set_to_none=set_to_none)  # type: ignore[misc]
            self.unscaled = False
            self.owner.dropped(self)

    def _count(self) -> None:
        self.open = True
        if not self._is_explicit:
            self.window.add()
        self._entries = self.explicit.entries

    @property
    def _is_explicit(self) -> bool:
        """Whether this micro-batch runs under `accumulate`, though the call of `step` may stand after it."""
        return self.explicit.inside or self._entries != self.explicit.entries


class PreparedOptimizer(Adopted):
    """Mixin of prepared optimizers."""

    def step(self, closure: Any = None) -> Any:
        part: OptimizerPart = self.__dict__["_accel"]
        return part.step_if_closing(closure)

    # A scheduler looks for this mark to know that somebody sets `_opt_called` when the optimizer steps.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        part: OptimizerPart = self.__dict__["_accel"]
        part.zero_grad_if_open(set_to_none)

    @property
    def state(self) -> Any:
        """What the optimizer keeps for each parameter; waits for a copy of it that is being made for a checkpoint."""
        part: OptimizerPart = self.__dict__["_accel"]
        part.settle()
        return self.__dict__["state"] if "state" in self.__dict__ else super().state  # type: ignore[misc]

    @state.setter
    def state(self, value: Any) -> None:
        own = getattr(own_class(self), "state", None)
        if isinstance(own, property):
            own.__set__(self, value)
        else:
            self.__dict__["state"] = value

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped because gradients overflowed."""
        part: OptimizerPart = self.__dict__["_accel"]
        return part.skipped


def prepare_optimizer(optimizer: Optimizer, part: OptimizerPart) -> Optimizer:
    """Prepare an optimizer in place, once."""
    accept_whole_optimizer_states(optimizer)
    return adopt(optimizer, PreparedOptimizer, part, "step", "zero_grad")


def optimizer_part(optimizer: Any) -> OptimizerPart | None:
    """What accel knows of this optimizer; None if it was never prepared."""
    part = part_of(optimizer)
    return part if isinstance(part, OptimizerPart) else None

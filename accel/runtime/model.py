"""A prepared model: the user's own object, whose forward runs in the run's precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PrepareError
from ..interfaces.precision import Precision
from ..interfaces.strategy import Strategy
from .adopt import Adopted, Part, adopt, part_of
from .deferred import Filling
from .gradients import Arrivals
from .handling import mind_divided_tensors
from .points import FORWARD, come_to
from .references import View, refuse_parameter, refuse_view, views_of_parameters
from .shards import Elsewhere, accept_whole_model_states, divide_state, whole_tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer


class ModelPart(Part):
    """What accel knows of one prepared model. `replaced` maps the id of a parameter before setup to the one after."""

    def __init__(self, model: nn.Module, strategies: Sequence[Strategy], precision: Precision) -> None:
        super().__init__()
        self.model, self.strategies, self.precision = model, strategies, precision
        self.replaced: dict[int, nn.Parameter] = {}
        self.owned: set[int] = set()
        self.arrivals = Arrivals()
        self.exchange_off = 0
        self.unfilled: set[str] = set()
        """Names of parameters that have no value yet."""
        self._depth = 0

    def setup(self, device: torch.device, watch: bool, filling: Filling) -> None:
        """Move, convert and spread the model, in place, and fill what has no memory yet; all ranks."""
        model = self.model
        if any(not tensor.is_meta and tensor.device != device for tensor in (*model.parameters(), *model.buffers())):
            model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # type: ignore[no-untyped-call]
        self.precision.convert(model)
        before = dict(model.named_parameters(remove_duplicate=False))
        hooked = [name for name, p in before.items() if p._backward_hooks or p._post_accumulate_grad_hooks]
        views = views_of_parameters(list(model.modules()))
        for strategy in self.strategies:
            if not strategy.takes_empty:
                self.unfilled |= filling.fill(device)
            strategy.setup(model)
        self.unfilled |= filling.fill(device)
        for strategy in self.strategies:
            strategy.check_model(model)
        accept_whole_model_states(model)
        mind_divided_tensors(model)
        after = dict(model.named_parameters(remove_duplicate=False))
        self._originals = list(before.values())  # alive, so that their ids stay theirs
        self.replaced = {id(old): after[name] for name, old in before.items()}
        self.owned = {id(parameter) for parameter in after.values()}
        self._refuse_old(before, views)
        self._refuse_hooks(hooked, before)
        if self.unfilled:
            model.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
                lambda module, keys: self.filled_but(keys.missing_keys)
            )
        if watch:
            self.arrivals.watch(model.parameters())

    def _refuse_old(self, before: Mapping[str, nn.Parameter], views: Iterable[View]) -> None:
        """Refuse what is left of the parameters that strategies have replaced."""
        for view in views:
            if self.replaced[id(view.parameter)] is not view.parameter:
                refuse_view(view)
        for name, parameter in before.items():
            if self.replaced[id(parameter)] is not parameter:
                refuse_parameter(parameter, name)

    def _refuse_hooks(self, names: Iterable[str], before: Mapping[str, nn.Parameter]) -> None:
        for name in names:
            if self.replaced[id(before[name])] is not before[name]:
                raise PrepareError(
                    f"prepare: parameter {name!r} has hooks for its gradient, but prepare() replaces the parameter; "
                    "register them after it, with the parameter that the model then has"
                )

    def filled_but(self, missing: Iterable[str]) -> None:
        """Weights were loaded, for all parameters but these."""
        self.unfilled.intersection_update(missing)

    def check_filled(self) -> None:
        """Raise PrepareError for parameters that have no value."""
        if self.unfilled:
            names = sorted(self.unfilled)
            raise PrepareError(
                f"prepare: {len(names)} parameters of this {type(self.model).__name__} have no value, the first is "
                f"{names[0]!r}: nothing was written to them when it was made, and no weights were loaded; initialise "
                "them under accelerator.empty_init(), or call accelerator.load_model(model, folder)"
            )

    def run(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward call: the outermost is announced to the strategies and its output converted."""
        if self._depth:
            return forward(*args, **kwargs)
        self.check_filled()
        self._depth += 1
        try:
            come_to(FORWARD, self.strategies)
            for strategy in self.strategies:
                strategy.before_forward(self.model)
            with self.precision.forward():
                output = forward(*args, **kwargs)
            return self.precision.output(output)
        finally:
            self._depth -= 1


class PreparedModel(Adopted):
    """Mixin of prepared models."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        part: ModelPart = self.__dict__["_accel"]
        inner = part.shadowed.get("forward") or super().forward  # type: ignore[misc]
        return part.run(inner, args, kwargs)


def prepare_model(
    model: nn.Module,
    strategies: Sequence[Strategy],
    precision: Precision,
    device: torch.device,
    watch: bool,
    filling: Filling,
) -> ModelPart:
    """Prepare a model in place, once; all ranks. `watch` is whether to notice bare `loss.backward()` calls."""
    part = ModelPart(model, strategies, precision)
    part.setup(device, watch, filling)
    adopt(model, PreparedModel, part, "forward")
    return part


def model_part(model: nn.Module) -> ModelPart | None:
    """What accel knows of this model; None if it was never prepared."""
    part = part_of(model)
    return part if isinstance(part, ModelPart) else None


def whole_state_dict(model: nn.Module) -> dict[str, Any]:
    """A copy of the model's state under the user's names: whole plain CPU tensors. All ranks call it together.

    What other processes hold, and this one nothing of, is on the meta device.
    """
    copies: dict[int, Tensor] = {}

    def whole(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in copies:
            full = whole_tensor(value).detach()
            copies[id(value)] = full if full.is_meta else full.to("cpu", copy=True)
        return copies[id(value)]

    return {name: whole(value) for name, value in model.state_dict(keep_vars=True).items()}


def rebind(optimizer: Optimizer, replaced: dict[int, nn.Parameter]) -> None:
    """Let an optimizer update the parameters that took the place of those it was made with, keeping its state."""
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(id(parameter), parameter) for parameter in group["params"]]
    for old in [parameter for parameter in optimizer.state if replaced.get(id(parameter), parameter) is not parameter]:
        kept, new = optimizer.state.pop(old), replaced[id(old)]
        if not isinstance(new, Elsewhere):
            optimizer.state[new] = divide_state(kept, new)

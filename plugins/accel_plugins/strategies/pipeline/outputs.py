"""Outputs that only the last stage has, and what the user's loop makes of them on the others.

A loss computed from such an output is absent too. What it has become on the last stage is told in
`accelerator.backward(loss)`: one number. From then on the loss is an ordinary number on every stage, and so is what
was made of it alone, such as a running sum.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from accel.errors import PrepareError
from accel.runtime.deferred.operations import written_to

from .absent import FRESH, Absent, compute
from .wire import Wire


class Awaited(Absent):
    """An output that the last stage has, or what was computed from one."""

    hint = (
        "Under strategies.pipeline.outputs: last, other stages know in training the loss alone, from "
        "accelerator.backward(loss) on; set outputs: all to have every output everywhere"
    )
    value: Tensor | None = None
    """What it is, if that is known by now."""

    _recipe: _Recipe | None = None
    _heirs: tuple[weakref.ref[Awaited], ...] = ()

    @property
    def missing(self) -> str:
        return f"{self.origin}, which is on the last stage"

    def tell(self, value: Tensor) -> None:
        """Let it have a value from now on, and what was made of it alone too."""
        heirs = [heir() for heir in self._heirs]
        self.value, self._recipe, self._heirs = value, None, ()
        for heir in heirs:
            found = heir._recipe.follow() if heir is not None and heir._recipe is not None else None
            if heir is not None and found is not None:
                heir.tell(found)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        known = _with_values((args, kwargs))
        if not _any_absent(known):
            return function(*known[0], **known[1])
        made = compute(function, args, kwargs, Awaited)
        if function.overloadpacket in FRESH:
            return cls._fresh(made)
        changed = [tensor for tensor in written_to(function, args, kwargs) if isinstance(tensor, Awaited)]
        for tensor in changed:
            before = tensor._step_aside()
            if tensor is args[0] and len(changed) == 1:
                tensor._inherit(function, (before, *args[1:]), kwargs)
        if isinstance(made, Awaited) and not changed:
            made._inherit(function, args, kwargs)
        return made

    @classmethod
    def _fresh(cls, value: Tensor) -> Awaited:
        """What has values, but into which torch's formulas may write those that are missing."""
        made = Awaited.made(torch.empty_like(value, device="meta"), value.device, "an output")
        made.value = value
        return made

    def _step_aside(self) -> Tensor:
        """What this was until now, as it will be changed in place."""
        value, recipe = self.value, self._recipe
        self.value = self._recipe = None
        if value is not None:
            return value
        before = Awaited.made(torch.empty_like(self, device="meta"), self._device, self.origin)
        if recipe is not None:
            before._inherit(recipe.function, recipe.args, recipe.kwargs)
        return before

    def _inherit(self, function: Any, args: Any, kwargs: Any) -> None:
        """Remember how this is made, if it is a number made of numbers: more than those would cost memory."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if all(tensor.numel() == 1 for tensor in given):
            self._recipe = _Recipe(function, args, kwargs, [tensor._version for tensor in given])
            for tensor in given:
                if isinstance(tensor, Awaited):
                    tensor._heirs = (*tensor._heirs, weakref.ref(self))

    def backward(self, *args: Any, **kwargs: Any) -> None:
        _let_gradient_be_absent(self)
        super().backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _known(self) -> Tensor:
        if self.value is None:
            raise PrepareError(f"pipeline: the value of {self.missing}, is not known here. {self.hint}")
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self._known(), spec)

    def __repr__(self) -> str:  # type: ignore[override]
        return super().__repr__() if self.value is None else repr(self.value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._known().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._known().__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def numpy(self, *, force: bool = False) -> Any:
        if self.requires_grad and not force:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self._known().numpy(force=force)

    def tolist(self) -> Any:
        return self._known().tolist()


class _Gradient(Awaited):
    """A gradient that nobody asks for: all that is made of it, and of tensors that are here besides, is absent too."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(function, args, kwargs or {}, cls, fresh=False)


def _let_gradient_be_absent(loss: Awaited) -> None:
    """Let the gradient have no values from the start: torch's formulas write into it what is made of outputs."""

    def stand_in(gradient: Tensor) -> Tensor:
        return _Gradient.made(torch.empty_like(gradient, device="meta"), loss.device, "a gradient")

    loss.register_hook(stand_in)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Recipe:
    """A number made of others that may be known later. `versions` tell whether they were changed since."""

    function: Any
    args: Any
    kwargs: Any
    versions: list[int]

    def follow(self) -> Tensor | None:
        """The number, if all that it takes is known and was not changed since."""
        given = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        args, kwargs = _with_values((self.args, self.kwargs))
        if _any_absent((args, kwargs)) or [tensor._version for tensor in given] != self.versions:
            return None
        with torch.no_grad():
            found: Tensor = self.function(*args, **kwargs)
        return found


def await_output(shape: Any, dtype: torch.dtype, device: torch.device, name: str) -> Awaited:
    """What stands in for an output of the model `name` on a stage that does not get it."""
    return Awaited.made(torch.empty(shape, dtype=dtype, device="meta"), device, f"the output of {name}")


def refuse_weights(loss: Tensor) -> None:
    """Raise PrepareError for a loss that the loop has computed from parameters, of which every stage has only some."""
    if isinstance(loss, Absent) and not isinstance(loss, Awaited):
        raise PrepareError(
            "backward: the loop computed this loss from parameters too, as for a penalty, and so from "
            f"{loss.missing}; leave a penalty to the optimizer, as its weight_decay, or use `zero3`"
        )


def tell_loss(loss: Tensor, wire: Wire) -> None:
    """Let all stages know what the loss is on the last one; all processes along the pipeline."""
    if isinstance(loss, Awaited):
        _check_unmixed(loss)
        _let_gradient_be_absent(loss)
    if loss.numel() != 1:
        return
    last = wire.group.size() - 1
    known = not isinstance(loss, Awaited)
    value = loss.detach().clone() if known else torch.empty(loss.shape, dtype=loss.dtype, device=wire.device)
    value = wire.share(last, value, waits=False)  # for which the last stage would keep all others waiting
    if isinstance(loss, Awaited):
        loss.tell(value)


def _with_values(given: Any) -> Any:
    return tree_map_only(Awaited, lambda tensor: tensor if tensor.value is None else tensor.value, given)


def _any_absent(given: Any) -> bool:
    return any(isinstance(leaf, Absent) for leaf in tree_leaves(given))


def _check_unmixed(loss: Tensor) -> None:
    """Raise PrepareError if a loss whose gradient has no values here would send it to a tensor that has them."""
    nodes, seen = [loss.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        for following, place in node.next_functions if node is not None else ():
            variable = getattr(following, "variable", None)
            if variable is not None or place in getattr(following, "known", ()):
                what = "parameters of its own" if variable is not None else "a number that the model returned"
                raise PrepareError(
                    f"backward: the loss is made of {what} besides outputs of the last stage, and their gradients are "
                    "not known here; set strategies.pipeline.outputs: all"
                )
            if following is not None and following not in seen and not hasattr(following, "known"):
                seen.add(following)
                nodes.append(following)

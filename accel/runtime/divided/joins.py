"""What operations do that bring several tensors together: which parts fit each other, and how the result is divided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .peers import Undividable
from .tensor import Call, Divided, Division, divide, moved, whole_shape


def common(call: Call) -> tuple[Division, int]:
    """The one division of all divided arguments, and its dim counted from the last."""
    division, places = together(call), {tensor.division.dim - tensor.dim() for tensor in call.divided()}
    if len(places) > 1:
        raise Undividable(f"{call.name} brings together tensors that are divided in different ways")
    return division, places.pop()


def together(call: Call) -> Division:
    """The division of all divided arguments, along whatever dim, which have the same parts."""
    divisions = [tensor.division for tensor in call.divided()]
    if len({(division.outer, division.length) for division in divisions}) > 1:
        raise Undividable(f"{call.name} brings together tensors that are divided in different ways")
    sources = frozenset[Any]().union(*(division.sources for division in divisions))
    return replace(divisions[0], sources=sources)


def sizes(call: Call) -> list[int]:
    """Those of the whole of the divided argument that has most dims."""
    return max((whole_shape(tensor) for tensor in call.divided()), key=len)


def fit(value: Any, division: Division, place: int, size: int | None = None) -> Any:
    """A whole tensor's part, if it has the divided dim; else it is used by all, and its gradient is of all."""
    if isinstance(value, Divided):
        return value
    if value.dim() < -place or value.shape[place] != size or size == 1:
        return division.peers.copy(value)
    return division.peers.take(value, value.dim() + place, division.outer)


def cat(call: Call) -> Any:
    """cat along a dim that is not divided."""
    items = [item for item in call.option(0, "tensors") if tuple(item.shape) != (0,)]  # as a cache begins
    dim = call.option(1, "dim", 0)
    division, place = common(call)
    shapes = [whole_shape(item) for item in items]
    along = dim - (items[0].dim() if dim >= 0 else 0) == place
    if (along and len(items) > 1) or len({len(shape) for shape in shapes}) > 1:
        raise Undividable("cat along what would be divided")
    size = sizes(call)[place]
    return divide(torch.cat([fit(item, division, place, size) for item in items], dim), division)


def stack(call: Call) -> Any:
    """Along a new dim."""
    items, (division, place) = call.option(0, "tensors"), common(call)
    if len({len(whole_shape(item)) for item in items}) > 1:
        raise Undividable("it meets stack in another form")
    dims, size = items[0].dim(), sizes(call)[place]
    dim, held = call.option(1, "dim", 0) % (dims + 1), dims + place
    parts = [fit(item, division, place, size) for item in items]
    return divide(torch.stack(parts, dim), moved(division, held + (dim <= held)))


def einsum(call: Call) -> Any:
    """Divided along one letter of all divided operands, which the result has too; spelled out, without an ellipsis."""
    equation, *given = call.args
    operands = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        raise Undividable("it meets einsum in another form")
    terms, _, output = equation.replace(" ", "").partition("->")
    named = list(zip(operands, terms.split(","), strict=True))
    letters = {term[tensor.division.dim] for tensor, term in named if isinstance(tensor, Divided)}
    letter, division = letters.pop(), together(call)
    if letters or letter not in output or any(term.count(letter) > 1 for _, term in named):
        raise Undividable("einsum sums over what would be divided, or brings it together")

    def part(tensor: Any, term: str) -> Any:
        if isinstance(tensor, Divided):
            return tensor
        peers, dim = division.peers, term.find(letter)
        shared = dim < 0 or tensor.shape[dim] == 1
        return peers.copy(tensor) if shared else peers.take(tensor, dim, division.outer)

    result = torch.einsum(equation, *(part(*each) for each in named))
    return divide(result, moved(division, output.index(letter)))

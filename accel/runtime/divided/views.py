"""What operations that move or cut dims do on divided tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .peers import Undividable
from .tensor import Call, divide, moved, whole_shape


def _integers(call: Call, start: int = 1) -> list[int]:
    """Sizes or dims that are given one by one, or as one list."""
    given = call.args[start:] or tuple(v for v in call.kwargs.values() if not isinstance(v, Tensor))
    values = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    if not all(isinstance(value, int) for value in values):
        raise Undividable(f"it meets {call.name}")
    return list(values)


def _reshaped(tensor: Any, sizes: Sequence[int], name: str) -> Any:
    """view or reshape of the whole to these sizes, as one of the part."""
    division, shape = tensor.division, whole_shape(tensor)
    sizes = list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(shape) // max(-math.prod(sizes), 1)
    before = math.prod(shape[: division.dim])
    if division.length is None:
        place, outer = _place(before * division.outer, sizes, division.peers.size)
        sizes[place] //= division.peers.parts
    else:
        place, outer = _unchanged(before, sizes, division.length), 1
        sizes[place] = tensor.shape[division.dim]
    return divide(getattr(tensor, name)(sizes), moved(division, place, outer))


def _place(before: int, sizes: Sequence[int], parts: int) -> tuple[int, int]:
    """The dim of the new sizes that is divided, and the pieces in it, where `before` rows precede the parts."""
    passed = 1
    if 0 in sizes:
        raise Undividable("it is empty")
    for dim, size in enumerate(sizes):
        if passed * size > before:
            outer = before // passed
            if before % passed == 0 and size % outer == 0 and size // outer % parts == 0:
                return dim, outer
            reason = f"it is cut into {size}, which do not divide by {parts}"
            raise Undividable(reason, indivisible=True, pieces=size if outer == 1 else 1)
        passed *= size
    raise Undividable("a view takes apart what would be divided")


def _unchanged(before: int, sizes: Sequence[int], length: int) -> int:
    """The dim of the new sizes that is the one of uneven parts, which a view must leave as it is."""
    for dim, size in enumerate(sizes):
        if size == length and math.prod(sizes[:dim]) == before:
            return dim
    raise Undividable(f"a view takes apart {length} positions, which do not divide evenly")


def _view(call: Call) -> Any:
    return _reshaped(call.first, _integers(call), call.name)


def _flatten(call: Call) -> Any:
    shape, start = whole_shape(call.first), call.option(1, "start_dim", 0) % call.first.dim()
    end = call.option(2, "end_dim", -1) % call.first.dim()
    sizes = [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]]
    return _reshaped(call.first, sizes, "reshape")


def _unflatten(call: Call) -> Any:
    shape, dim = whole_shape(call.first), call.option(1, "dim") % call.first.dim()
    sizes = list(call.option(2, "sizes"))
    if -1 in sizes:
        sizes[sizes.index(-1)] = shape[dim] // max(-math.prod(sizes), 1)
    return _reshaped(call.first, [*shape[:dim], *sizes, *shape[dim + 1 :]], "view")


def _squeeze(call: Call) -> Any:
    shape, dims = whole_shape(call.first), _integers(call)
    gone = {dim % len(shape) for dim in dims} if dims else set(range(len(shape)))
    sizes = [size for dim, size in enumerate(shape) if dim not in gone or size != 1]
    return _reshaped(call.first, sizes, "view")


def _unsqueeze(call: Call) -> Any:
    dim, division = call.option(1, "dim") % (call.first.dim() + 1), call.first.division
    return divide(call.run(), moved(division, division.dim + (dim <= division.dim)))


def _complex(call: Call) -> Any:
    """view_as_complex takes the last dim away, view_as_real adds one."""
    division = call.first.division
    if call.name == "view_as_complex" and division.dim == call.first.dim() - 1:
        raise Undividable("a view takes apart what would be divided")
    return divide(call.run(), division)


def _transpose(call: Call) -> Any:
    dims = [call.option(1, "dim0") % call.first.dim(), call.option(2, "dim1") % call.first.dim()]
    division = call.first.division
    place = dims[1 - dims.index(division.dim)] if division.dim in dims else division.dim
    return divide(call.run(), moved(division, place))


def _swap_last(call: Call) -> Any:
    """Tensor.T of a matrix, and mT."""
    last, division = call.first.dim() - 1, call.first.division
    if call.name != "mT" and last > 1:
        raise Undividable(f"it meets {call.name}")
    place = {last: last - 1, last - 1: last}.get(division.dim, division.dim)
    return divide(call.run(), moved(division, place))


def _permute(call: Call) -> Any:
    dims = [dim % call.first.dim() for dim in _integers(call)]
    return divide(call.run(), moved(call.first.division, dims.index(call.first.division.dim)))


def _expand(call: Call) -> Any:
    """expand to sizes of the whole."""
    division, sizes, shape = call.first.division, _integers(call), whole_shape(call.first)
    place = division.dim + len(sizes) - len(shape)
    if sizes[place] not in (-1, shape[division.dim]):
        raise Undividable("expand along what would be divided")
    sizes[place] = -1
    return divide(call.first.expand(sizes), moved(division, place))


def _repeat_interleave(call: Call) -> Any:
    repeats, dim = call.option(1, "repeats"), call.option(2, "dim")
    division = call.first.division
    if not isinstance(repeats, int) or dim is None or division.outer > 1 or division.length:
        raise Undividable("it meets repeat_interleave")
    return divide(call.run(), division)


def _split(call: Call) -> Any:
    """Into pieces of one size, or of given sizes."""
    sizes, dim = call.option(1, "split_size_or_sections", call.option(1, "split_size")), call.option(2, "dim", 0)
    whole = whole_shape(call.first)[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
    return _pieces(call, list(sizes), dim)


def _chunk(call: Call) -> Any:
    chunks, dim = call.option(1, "chunks"), call.option(2, "dim", 0)
    whole = whole_shape(call.first)[dim]
    size = -(-whole // chunks)
    return _pieces(call, [min(size, whole - start) for start in range(0, whole, size)], dim)


def _pieces(call: Call, sizes: list[int], dim: int) -> Any:
    """Cut along a dim; along the divided one, between the pieces of which each has its parts."""
    tensor, division = call.first, call.first.division
    dim %= tensor.dim()
    if dim != division.dim:
        return tuple(divide(piece, division) for piece in tensor.split(sizes, dim))
    whole = whole_shape(tensor)[dim]
    unit = whole // division.outer
    if division.length or any(size % unit for size in sizes):
        reason = f"it is cut in {len(sizes)} pieces, of each of which a process would need its part"
        raise Undividable(reason, pieces=len(sizes) if len(set(sizes)) == 1 else 1)
    parts = tensor.split([size // division.peers.parts for size in sizes], dim)
    return tuple(divide(p, moved(division, dim, size // unit)) for p, size in zip(parts, sizes, strict=True))


def _unbind(call: Call) -> Any:
    dim, division = call.option(1, "dim", 0) % call.first.dim(), call.first.division
    if dim == division.dim:
        raise Undividable("it is taken apart along what would be divided", pieces=whole_shape(call.first)[dim])
    return tuple(divide(piece, moved(division, division.dim - (dim < division.dim))) for piece in call.run())


def _select(call: Call) -> Any:
    dim, division = call.option(1, "dim") % call.first.dim(), call.first.division
    if dim == division.dim:
        raise Undividable("one of what would be divided is selected", pieces=whole_shape(call.first)[dim])
    return divide(call.run(), moved(division, division.dim - (dim < division.dim)))


def _narrow(call: Call) -> Any:
    if call.option(1, "dim") % call.first.dim() == call.first.division.dim:
        raise Undividable("a piece of what would be divided is taken")
    return divide(call.run(), call.first.division)


def _index(call: Call) -> Any:
    """tensor[...] with numbers, slices, None and an ellipsis, which leave the divided dim as it is."""
    tensor, division, index = call.first, call.first.division, call.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (item is None or item is ... or type(item) in (int, slice)) for item in items):
        raise Undividable("it is indexed by a tensor")
    used = sum(item is not None and item is not ... for item in items)
    fill = [slice(None)] * (tensor.dim() - used)
    at = items.index(...) if ... in items else len(items)
    items = [*items[:at], *fill, *items[at + 1 :]]
    dim, place = 0, 0
    for item in items:
        if item is not None:
            if dim == division.dim:
                _check_untouched(item, whole_shape(tensor)[dim])
                return divide(call.run(), moved(division, place))
            dim += 1
        place += not isinstance(item, int)
    raise Undividable("it is indexed")


def _check_untouched(item: Any, size: int) -> None:
    """Raise Undividable unless an index takes all of a dim."""
    if not isinstance(item, slice):
        raise Undividable("one of what would be divided is selected", pieces=size)
    if item.indices(size) != (0, size, 1):
        raise Undividable("a piece of what would be divided is taken")


RULES: dict[str, Callable[[Call], Any]] = {
    "view": _view,
    "reshape": _view,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "permute": _permute,
    **dict.fromkeys(("T", "mT", "t"), _swap_last),
    "expand": _expand,
    **dict.fromkeys(("view_as_complex", "view_as_real"), _complex),
    "repeat_interleave": _repeat_interleave,
    "split": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "select": _select,
    "narrow": _narrow,
    "__getitem__": _index,
}

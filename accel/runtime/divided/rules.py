"""What operations do on divided tensors part by part: shapes apart, which `views` knows.

A rule takes a `Call` and returns its result, or raises Undividable: then the operation gets whole tensors. Dims are
compared counting from the last, as broadcasting does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import views
from .joins import cat, common, einsum, fit, sizes, stack
from .losses import cross_entropy
from .peers import Undividable
from .products import by_columns, by_rows
from .tensor import Call, Divided, divide, moved, part_of, whole_of, whole_shape

Rule = Callable[[Call], Any]


def rule_of(name: str) -> Rule:
    """The rule for a function of this name."""
    if name.startswith(("is_", "new_")):
        return Call.run
    return RULES.get(name, _refuse)


def _refuse(call: Call) -> Any:
    raise Undividable(f"it meets {call.name}")


def _size(call: Call) -> Any:
    """The shape of the whole, or one size of it."""
    shape = torch.Size(whole_shape(call.first))
    dim = call.option(1, "dim")
    return shape if dim is None else shape[dim]


def _count(call: Call) -> int:
    return torch.Size(whole_shape(call.first)).numel()


def _length(call: Call) -> int:
    return whole_shape(call.first)[0]


def _pointwise(call: Call) -> Any:
    """Each element from those at its place, with broadcasting."""
    division, place = common(call)
    if "out" in call.kwargs or (call.name == "where" and len(call.args) < 3):
        raise Undividable(f"it meets {call.name} in another form")
    if call.name.endswith("_") and not call.name.endswith("__") and not isinstance(call.first, Divided):
        raise Undividable(f"{call.name} changes a whole tensor")
    size = sizes(call)[place]
    result = call.run(lambda value: fit(value, division, place, size))
    return divide(result, moved(division, result.dim() + place))


def _softmax(call: Call) -> Any:
    """Along a dim that is not divided."""
    dim = call.option(1, "dim")
    division = call.first.division
    if dim is None or dim % call.first.dim() == division.dim:
        raise Undividable(f"it meets {call.name} along what would be divided")
    return divide(call.run(), division)


def _reduction(call: Call) -> Any:
    """Over dims that are not divided."""
    first, dims = call.first, call.option(1, "dim")
    if not isinstance(dims, (int, list, tuple)) or dims in ((), []):
        raise Undividable(f"it meets {call.name} over all elements")
    gone = {dim % first.dim() for dim in ([dims] if isinstance(dims, int) else dims)}
    division = first.division
    if division.dim in gone:
        raise Undividable(f"it meets {call.name} over what would be divided")
    result = call.run()
    kept = result.dim() == first.dim()
    return divide(result, division if kept else moved(division, division.dim - sum(d < division.dim for d in gone)))


def _norm(call: Call) -> Any:
    """layer_norm and rms_norm: over the last dims, scaled by parameters that all processes share."""
    first, division = call.first, call.first.division
    if division.dim >= first.dim() - len(call.option(1, "normalized_shape")):
        raise Undividable(f"it meets {call.name} over what would be divided")
    return divide(call.run(lambda value: value if value is first else division.peers.copy(value)), division)


def _linear(call: Call) -> Any:
    """By a matrix that is divided, or by one that all processes hold."""
    by_divided = isinstance(call.option(1, "weight"), Divided)
    return _linear_by_divided(call) if by_divided else _of_first(_linear_by_whole)(call)


def _linear_by_whole(call: Call) -> Any:
    """By a matrix that all processes hold, along any dim but the last."""
    first, division = call.first, call.first.division
    if division.dim == first.dim() - 1:
        raise Undividable("it meets a product over what would be divided")
    return divide(call.run(lambda value: value if value is first else division.peers.copy(value)), division)


def _linear_by_divided(call: Call) -> Any:
    """By a matrix of which each process holds some rows, with the bias's, or some columns."""
    x, weight, bias = (call.option(place, name) for place, name in enumerate(("input", "weight", "bias")))
    division, peers = weight.division, weight.division.peers
    rows, held = division.dim == 0, isinstance(bias, Divided)
    if division.length or (bias is not None and held != rows) or (not rows and division.outer > 1):
        raise Undividable("it meets a product with a matrix that is divided in another way")
    if rows:
        return by_columns(x, part_of(weight), part_of(bias) if held else None, peers, division.outer)
    return by_rows(x, part_of(weight), bias, peers)


def _addmm(call: Call) -> Any:
    """A vector that all processes hold, and a product of rows by a matrix that all hold."""
    rows = call.option(1, "mat1")
    if not isinstance(rows, Divided) or len(call.divided()) > 1 or rows.division.dim or call.first.dim() > 1:
        raise Undividable("it meets addmm in another form")
    return divide(call.run(lambda value: value if value is rows else rows.division.peers.copy(value)), rows.division)


def _embedding(call: Call) -> Any:
    """Rows of a table that all processes hold, for indices along any dim."""
    indices, table = call.option(0, "input"), call.option(1, "weight")
    if isinstance(table, Divided) or call.option(3, "max_norm") or call.option(5, "scale_grad_by_freq"):
        raise Undividable("it meets an embedding that looks at all indices")
    division = indices.division
    return divide(call.run(lambda value: value if value is indices else division.peers.copy(value)), division)


def _random(call: Call) -> Any:
    """Random numbers for each element: each process draws for its own part."""
    with call.first.division.peers.own_numbers(call.first.device):
        return _pointwise(call)


def _own_gradient(call: Call) -> Any:
    gradient = call.run()
    return None if gradient is None else divide(gradient, call.first.division)


def _rows_by_whole(call: Call) -> Call:
    """Where rows of the left operand meet a right one that is divided otherwise, as in attention: that one whole."""
    left, right = call.args[:2]
    parts = isinstance(left, Divided) and isinstance(right, Divided)
    if not parts or left.division.dim != left.dim() - 2 or right.division.dim < right.dim() - 2:
        return call
    peers, sources = left.division.peers, right.division.sources
    peers.meet(left.division.sources | sources)
    if peers.divided_whole and sources:
        peers.divided_whole(sources, Undividable(f"all of it meets each row in {call.name}"))
    return Call(call.function, (left, whole_of(right), *call.args[2:]), call.kwargs)


def _matmul(call: Call) -> Any:
    """Batched: divided along a batch dim, or along rows of the left or columns of the right operand."""
    call = _rows_by_whole(call)
    division, place = common(call)
    left, right = call.args[:2]
    if place <= -3:
        size = sizes(call)[place]
        result = call.run(lambda value: fit(value, division, place, size))
    elif (place == -2 and not isinstance(right, Divided)) or (place == -1 and not isinstance(left, Divided)):
        result = call.run(lambda value: fit(value, division, place))
    else:
        raise Undividable(f"{call.name} sums over what would be divided")
    return divide(result, moved(division, result.dim() + place))


def _attention(call: Call) -> Any:
    """scaled_dot_product_attention on [.., heads, positions, width], divided along heads or samples."""
    query, key, value = (call.option(i, name) for i, name in enumerate(("query", "key", "value")))
    if isinstance(query, Divided) and query.division.dim == query.dim() - 2:
        return query.division.peers.attention(call)
    division, place = common(call)
    if place > -3:
        raise Undividable("attention sums over what would be divided")
    heads = {id(tensor): whole_shape(tensor)[place] for tensor in (query, key, value)}
    mask, size = call.option(3, "attn_mask"), whole_shape(query)[place]
    if size % division.peers.size or any(own % division.peers.size for own in heads.values()):
        raise Undividable(f"its heads do not divide by {division.peers.size}", indivisible=True)
    result = call.run(lambda t: fit(t, division, place, size if t is mask else heads[id(t)]))
    return divide(result, moved(division, result.dim() + place))


def _names(text: str) -> list[str]:
    return text.split()


_ARITHMETIC = "add sub mul div true_divide floor_divide pow remainder fmod rsub maximum minimum where lerp"
_UNARY = (
    "abs neg negative exp expm1 log log1p log2 sqrt rsqrt reciprocal square sin cos tan tanh sigmoid erf floor ceil "
    "round sign relu relu6 gelu silu mish elu selu celu leaky_relu softplus softsign hardswish hardtanh hardsigmoid "
    "logsigmoid tanhshrink clamp clip clamp_min clamp_max nan_to_num masked_fill "
    "threshold prelu isnan isinf isfinite logical_not bitwise_not addcmul addcdiv quick_gelu"
)
_COMPARISONS = "eq ne lt le gt ge logical_and logical_or isclose"
_DUNDERS = (
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __pow__ __rpow__ "
    "__neg__ __abs__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __invert__ __iadd__ __isub__ __imul__ "
    "__itruediv__ __idiv__"
)
_COPIES = (
    "to type type_as float double half bfloat16 int long bool cpu cuda contiguous clone detach data "
    "zeros_like ones_like empty_like full_like"
)
_FACTS = (
    "dtype device requires_grad is_leaf grad_fn ndim dim layout names itemsize element_size get_device output_nr "
    "_version retain_grad backward register_hook requires_grad_ _backward_hooks nbytes retains_grad __hash__ volatile"
)


def _of_first(rule: Rule) -> Rule:
    """A rule for calls whose first argument alone is divided."""

    def checked(call: Call) -> Any:
        if not isinstance(call.first, Divided) or len(call.divided()) > 1:
            raise Undividable(f"{call.name} brings together tensors that are divided in different ways")
        return rule(call)

    return checked


RULES: dict[str, Rule] = {
    **dict.fromkeys(_names(_ARITHMETIC) + _names(_UNARY) + _names(_COMPARISONS), _pointwise),
    **dict.fromkeys([name + "_" for name in _names(_ARITHMETIC) + _names(_UNARY)], _pointwise),
    **dict.fromkeys(_names(_DUNDERS) + _names(_COPIES), _pointwise),
    **dict.fromkeys(_names(_FACTS), Call.run),
    **dict.fromkeys(_names("dropout dropout_ alpha_dropout alpha_dropout_ rand_like randn_like"), _of_first(_random)),
    "grad": _own_gradient,
    "addmm": _addmm,
    "embedding": _of_first(_embedding),
    **dict.fromkeys(_names("softmax log_softmax cumsum"), _of_first(_softmax)),
    **dict.fromkeys(_names("sum mean var std amax amin logsumexp argmax"), _of_first(_reduction)),
    **dict.fromkeys(_names("layer_norm rms_norm"), _of_first(_norm)),
    **dict.fromkeys(_names("matmul bmm __matmul__"), _matmul),
    **dict.fromkeys(_names("cat concat concatenate"), cat),
    "stack": stack,
    "einsum": einsum,
    **dict.fromkeys(_names("shape size"), _size),
    **dict.fromkeys(_names("numel nelement"), _count),
    "__len__": _length,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "cross_entropy": cross_entropy,
    **{name: _of_first(rule) for name, rule in views.RULES.items()},
}

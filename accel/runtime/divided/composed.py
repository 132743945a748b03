"""torch functions that are written in Python, done again on divided tensors out of functions that have rules."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .peers import Undividable
from .tensor import Call, whole_of


def _multi_head_attention(call: Call) -> Any:
    """torch.nn.MultiheadAttention's, on [T, B, E], without the weights of attention."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    query = given["query"]
    if given["need_weights"]:
        raise Undividable("the weights of attention are asked for (need_weights=False leaves them out)")
    if query.dim() != 3 or given["add_zero_attn"] or any(given[n] is not None for n in ("bias_k", "static_k")):
        raise Undividable("it meets multi_head_attention_forward in a rare form")
    heads = given["num_heads"]
    q, k, v = (_heads(x, heads) for x in _projected(given))
    causal = given["is_causal"] and given["key_padding_mask"] is None
    mask = None if causal else _mask(given, query, heads)
    dropout = given["dropout_p"] if given["training"] else 0.0
    mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    mixed = mixed.permute(2, 0, 1, 3).flatten(2)  # [B, heads, T, width] -> [T, B, E]
    return F.linear(mixed, given["out_proj_weight"], given["out_proj_bias"]), None


def _projected(given: dict[str, Any]) -> list[Tensor]:
    """Query, key and value, each by its matrix."""
    if given["use_separate_proj_weight"]:
        weights = [given[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = given["in_proj_weight"].chunk(3)
    biases = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
    inputs = (given["query"], given["key"], given["value"])
    return [F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, biases, strict=True)]


def _heads(x: Tensor, heads: int) -> Tensor:
    """[T, B, E] -> [B, heads, T, width]."""
    result: Tensor = x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)  # type: ignore[no-untyped-call]
    return result


def _mask(given: dict[str, Any], query: Tensor, heads: int) -> Tensor | None:
    """The sum of both masks, to be added to scores [B, heads, T, S]."""
    padding, mask = (_to_add(whole_of(given[name]), query) for name in ("key_padding_mask", "attn_mask"))
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, heads))  # type: ignore[no-untyped-call]
    if padding is None:
        return mask
    padding = padding[:, None, None, :]
    return padding if mask is None else mask + padding


def _to_add(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return mask
    return query.new_zeros(mask.shape).masked_fill_(mask, -math.inf)


COMPOSED = {"multi_head_attention_forward": _multi_head_attention}

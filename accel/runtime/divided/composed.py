"""torch functions that are written in Python, done again on divided tensors out of functions that have rules."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .peers import Undividable
from .products import added_up, part_of_input
from .tensor import Call, Divided, Division, part_of, whole_of


def _multi_head_attention(call: Call) -> Any:
    """torch.nn.MultiheadAttention's, on [T, B, E]: of divided positions, or with weights that are divided by heads."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    query, by_heads = given["query"], isinstance(given["out_proj_weight"], Divided)
    if given["need_weights"] and not by_heads:
        raise Undividable("the weights of attention are asked for (need_weights=False leaves them out)")
    if query.dim() != 3 or given["add_zero_attn"] or any(given[n] is not None for n in ("bias_k", "static_k")):
        raise Undividable("it meets multi_head_attention_forward in a rare form")
    heads = given["num_heads"]
    q, k, v = (_heads(x, heads) for x in _projected(given))
    mixed, weights = (_weighted if given["need_weights"] else _mixed)(q, k, v, given)
    mixed = mixed.permute(2, 0, 1, 3).flatten(2)  # [B, heads, T, width] -> [T, B, E]
    if not by_heads:
        return F.linear(mixed, given["out_proj_weight"], given["out_proj_bias"]), weights
    return _out(mixed, query, given["out_proj_weight"], given["out_proj_bias"]), weights


def _mixed(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> tuple[Tensor, None]:
    """Values [B, heads, T, width] by attention, whose weights nobody asks for."""
    causal = given["is_causal"] and given["key_padding_mask"] is None
    mask = None if causal else _mask(given)
    return F.scaled_dot_product_attention(q, k, v, mask, _dropout(given), causal), None


def _weighted(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same, with the weights of attention: [B, T, S], or of each head, [B, heads, T, S]."""
    scores, mask = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), _mask(given)
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), _dropout(given))
    mixed = weights @ v
    if given["average_attn_weights"] and isinstance(weights, Divided):
        share = part_of(weights).sum(1)
        return mixed, weights.division.peers.add(share) / given["num_heads"]
    return mixed, weights


def _out(mixed: Tensor, query: Tensor, weight: Any, bias: Tensor | None) -> Any:
    """The last product, by some columns of its matrix on each process; positions stay divided as those of `query`."""
    like = query.division if isinstance(query, Divided) else Division(weight.division.peers, 0)
    with torch._C.DisableTorchFunctionSubclass():
        out = added_up(F.linear(part_of_input(mixed, like.peers), part_of(weight)), like.peers, like)
    return out if bias is None else out + bias.to(out.dtype)


def _dropout(given: dict[str, Any]) -> float:
    probability: float = given["dropout_p"] if given["training"] else 0.0
    return probability


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


def _mask(given: dict[str, Any]) -> Tensor | None:
    """The sum of both masks, to be added to scores [B, heads, T, S]."""
    query, heads = given["query"], given["num_heads"]
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

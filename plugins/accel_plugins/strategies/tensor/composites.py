"""Modules that hold the matrices of several layers themselves: torch's attention, and the experts of transformers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from accel.runtime.adopt import own_class
from accel.runtime.divided.products import added_up, input_for_parts
from accel.runtime.divided.tensor import Divided, Division, divide, whole_of

from .layer import Layer

_EXPERTS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
"""How transformers names the parameters of experts, [experts, ..] each."""

_ROUTED = ["hidden_states", "top_k_index", "top_k_weights"]
"""What its experts' forward takes: [tokens, width], and [tokens, k] twice."""


def is_attention(module: nn.Module) -> bool:
    """Whether a module is just torch's multi-head attention."""
    return own_class(module) is nn.MultiheadAttention


def is_experts(module: nn.Module) -> bool:
    """Whether a module is the experts of a layer as transformers 5 holds them: one tensor for all of them."""
    held = {name: value for name, value in module._parameters.items() if value is not None}
    if not held or not held.keys() <= set(_EXPERTS) or not isinstance(getattr(module, "num_experts", None), int):
        return False
    return [*inspect.signature(own_class(module).forward).parameters][1:] == _ROUTED


def why_whole(module: Any, size: int) -> str:
    """Why attention or experts cannot be divided among `size` processes; empty if they can."""
    if is_attention(module):
        if module.bias_k is not None or module.add_zero_attn:
            return "adds a key and a value of its own"
        return f"its {module.num_heads} heads do not divide by {size}" if module.num_heads % size else ""
    if any(value is not None and value.shape[0] != module.num_experts for value in module._parameters.values()):
        return "its parameters are not one for each expert"
    return f"its {module.num_experts} experts do not divide by {size}" if module.num_experts % size else ""


class Shown(Layer):
    """A module whose own forward finds divided tensors where parameters are divided: to its code, they are whole."""

    def __getattr__(self, name: str) -> Any:
        if name in self.divided_dims and self.inside():
            part = self.dealt(name)
            return part if part is None else divide(part, self._division(name))
        return super().__getattr__(name)

    def _division(self, name: str) -> Division:
        return Division(self._peers, self.divided_dims[name], self.pieces_of(name))


class Heads(Shown):
    """torch's attention, of which each process computes some heads: of query, key and value, some rows each."""

    divided_dims = dict.fromkeys(
        ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"), 0
    )

    def pieces_of(self, name: str) -> int:
        return 3 if name.startswith("in_proj") else 1


class HeadsOut(Shown):
    """The last matrix of torch's attention, which that multiplies by itself."""

    divided_dims = {"weight": 1}


class Experts(Layer):
    """Experts, of which each process has some and computes those of all tokens that are routed to them."""

    divided_dims = dict.fromkeys(_EXPERTS, 0)
    num_experts: int

    def __getattr__(self, name: str) -> Any:
        if name in self.divided_dims and self.inside():
            return self.own(name)
        return super().__getattr__(name)

    def compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        peers, count = self._peers, self.num_experts // self._peers.parts
        tokens, weights = input_for_parts(hidden_states, peers), peers.copy(whole_of(top_k_weights))
        expert = whole_of(top_k_index) - peers.index * count
        here = (expert >= 0) & (expert < count)
        weights = weights.masked_fill(~here, 0.0)
        if not here.any():  # parameters have a gradient on all processes, or on none
            here, expert = torch.ones_like(here), torch.zeros_like(expert)
        token, place = torch.where(here)
        with self._alone(count):
            found = super().compute(tokens[token], expert[token, place, None], weights[token, place, None])
        out = torch.zeros_like(tokens).index_add(0, token, found.to(tokens.dtype))
        return added_up(out, peers, hidden_states.division) if isinstance(hidden_states, Divided) else peers.add(out)

    @contextlib.contextmanager
    def _alone(self, count: int) -> Iterator[None]:
        """Inside, the module's own code knows of this process's experts only."""
        whole, self.num_experts = self.num_experts, count
        try:
            yield
        finally:
            self.num_experts = whole

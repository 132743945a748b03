"""What the ZeRO benchmarks train, and what the ZeRO paper says that it takes (Rajbhandari et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 4
"""Of a number in float32."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer, and of one process's batch of it."""

    width: int = 384
    layers: int = 8
    heads: int = 6
    vocabulary: int = 8192
    length: int = 128
    batch: int = 4


class Block(nn.Module):
    """[b, t, width] -> the same: attention, then a feed-forward layer, each behind a norm and beside a shortcut."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.inputs(self.attention_norm(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in inputs)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.feed_norm(x))))
        return out


class Transformer(nn.Module):
    """Tokens [b, t + 1] -> the loss of predicting each from those before it, a scalar."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1]) + self.places(torch.arange(tokens.shape[1] - 1, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def make_model(shape: Shape) -> Transformer:
    """The same weights on every process and for every contender."""
    torch.manual_seed(0)
    return Transformer(shape)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW: two numbers of state for each parameter."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def make_batch(shape: Shape, step: int, rank: int) -> Tensor:
    """Tokens [b, t + 1] that rise by small steps, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step * 1000 + rank)
    rises = torch.randint(1, 4, (shape.batch, shape.length + 1), generator=generator)
    return rises.cumsum(1) % min(shape.vocabulary, 64)


@dataclass(frozen=True)
class Formula:
    """Bytes that one process stores and sends in a step, from the paper's sections 5 and 7.

    `parameters` are those of the model, in float32 as are gradients and the two states of Adam. `shards` processes
    divide what the stage divides; `replicas` groups of them hold the same (hybrid sharding). `kept` of the
    parameters are gathered once a step by stage 3 too, since they are needed again as soon as backward begins.
    """

    stage: int
    parameters: int
    shards: int
    replicas: int = 1
    kept: int = 0

    @property
    def weights(self) -> float:
        """Stored parameters, in bytes."""
        return BYTES * self.parameters / (self.shards if self.stage >= 3 else 1)

    @property
    def gradients(self) -> float:
        """Stored gradients, in bytes."""
        return BYTES * self.parameters / (self.shards if self.stage >= 2 else 1)

    @property
    def states(self) -> float:
        """Stored optimizer state, in bytes."""
        return 2 * BYTES * self.parameters / (self.shards if self.stage >= 1 else 1)

    @property
    def stored(self) -> float:
        """Parameters, gradients and optimizer state, in bytes."""
        return self.weights + self.gradients + self.states

    @property
    def sent(self) -> float:
        """Bytes that one process sends in a step.

        Gathering or reduce-scattering n bytes over p processes costs each (p - 1) / p * n, and an all-reduce both.
        """
        passes = 2 * self.parameters + (self.parameters - self.kept if self.stage >= 3 else 0)
        among_shards = passes * (self.shards - 1) / self.shards
        among_replicas = 2 * self.parameters / self.shards * (self.replicas - 1) / self.replicas
        return BYTES * (among_shards + among_replicas)


def count(shape: Shape) -> int:
    """Parameters of the model, without making it."""
    with torch.device("meta"):
        return sum(math.prod(parameter.shape) for parameter in Transformer(shape).parameters())

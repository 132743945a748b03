"""Tiny models with data and a loss, each for one thing that a strategy can get wrong.

A loss is a mean over samples, so that one over the whole batch is the mean of those over its equal parts. Weights
and data are functions of the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

WIDTH, CLASSES = 8, 8
VOCABULARY, LENGTH, HEADS = 20, 6, 4

Sample = Mapping[str, Tensor]


class MLP(nn.Module):
    """[b, WIDTH] -> [b, CLASSES]"""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.hidden(x)))
        return out


class FrozenMLP(MLP):
    """An MLP whose first layer does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden.requires_grad_(False)


class TiedLM(nn.Module):
    """Tokens [b, LENGTH] -> logits [b, LENGTH, VOCABULARY]; one matrix is both embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens).cumsum(1) / LENGTH  # each position sees those before it
        out: Tensor = self.head(hidden + torch.tanh(self.mix(hidden)))
        return out


class Layer(nn.Module):
    """[b, t, 2 * WIDTH] -> the same: causal attention, then a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.feed_norm = nn.LayerNorm(2 * WIDTH), nn.LayerNorm(2 * WIDTH)
        self.inputs = nn.ModuleList(nn.Linear(2 * WIDTH, 2 * WIDTH, bias=False) for _ in range(3))
        self.output = nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.up, self.down = nn.Linear(2 * WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (layer(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in self.inputs)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.feed_norm(x))))
        return out


class Transformer(nn.Module):
    """Tokens [b, LENGTH] -> logits [b, LENGTH, VOCABULARY]; blocks that repeat, for strategies that look for them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(VOCABULARY, 2 * WIDTH), nn.Embedding(LENGTH, 2 * WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.norm(x))
        return out


class Branches(nn.Module):
    """An MLP with a branch for flagged samples, computed only where the batch has some, and one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = MLP()
        self.branch = nn.Linear(WIDTH, CLASSES)
        self.unused = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, flags: Tensor) -> Tensor:
        out: Tensor = self.trunk(x)
        if flags.any():
            out = out + self.branch(x) * flags[:, None]
        return out


class Heads(nn.Module):
    """[b, WIDTH] -> two outputs by name, and the hidden state [b, 2 * WIDTH] beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(WIDTH, 2 * WIDTH)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * WIDTH, CLASSES) for name in ("first", "second")})

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return {name: head(hidden) for name, head in self.heads.items()}, hidden


class CNN(nn.Module):
    """Images [b, 1, 6, 6] -> [b, CLASSES], with batch norm: its statistics are those of each process's batch."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.norm(self.convolution(images))).mean((2, 3)))
        return out


class Samples(Dataset[Sample]):
    """Samples by index, from one table per field."""

    def __init__(self, fields: Sample) -> None:
        self.fields = fields

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: int) -> Sample:
        return {name: values[index] for name, values in self.fields.items()}


@dataclass(frozen=True)
class Task:
    """A model to train: how to make it, its samples, and its mean loss over a batch of them."""

    name: str
    make: Callable[[], nn.Module]
    sample: Callable[[int, torch.Generator], dict[str, Tensor]]
    loss: Callable[[nn.Module, Sample], Tensor]

    def model(self, seed: int = 0) -> nn.Module:
        """The model with the weights of this seed; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()

    def data(self, length: int, seed: int = 0) -> Samples:
        """`length` samples; the first are the same for any length."""
        rows = [self.sample(1, torch.Generator().manual_seed(seed * 100_003 + index)) for index in range(length)]
        return Samples({name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def _vectors(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    x = torch.randn(n, WIDTH, generator=generator)
    return {"x": x, "y": torch.randint(CLASSES, (n,), generator=generator)}


def _flagged(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {**_vectors(n, generator), "flags": torch.rand(n, generator=generator) < 0.2}


def _tokens(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"tokens": torch.randint(VOCABULARY, (n, LENGTH + 1), generator=generator)}


def _images(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    images = torch.randn(n, 1, 6, 6, generator=generator)
    return {"images": images, "y": torch.randint(CLASSES, (n,), generator=generator)}


def _classify(model: nn.Module, batch: Sample) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def _classify_flagged(model: nn.Module, batch: Sample) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["flags"]), batch["y"])


def _classify_images(model: nn.Module, batch: Sample) -> Tensor:
    return F.cross_entropy(model(batch["images"]), batch["y"])


def _classify_twice(model: nn.Module, batch: Sample) -> Tensor:
    outputs, hidden = model(batch["x"])
    first, second = (F.cross_entropy(outputs[name], batch["y"]) for name in ("first", "second"))
    total: Tensor = first + 0.5 * second + 0.1 * hidden.square().mean()
    return total


def _predict(model: nn.Module, batch: Sample) -> Tensor:
    tokens = batch["tokens"]
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


TASKS = {
    task.name: task
    for task in (
        Task("mlp", MLP, _vectors, _classify),
        Task("frozen layers", FrozenMLP, _vectors, _classify),
        Task("tied weights", TiedLM, _tokens, _predict),
        Task("transformer", Transformer, _tokens, _predict),
        Task("unused parameters", Branches, _flagged, _classify_flagged),
        Task("several outputs", Heads, _vectors, _classify_twice),
        Task("batch norm", CNN, _images, _classify_images),
    )
}
"""By name. Batch norm is right on n processes, but not one process's result: its statistics are of smaller batches."""

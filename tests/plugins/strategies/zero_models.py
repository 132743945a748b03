"""Models, a training run and a counter of bytes that the tests of ZeRO share."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from accel import Accelerator

STAGES = ["zero1", "zero2", "zero3"]
VOCABULARY, WIDTH, LENGTH = 37, 16, 6


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class LM(nn.Module):
    """Tokens [b, t] -> logits [b, t, VOCABULARY]; computes the blocks named by `use`, all by default."""

    def __init__(self, tied=True, width=WIDTH, blocks=3):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(LENGTH, width) / 10)
        self.scale = nn.Parameter(torch.ones(()))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, use=None):
        x = self.embedding(tokens) * self.scale + self.position
        for index, block in enumerate(self.blocks):
            if use is None or index in use:
                x = block(x)
        return self.head(x)

    def score(self, tokens):
        return F.linear(self.embedding(tokens) * self.scale + self.position, self.head.weight)


def make(seed=0, model=LM, **options):
    torch.manual_seed(seed)
    return model(**options)


def tokens(step, size):
    return torch.randint(VOCABULARY, (size, LENGTH), generator=torch.Generator().manual_seed(step))


def loss_of(logits, x):
    return F.cross_entropy(logits.flatten(0, 1).float(), x.roll(-1, 1).flatten())


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)


def accelerator_for(stage, options=None, **settings):
    """An accelerator whose blocks are divided however small they are."""
    return Accelerator(device="cpu", strategies={stage: {"minimum_size": 0, **(options or {})}}, **settings)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_gradients(model, reference):
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(whole(mine.grad), theirs.grad, rtol=1e-6, atol=1e-7, msg=name)


def assert_same_weights(model, reference, rtol=1e-6):
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(mine), theirs, rtol=rtol, atol=1e-6, msg=name)


class Wire(TorchDispatchMode):
    """Counts collective calls and the bytes that each rank sends in them, by the name of the operation.

    `sends` is what one rank of n sends for a payload of one byte, in a ring or directly.
    """

    def __init__(self, size):
        super().__init__()
        self.calls, self.bytes = {}, {}
        part = (size - 1) / size
        self.sends = {
            "allreduce": 2 * part,
            "allgather": part,
            "alltoall": part,
            "broadcast": 1,
            "reduce_scatter": 2 * part,
            "send": 1,
            "recv": 0,
        }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = next(kind for kind in self.sends if kind in function.__name__.replace("_allgather", "allgather"))
            payload = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            tensors = args[0] if isinstance(args[0], list) else [payload]
            self.calls[name] = self.calls.get(name, 0) + 1
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.bytes[name] = self.bytes.get(name, 0) + size * self.sends[name]
        return function(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(self.bytes.values())

"""Models that the tests of pipeline share, each with data for one step and a loss, and a plain loop as reference."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from accel import Accelerator

VOCABULARY, WIDTH, LENGTH = 37, 16, 6


class Block(nn.Module):
    def __init__(self, width=WIDTH, heads=2, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, mask):
        b, t, d = x.shape
        q, k, v = self.qkv(self.first(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, t, d))
        return x + F.dropout(self.down(F.gelu(self.up(self.second(x)))), self.dropout, self.training)


class GPT(nn.Module):
    """Tokens [b, t] -> logits [b, t, VOCABULARY]; the head is the embedding."""

    def __init__(self, blocks=4, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        self.blocks = nn.ModuleList(Block(dropout=dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        t = tokens.shape[1]
        x = self.embedding(tokens)
        mask = torch.ones(t, t, device=tokens.device).type_as(x).tril().bool()  # also where x is on another stage
        x += self.position[:t]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class Skips(nn.Module):
    """[b, WIDTH] -> [b, 3]: the second half of the blocks gets what the first half returned, and the input."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(WIDTH, WIDTH)
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        h = start = torch.tanh(self.start(x))
        kept = []
        for block in self.down:
            h = torch.tanh(block(h))
            kept.append(h)
        for block in self.up:
            h = torch.tanh(block(torch.cat([h, kept.pop()], -1)))
        return self.head(h + start + x)


class Frozen(Skips):
    """Its first half does not learn, so that a stage sends nothing that gradients come back for."""

    def __init__(self):
        super().__init__()
        for module in (self.start, self.down):
            module.requires_grad_(False)


class Shared(nn.Module):
    """[b, WIDTH] -> [b, 3]: one block, four times."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.Linear(WIDTH, 3)

    def forward(self, x):
        for _ in range(4):
            x = x + self.block(x)
        return self.head(x)


class Choice(nn.Module):
    """[b, WIDTH] -> [b, 3]: leaves out a block, and takes another way at the end, where the data say so."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.extra, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            if index != 2 or (x[:, 0] > -10).all():
                x = torch.tanh(block(x))
        if x.abs().amax() > 0.5:
            x = x + self.extra(x)
        return self.head(x)


class CNN(nn.Module):
    """Images [b, 1, 8, 8] -> [b, 3], without blocks; and a second output, which no loss looks at."""

    def __init__(self, norm=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4) if norm else nn.GroupNorm(2, 4)
        self.head, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, images):
        x = self.norm(torch.tanh(self.first(images)))
        x = torch.tanh(self.second(x)).mean((2, 3))
        return self.head(x), self.other(x)


class Translator(nn.Module):
    """torch's own transformer, with samples along dim 1."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nested tensors, which samples along dim 1 rule out
            self.transformer = nn.Transformer(WIDTH, 2, 2, 2, 32, dropout=0.0)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source, target):
        mask = self.transformer.generate_square_subsequent_mask(target.shape[0])
        return self.head(self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask))


class Case(NamedTuple):
    make: Any
    batch: Any
    loss: Any
    options: dict[str, Any] = {}


def _tokens(step, size):
    return {"tokens": torch.randint(VOCABULARY, (size, LENGTH), generator=torch.Generator().manual_seed(step))}


def _vectors(step, size):
    return {"x": torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(step))}


def _images(step, size):
    return {"images": torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(step))}


def _sentences(step, size):
    generator = torch.Generator().manual_seed(step)
    source, target = (torch.randint(VOCABULARY, (t, size), generator=generator) for t in (5, 4))
    return {"source": source, "target": target}


def _next_token(logits, batch):
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["tokens"].roll(-1, 1).flatten())


def _class(logits, batch):
    logits = logits[0] if isinstance(logits, tuple) else logits
    first = next(iter(batch.values()))
    return F.cross_entropy(logits.float(), (first.flatten(1).sum(1) > 0).long())


def _translation(logits, batch):
    return F.cross_entropy(logits.flatten(0, 1), batch["target"].flatten())


VECTORS = {"example": {"x": f"float32[4, {WIDTH}]"}}
CASES = {
    "gpt": Case(GPT, _tokens, _next_token, {"example": {"tokens": "int64[4, 6] < 37"}}),
    "deep gpt": Case(lambda: GPT(8), _tokens, _next_token, {"example": {"tokens": "int64[4, 6] < 37"}}),
    "skips": Case(Skips, _vectors, _class, VECTORS),
    "frozen": Case(Frozen, _vectors, _class, VECTORS),
    "shared": Case(Shared, _vectors, _class, VECTORS),
    "choice": Case(Choice, _vectors, _class, VECTORS),
    "cnn": Case(CNN, _images, _class, {"example": {"images": "float32[4, 1, 8, 8]"}}),
    "transformer": Case(
        Translator, _sentences, _translation, {"example": {"source": "int64[5, 3] < 37", "target": "int64[4, 3] < 37"}}
    ),
}


def make(case):
    torch.manual_seed(0)
    return case.make()


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)


def loss_of(case, model, batch):
    output = model(**batch)
    return output.loss if case.loss is None else case.loss(output, batch)


class Trained(NamedTuple):
    losses: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def train_plainly(name, cases=None, steps=5, size=8):
    """What one process gives: losses, the gradients of the last step, the weights at the end."""
    case = (cases or CASES)[name]
    model = make(case)
    optimizer, losses = adamw(model), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(case, model, case.batch(step, size))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Trained(losses, gradients, copy.deepcopy(model.state_dict()))


def accelerator_for(case, options=None, others=None, **settings):
    strategies = {"pipeline": {**case.options, **(options or {})}, **(others or {})}
    return Accelerator(device="cpu", strategies=strategies, **settings)

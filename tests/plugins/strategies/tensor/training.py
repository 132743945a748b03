"""A tensor-parallel loop beside a plain one in the same process, which sees the whole batch."""

from __future__ import annotations

import contextlib

import torch

from accel import Accelerator
from accel.interfaces import Axis
from accel.runtime.shards import Elsewhere

from .models import loss_of

ROWS = 4


def adamw(model):
    """With an eps far above the rounding of a gradient: where that is zero but for rounding, so is the step."""
    return torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-4)


def make_of_seed(make, seed, *args):
    torch.manual_seed(seed)
    return make(*args)


def accelerator_for(n, strategies, **settings):
    return Accelerator(strategies=strategies, num_processes=n, device="cpu", **settings)


def deviations(make, args, n, strategies, accumulation=1, clip=None, precision="fp32", steps=5, rows=ROWS):
    """The largest difference of losses, gradients, norms and weights from plain torch's, relative to the largest
    element of each tensor, and what was said of each layer."""
    settings = {"gradient_accumulation_steps": accumulation, "mixed_precision": precision}
    accelerator = accelerator_for(n, strategies, **settings)
    data = accelerator.mesh.axis(Axis.DATA)
    model, reference = make_of_seed(make, accelerator.process_index, *args), make_of_seed(make, 0, *args)
    optimizer, expected = adamw(model), adamw(reference)
    model, optimizer = accelerator.prepare(model, optimizer)
    worst = {"loss": 0.0, "gradient": 0.0, "norm": 0.0, "weight": 0.0}

    def note(what, found, wanted, floor=0.0):
        scale = max(wanted.abs().max().item(), floor, 1e-30)
        worst[what] = max(worst[what], (found - wanted).abs().max().item() / scale)

    for step in range(steps):
        for micro in range(accumulation):
            seed = (step * accumulation + micro) * data.size
            loss = loss_of(model, seed + data.index, rows)
            accelerator.backward(loss)
            wanted = torch.stack([plain_loss(reference, seed + i, precision, rows) for i in range(data.size)])
            (wanted.mean() / accumulation).backward()
            note("loss", loss.detach(), wanted[data.index].detach())
            if micro < accumulation - 1:
                optimizer.step(), optimizer.zero_grad()
        if step == 0:
            largest = max(p.grad.abs().max().item() for p in reference.parameters() if p.grad is not None)
            for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
                if isinstance(p, Elsewhere):
                    continue
                assert (p.grad is None) == (q.grad is None), name
                if q.grad is not None:
                    note("gradient", p.grad.full_tensor(), q.grad, largest * (1e-3 if precision == "fp32" else 1))
        if clip:
            norm = accelerator.clip_grad_norm_(model.parameters(), clip)
            note("norm", norm, torch.nn.utils.clip_grad_norm_(reference.parameters(), clip))
        optimizer.step(), optimizer.zero_grad(), expected.step(), expected.zero_grad()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        if not isinstance(p, Elsewhere):
            note("weight", p.full_tensor().detach(), q.detach(), 1e-2)
    tensor = next(s for s in accelerator.strategies if s.axis is Axis.TENSOR)
    return worst, tensor.describe(model)


def plain_loss(model, seed, precision, rows):
    narrow = precision != "fp32"
    with torch.autocast("cpu", torch.bfloat16) if narrow else contextlib.nullcontext():
        return loss_of(model, seed, rows)

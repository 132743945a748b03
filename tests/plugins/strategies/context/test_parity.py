"""Losses, gradients, norms and weights of plain torch on one process, in float64: nothing is multiplied or left out."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from accel import Accelerator
from accel.interfaces import Axis
from accel.testing import run

from .models import GPT, Classifier, ManualAttention, OneHead, Recurrent, Seq2Seq, hugging_face, loss_of, tokens

RING = {"context": {"size": 2, "attention": "ring"}}
CASES = {
    "heads": (GPT, {"context": {"size": 2}}),
    "ring": (GPT, RING),
    "a head that does not divide": (functools.partial(GPT, OneHead), {"context": {"size": 2}}),
    "spelled out": (functools.partial(GPT, ManualAttention), {"context": {"size": 2}}),
    "padding": (Classifier, {"context": {"size": 2}}),
    "padding in a ring": (Classifier, RING),
    "torch's transformer": (Seq2Seq, {"context": {"size": 2}}),
    "torch's transformer in a ring": (Seq2Seq, RING),
    "whole sequences": (Recurrent, {"context": {"size": 2}}),
    "recomputed": (functools.partial(GPT, reentrant=False), {"context": {"size": 2}}),
    "recomputed by reentry": (functools.partial(GPT, reentrant=True), RING),
}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(found, wanted, floor=1e-3):
    return ((whole(found) - wanted).abs().max() / wanted.abs().max().clamp_min(floor)).item()


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make().double()


def deviation(make, strategies, n, accumulation=1, bare=False, steps=2):
    """The largest difference to plain torch, relative to the largest element of each tensor."""
    accelerator = Accelerator(
        strategies=strategies, num_processes=n, device="cpu", gradient_accumulation_steps=accumulation
    )
    data = accelerator.mesh.axis(Axis.DATA)
    model, plain = seeded(make, accelerator.process_index), seeded(make)
    optimizer, expected = (torch.optim.SGD(m.parameters(), 0.1, 0.9) for m in (model, plain))
    model, optimizer = accelerator.prepare(model, optimizer)
    worst = 0.0
    for step in range(steps):
        for micro in range(accumulation):
            seeds = [(step * accumulation + micro) * data.size + i for i in range(data.size)]
            wanted = [loss_of(plain, seed) for seed in seeds]
            (sum(wanted) / data.size / accumulation).backward()
            with accelerator.accumulate(model):
                loss = loss_of(model, seeds[data.index])
                loss.backward() if bare else accelerator.backward(loss)
                worst = max(worst, difference(loss.detach(), wanted[data.index].detach()))
                if accelerator.sync_gradients:
                    clip = torch.nn.utils.clip_grad_norm_ if bare else accelerator.clip_grad_norm_
                    norms = clip(model.parameters(), 0.5), torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                    worst = max([worst, difference(*norms), *differences(model, plain, lambda p: p.grad)])
                optimizer.step()
                optimizer.zero_grad()
        expected.step()
        expected.zero_grad()
    return max([worst, *differences(model, plain, torch.Tensor.detach)])


def differences(model, plain, of):
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return [difference(of(p), of(q)) for p, q in pairs if of(q) is not None]


def all_cases():
    return {name: deviation(*case, 2) for name, case in CASES.items()}


def test_on_two_processes():
    for found in run(2, all_cases):
        assert max(found.values()) < 1e-12, found


def test_bare_backward_and_torchs_own_clipping():
    assert max(run(2, deviation, GPT, {"context": {"size": 2}}, 2, 1, True)) < 1e-12


@pytest.mark.parametrize("attention", ["ulysses", "ring"])
def test_on_four_processes(attention):
    assert max(run(4, deviation, GPT, {"context": {"size": 4, "attention": attention}}, 4)) < 1e-12


@pytest.mark.parametrize(("data", "limit"), [("ddp", 1e-12), ("zero3", 1e-6)])
def test_beside_a_data_axis(data, limit):
    """ZeRO exchanges gradients in float32."""
    strategies = {"context": {"size": 2}, data: {"minimum_size": 100} if data == "zero3" else {}}
    assert max(run(4, deviation, GPT, strategies, 4, 2)) < limit


def hugging_face_models():
    """In one call, since each worker has to import transformers."""
    strategies = {"context": {"size": 2}}
    found = {kind: deviation(functools.partial(hugging_face, kind), strategies, 2) for kind in ("Llama", "T5")}
    return found, [generates(length) for length in (8, 5)]


def generates(length):
    """Whether greedy writing after a prompt, with a cache, is that of the whole model."""
    accelerator = Accelerator(strategies={"context": {"size": 2}}, num_processes=2, device="cpu")
    torch.manual_seed(0)
    model = hugging_face("Llama").eval()
    prompt = tokens(0, 2, length).clamp(min=1)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(prompt, **options)
    return torch.equal(accelerator.prepare(model).generate(prompt, **options), expected)


def test_hugging_face_models():
    pytest.importorskip("transformers")
    for found, written in run(2, hugging_face_models, timeout=110):
        assert max(found.values()) < 1e-6, found  # they compute norms and rotations in float32
        assert all(written)


def narrow(precision, attention):
    """Loss and gradients in half precision beside those of torch's autocast."""
    strategies = {"context": {"size": 2, "attention": attention}}
    accelerator = Accelerator(strategies=strategies, num_processes=2, device="cpu", mixed_precision=precision)
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    loss = loss_of(model, 0)
    accelerator.backward(loss)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = loss_of(plain, 0)
    wanted.backward()
    return abs(loss.item() - wanted.item()) / wanted.item(), max(differences(model, plain, lambda p: p.grad))


@pytest.mark.parametrize("attention", ["ulysses", "ring"])
def test_bf16(attention):
    """One unit of bf16 in the loss; gradients are sums of values rounded to it."""
    for loss, gradient in run(2, narrow, "bf16", attention):
        assert loss < 2**-7 and gradient < 2**-5, (loss, gradient)

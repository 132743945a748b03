"""What context parallelism promises besides parity: memory, bytes, random numbers, whole calls and refusals."""

from __future__ import annotations

import copy
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from accel import Accelerator
from accel.errors import ConfigError, PrepareError
from accel.runtime.divided.tensor import part_of
from accel.testing import run

from .models import GPT, HEADS, LENGTH, VOCABULARY, WIDTH, Classifier, DroppingHead, Recurrent, loss_of, tokens

TWO = {"context": {"size": 2}}


def prepared(make, strategies=None, n=2):
    accelerator = Accelerator(strategies=strategies or TWO, num_processes=n, device="cpu")
    torch.manual_seed(0)
    model = make()
    plain = copy.deepcopy(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    return accelerator, model, optimizer, plain


def sees_the_users_model():
    accelerator, model, _, plain = prepared(GPT)
    shapes = []
    model.blocks[0].up.register_forward_hook(lambda _, args, out: shapes.extend([tuple(args[0].shape), out.shape[1]]))
    parts = []
    model.blocks[1].register_forward_hook(lambda _, args, out: parts.append(part_of(out).nbytes))
    logits = model(tokens(0))
    kept = copy.deepcopy(model)
    return {
        "shapes": shapes == [(2, LENGTH, WIDTH), LENGTH],
        "part": parts == [2 * LENGTH // 2 * WIDTH * 4],
        "plain": type(logits) is torch.Tensor and type(model).__name__ == "GPT" and isinstance(model, GPT),
        "copied": torch.allclose(kept(tokens(0)), plain(tokens(0)), atol=1e-6),
        "described": accelerator.describe(model),
    }


def test_the_model_sees_whole_shapes_and_holds_parts():
    for found in run(2, sees_the_users_model):
        assert "divided along dim 1 over 2" in str(found.pop("described"))
        assert all(found.values()), found


def describes():
    made = [prepared(make) for make in (Classifier, Recurrent)]
    return [str(accelerator.describe(model)) for accelerator, model, *_ in made]


def test_says_what_needs_whole_sequences():
    classifier, recurrent = run(2, describes)[0]
    assert "one of what would be divided is selected" in classifier
    assert "lstm" in recurrent


def calls_without_gradients():
    """One token at a time, as text is written, and lengths that do not divide."""
    _, model, _, plain = prepared(GPT)
    model.eval()
    with torch.no_grad():
        return [torch.allclose(model(x), plain(x), atol=1e-6) for x in (tokens(0, 2, n) for n in (4, 5, 7, 16))]


def test_calls_whose_sequences_do_not_divide_are_whole():
    assert all(map(all, run(2, calls_without_gradients)))


def gradients_beside_the_forward():
    """A term on the weights themselves, of an input that trains, and through a second model."""
    accelerator, first, _, plain = prepared(functools.partial(Embedded, 0))
    second = copy.deepcopy(plain)
    plain_second = copy.deepcopy(plain)
    accelerator.prepare(second)
    x, y = (torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in "xy")

    def loss(one, two, inputs):
        return two(one(inputs)).square().mean() + sum(p.square().sum() for p in one.parameters())

    accelerator.backward(loss(first, second, x))
    loss(plain, plain_second, y).backward()
    pairs = [(x, y), *zip(first.parameters(), plain.parameters(), strict=True)]
    pairs += zip(second.parameters(), plain_second.parameters(), strict=True)
    return max(((p.grad - q.grad).abs().max() / q.grad.abs().max()).item() for p, q in pairs)


class Embedded(nn.Module):
    """[B, T, WIDTH] -> the same."""

    def __init__(self, dropout):
        super().__init__()
        self.q, self.o, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return self.dropout(self.o(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)))


def test_gradients_of_what_all_compute_are_not_counted_twice():
    assert max(run(2, gradients_beside_the_forward)) < 1e-5


def dropped():
    """The positions that a dropout left, and whether recomputing in backward leaves the same."""
    torch.manual_seed(0)
    accelerator, model, _, _ = prepared(functools.partial(Embedded, 0.5))
    torch.manual_seed(accelerator.process_index)
    kept = model(torch.randn(2, LENGTH, WIDTH)).ne(0)
    results = []
    for reentrant in (None, False):
        torch.manual_seed(1)
        accelerator, model, _, _ = prepared(functools.partial(GPT, dropout=0.5, reentrant=reentrant))
        loss = loss_of(model, 0)
        accelerator.backward(loss)
        results.append([loss.item(), model.blocks[0].up.weight.grad.norm().item()])
    return kept, results


def test_dropout_differs_from_part_to_part_and_is_recomputed_alike():
    (kept, results), (other, others) = run(2, dropped)
    assert torch.equal(kept, other)
    left, right = kept.chunk(2, 1)
    assert 0.3 < (left == right).float().mean() < 0.7
    assert results[0] == pytest.approx(results[1], rel=1e-6) and results == others


def peak_and_bytes(n, attention, length, layers):
    """Peak bytes of live tensors in forward and backward, and bytes sent, of one process."""
    sys.path.insert(0, str(Path(__file__).parents[4] / "benchmarks"))
    from parallel_context import Shape, measured

    return measured(Shape(width=64, layers=layers, heads=4, vocabulary=16, length=length, batch=1), n, attention)


@pytest.mark.parametrize("attention", ["ulysses", "ring"])
def test_memory_and_bytes(attention):
    """Activations are divided; what is sent is what the formula says."""
    [one] = run(1, peak_and_bytes, 1, attention, 2048, 2)
    for found in run(2, peak_and_bytes, 2, attention, 2048, 2):
        assert found["peak"] < 0.62 * one["peak"]
        assert found["sent"] == pytest.approx(found["formula"], rel=0.02)


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.layer(x).mean()


class InPlace(GPT):
    def forward(self, tokens):
        x = self.embedding(tokens)
        x[:, 0] = 0
        return self.head(x)


def refused(make, options, call=None):
    try:
        _, model, _, _ = prepared(make, {"context": {"size": 2, **options}})
        if call:
            model(call())
    except (PrepareError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Picture, {}, "no input of this Picture with a dim of positions.*strategies.context.dims"),
        (GPT, {"dims": {"ids": 1}}, "strategies.context.dims.ids: 1 is no dim of an input .* tokens int64"),
        (
            functools.partial(GPT, DroppingHead),
            {"attention": "ulysses"},
            "ulysses divides heads .* use ring",
        ),
        (InPlace, {}, "__setitem__: cannot change a tensor in place that is divided over the context axis"),
        (GPT, {"example": {"tokens": f"int64[2, {LENGTH + 2}] < {VOCABULARY}"}}, "found no inputs on which GPT runs"),
    ],
)
def test_refused_at_prepare(make, options, message):
    [found, _] = run(2, refused, make, options)
    assert found.startswith("PrepareError")
    assert re.search(message, found), found


def test_refused_in_training():
    for make, length, message in [
        (GPT, LENGTH - 1, "tokens has 15 positions; pad them to a multiple of 2"),
        (functools.partial(GPT, DroppingHead), LENGTH, "this attention drops attention weights, which a ring cannot"),
    ]:
        [found, _] = run(2, refused, make, {}, functools.partial(tokens, 0, 2, length))
        assert message in found


def beside(strategies):
    try:
        prepared(GPT, strategies, 4)
    except PrepareError as error:
        return str(error)
    return "nothing"


def compiled():
    _, model, _, _ = prepared(GPT)
    model(tokens(0))
    model.blocks[0].compile(backend="eager")
    with pytest.raises(PrepareError, match=r"'blocks.0' is compiled.* out, here and beside strategies\.context"):
        model(tokens(0))


def test_refused_if_compiled():
    run(2, compiled)


def test_refused_beside_tensor():
    found = run(4, beside, {"context": {"size": 2}, "tensor": {"size": 2}})
    assert all("is not whole on each process; leave out `tensor` and `pipeline`" in message for message in found)

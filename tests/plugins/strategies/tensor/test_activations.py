"""Sequences and logits that stay divided: bytes, memory, random numbers, losses, and what else is done with them."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from accel.errors import PrepareError
from accel.runtime.collectives import gather_object
from accel.runtime.divided.tensor import Divided, part_of
from accel.testing import run

from . import models
from .models import LAYERS, LENGTH, VOCABULARY, WIDTH
from .test_tensor import Sent, prepared
from .training import make_of_seed

ROWS = 4


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the elements that are kept for backward, each memory once; parameters apart."""

    def __init__(self, model):
        self.parameters = {part_address(p) for p in model.parameters()}
        self.elements = {}
        super().__init__(self.keep, lambda tensor: tensor)

    def keep(self, tensor):
        with torch._C.DisableTorchFunctionSubclass():  # of a divided tensor, the part
            storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.elements[storage.data_ptr()] = storage.nbytes() // 4, tensor
        return tensor

    def total(self):
        return sum(count for count, _ in self.elements.values())


def part_address(parameter):
    return parameter.to_local().untyped_storage().data_ptr()


def cost(**options):
    """What a step of a GPT keeps and sends; elements, the least that its collectives could do with."""
    accelerator, model = prepared(models.GPT, **options)
    saved = Saved(model)
    with saved:
        accelerator.backward(models.loss_of(model, 0))
    with Sent() as sent:
        accelerator.backward(models.loss_of(model, 0))
    return saved.total(), sent.least(2)


def sequences():
    kept, sent = cost()
    kept_divided, sent_divided = cost(sequence_parallel=True)
    activations, norms = ROWS * LENGTH * WIDTH, 2 * LAYERS + 1
    of_norms = norms * (activations + 2 * ROWS * LENGTH)  # input, mean and deviation
    shared = WIDTH * (2 * norms + 2 * LAYERS)  # norms, and biases of rows: gradients are added up
    return {
        "kept": kept - kept_divided == of_norms // 2,
        "sent": sent_divided - sent == shared + LENGTH * WIDTH // 2,  # the gradient of the positions is put together
        "drops": drops(),
    }


class Drops(models.GPT):
    """Dropout between the layers, and what it left."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens):
        self.left = self.dropout(self.blocks[0](self.embedding(tokens)))
        return self.head(self.norm(self.left))


def drops():
    """Each process drops other elements of its positions, as many as it should; numbers that all draw stay alike."""
    accelerator, model = prepared(Drops, sequence_parallel=True)
    model(models.tokens(0, 64))
    zeros = part_of(model.left).eq(0)
    others = gather_object((zeros.tolist(), torch.get_rng_state().tolist()), accelerator.mesh.axis("tensor").group)
    return (
        zeros.shape == (64, LENGTH // 2, WIDTH)
        and abs(zeros.float().mean().item() - 0.5) < 0.02
        and others[0][0] != others[1][0]
        and others[0][1] == others[1][1]
    )


def test_divided_sequences_keep_half_and_send_as_much():
    for found in run(2, sequences):
        assert all(found.values()), found


def losses():
    """Only numbers of positions are sent for a loss; whatever else is done with logits is right too."""
    accelerator, model = prepared(models.GPT, loss_parallel=True)
    reference, x = make_of_seed(models.GPT, 0), models.tokens(0)
    with Sent() as sent:
        loss = models.loss_of(model, 0)
        forward, sent.elements = sent.elements, []
        loss.backward()
    activations, positions = ROWS * LENGTH * WIDTH, ROWS * (LENGTH - 1)
    logits, expected = model(x), reference(x)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(logits.log_softmax(-1).exp().sum(-1), torch.ones(ROWS, LENGTH))
    close(accelerator.gather(logits), expected.detach())
    assert torch.equal(logits.argmax(-1), expected.argmax(-1)) and logits.tolist() == logits.detach().tolist()
    with pytest.raises(IndexError, match=f"Target {VOCABULARY} is out of bounds"):
        F.cross_entropy(logits.flatten(0, 1), torch.full((ROWS * LENGTH,), VOCABULARY))
    return {
        "divided": isinstance(logits, Divided) and logits.shape == expected.shape,
        "forward": forward == [activations] * 5 + [positions, 2 * positions],
        "backward": sent.elements == [activations] * 5,
    }


class Looks(nn.Module):
    """Attention whose weights are returned, with other widths of keys and values, and masks."""

    def __init__(self, average=True):
        super().__init__()
        self.embedding, self.other = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, 24)
        self.attention = nn.MultiheadAttention(WIDTH, 4, kdim=24, vdim=24, batch_first=True)
        self.itself, self.average = nn.MultiheadAttention(WIDTH, 4), average

    def forward(self, tokens):
        x, other = self.embedding(tokens), self.other(tokens)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        y, weights = self.attention(x, other, other, key_padding_mask=tokens == 0, average_attn_weights=self.average)
        z, _ = self.itself(y, x, x + y, attn_mask=mask[: len(tokens), : len(tokens)], need_weights=False)
        return z, weights


class Rare(Looks):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, kdim=24, vdim=24, batch_first=True, add_bias_kv=True)


def attentions():
    """Outputs and gradients are compared at prepare; here on another batch, and in evaluation."""
    found = []
    for make, options in [(Looks, {}), (lambda: Looks(False), {"sequence_parallel": True}), (Rare, {})]:
        accelerator, model = prepared(make, **options)
        reference = make_of_seed(make, 0)
        for mode in (True, False):
            got, wanted = (m.train(mode)(models.tokens(3)) for m in (model, reference))
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        sum(one.square().sum() for one in got).backward(), sum(one.square().sum() for one in wanted).backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5, msg=name)
        halves = {name: p.numel() // p.to_local().numel() for name, p in model.named_parameters()}
        found.append((accelerator.strategies[0].describe(model), halves))
    return found


def test_attention_of_torch_by_heads():
    for (said, halves), _, (rare, _) in run(2, attentions):
        assert said["attention"] == "heads over 2 (derived: 4 heads, feeds attention.out_proj)"
        assert rare["attention"] == "replicated (adds a key and a value of its own)"
        assert halves["attention.k_proj_weight"] == halves["itself.in_proj_weight"] == 2
        assert halves["itself.out_proj.weight"] == halves["itself.in_proj_bias"] == 2


def test_losses_of_divided_logits_send_numbers_of_positions():
    for found in run(2, losses):
        assert all(found.values()), found


def refusals():
    said = []
    for make, options in [
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {"sequence_parallel": True}),
        (models.FunctionalHead, {"loss_parallel": True}),
    ]:
        with pytest.raises(PrepareError) as caught:
            prepared(make, **options)
        said.append(str(caught.value))
    return said


def test_activations_that_cannot_be_divided_are_refused():
    for sequence, loss in run(2, refusals):
        assert sequence.startswith("strategies.tensor.sequence_parallel: no sequence of this Sequential was divided")
        assert loss.startswith("strategies.tensor.loss_parallel: no head of this FunctionalHead is divided by a voc")

"""What loops and models do with divided parameters themselves: right, or refused by name, against one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from accel.errors import PrepareError
from accel.testing import run

from .zero_models import STAGES, accelerator_for, adamw, assert_same_weights, make, whole

stages = pytest.mark.parametrize("stage", STAGES)


class Net(nn.Module):
    """[b, 8] -> [b, 3]"""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 8) / 3)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in "ab")
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x @ self.first
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def pair(accelerator, model=Net):
    """A prepared model and its optimizer, and the same for one process."""
    mine, theirs = make(accelerator.process_index, model), make(0, model)
    return (*accelerator.prepare(mine, adamw(mine)), theirs, adamw(theirs))


def vectors(length=8):
    return torch.randn(length, 8, generator=torch.Generator().manual_seed(0))


# -- penalties over parameters -----------------------------------------------------------------------------------------


def squares(model):
    return 0.1 * sum(p.square().sum() for p in model.parameters()) + 0.1 * model.head.weight.norm()


def through_whole(model):
    return 0.1 * whole(model.first).square().sum()


def penalties(stage, penalty, length):
    """`length` samples in global batches of 16: the last may be uneven, with nothing at all for the last process."""
    accelerator = accelerator_for(stage)
    model, mine, reference, theirs = pair(accelerator)
    loader = accelerator.prepare(DataLoader(vectors(length), batch_size=16 // accelerator.num_processes))
    for _ in range(2):
        for x in loader:
            accelerator.backward(model(x).square().mean() + penalty(model))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            mine.step(), mine.zero_grad()
        for x in vectors(length).split(16):
            (reference(x).square().mean() + penalty(reference)).backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            theirs.step(), theirs.zero_grad()
    assert_same_weights(model, reference)


@stages
@pytest.mark.parametrize(("penalty", "length"), [(squares, 32), (squares, 33), (through_whole, 27)])
def test_penalties_over_divided_parameters(stage, penalty, length):
    run(2, penalties, stage, penalty, length)


def test_penalties_where_a_process_has_no_part_of_a_parameter():
    run(4, penalties, "zero3", squares, 33)


def mixed_twice():
    accelerator = accelerator_for("zero3")
    model = accelerator.prepare(Net())
    loss = model(vectors()).square().mean()
    with pytest.raises(PrepareError, match="used both together with divided parameters and without"):
        accelerator.backward(loss * 2 + (loss + model.first.square().sum()))


def test_a_loss_used_with_and_without_divided_parameters_is_refused():
    run(2, mixed_twice)


# -- changes from outside ----------------------------------------------------------------------------------------------


def assign(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    model.first.data = torch.ones(8, 8)


def from_vector(model):
    size = sum(parameter.numel() for parameter in model.parameters())
    nn.utils.vector_to_parameters(torch.linspace(-1, 1, size), model.parameters())


@torch.no_grad()
def in_place(model):
    for parameter in model.parameters():
        parameter.mul_(1.5), parameter.data.clamp_(-0.2, 0.2)


def changes(stage):
    """Changed after a forward that no backward follows, whose gathered parameters are still there."""
    accelerator = accelerator_for(stage)
    model, mine, reference, theirs = pair(accelerator)
    x, part = vectors(), vectors().chunk(accelerator.num_processes)[accelerator.process_index]
    for change in (assign, from_vector, in_place):
        model(x)
        change(model), change(reference)
        torch.testing.assert_close(model(x), reference(x), msg=change.__name__)
        accelerator.backward(model(part).square().mean()), reference(x).square().mean().backward()
        mine.step(), mine.zero_grad(), theirs.step(), theirs.zero_grad()
    assert_same_weights(model, reference)
    with pytest.raises(PrepareError, match=r"\.data: expected a tensor of shape \(8, 8\) and torch\.float32"):
        model.first.data = torch.ones(4)
    with pytest.raises(PrepareError, match=r"uniform_: random numbers for a divided tensor of shape \(8, 8\)"):
        nn.init.xavier_uniform_(model.first)
    with pytest.raises(PrepareError, match=r"'head\.weight' became torch\.float64 after prepare"):
        model.double()(x.double())


@stages
def test_parameters_may_be_changed_from_outside(stage):
    run(2, changes, stage)


class Clamps(nn.Linear):
    """Changes its own weight, as a model does that sets itself up with the first batch; `data` is past autograd."""

    def __init__(self, data):
        super().__init__(8, 8)
        self.data = data

    def forward(self, x):
        with torch.no_grad():
            (self.weight.data if self.data else self.weight).clamp_(-0.01, 0.01)
        return super().forward(x)


def clamps(stage):
    for data in (True, False):
        model = accelerator_for(stage).prepare(nn.Sequential(Clamps(data), Clamps(data)))
        with pytest.raises(PrepareError, match=r"forward: parameter '[01]\.weight' was changed in place"):
            model(vectors()).sum().backward()


@stages
def test_what_forward_changes_in_gathered_parameters_is_refused(stage):
    run(2, clamps, stage)


# -- what refers to parameters from before -----------------------------------------------------------------------------


class Keeps(Net):
    """Keeps a parameter in a list, and a view of it, which is made again in forward where `again`."""

    def __init__(self, again=False, use=None):
        super().__init__()
        self.again, self.use, self.kept = again, use, [self.first]
        self.views = {"turned": self.first.detach().t()}

    def forward(self, x):
        if self.again:
            self.views["turned"] = self.first.t()
            return super().forward(x) + (x @ self.views["turned"]).sum()
        return super().forward(x) + self.use(self).sum()


USES = {
    "parameter 'first' was replaced by prepare": lambda model: model.kept[0],
    r"Keeps\.views\['turned'\] was made from a parameter before prepare": lambda model: model.views["turned"],
}


def references(stage, empty):
    accelerator = accelerator_for(stage)
    for message, use in USES.items():
        with accelerator.empty_init() if empty else torch.enable_grad():
            model = Keeps(use=use)
        with pytest.raises(PrepareError, match=message):
            accelerator.prepare(model)(vectors())
    accelerator.prepare(Keeps(again=True))(vectors())
    model, reference = make(accelerator.process_index, Net), make(0, Net)
    kept, mine, theirs = list(model.parameters()), adamw(model), adamw(reference)
    accelerator.prepare(model, mine)
    accelerator.backward(model(vectors()).sum()), reference(vectors()).sum().backward()
    found = accelerator.clip_grad_norm_(kept, 0.1)
    torch.testing.assert_close(found, nn.utils.clip_grad_norm_(reference.parameters(), 0.1))
    mine.step(), theirs.step()
    assert_same_weights(model, reference)
    for use in (
        lambda: nn.utils.clip_grad_norm_(kept, 0.1),
        lambda: sum(p.norm() for p in kept),
        lambda: setattr(kept[0], "grad", None),
        lambda: kept[0].requires_grad_(False),
    ):
        with pytest.raises(PrepareError, match=r"ask the model for it anew, as model\.get_parameter\('first'\)"):
            use()


@stages
@pytest.mark.parametrize("empty", [False, True], ids=["", "empty"])
def test_references_from_before_prepare_are_right_or_refused(stage, empty):
    run(2, references, stage, empty)


# -- models that do unusual things -------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Each sample goes to the expert that the gate prefers: others have no gradient, other ones on each process."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 6)
        self.experts = nn.ModuleDict({str(index): nn.Linear(8, 8) for index in range(6)})

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            rows = (chosen == index).nonzero()[:, 0]
            out = out.index_add(0, rows, self.experts[str(index)](x[rows]) * weight[rows, None])
        return x + out


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(8, 8, 2, batch_first=True) for _ in "ab")
        self.bags = nn.ModuleList(nn.EmbeddingBag(9, 8) for _ in "ab")

    def forward(self, x):
        found = sum(bag(x.argsort()) for bag in self.bags)
        x = x[:, None] * found[:, None]
        for layer in self.layers:
            x = layer(x)[0]
        return x


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        norms = (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal, nn.utils.spectral_norm)
        self.layers = nn.ModuleList(nn.Sequential(norm(nn.Linear(8, 8)), nn.BatchNorm1d(8)) for norm in norms)
        self.none = nn.ParameterDict({"0": torch.empty(8, 0), "1": torch.randn(8)})

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x * self.none["1"] + self.none["0"].sum()


class Called(nn.Module):
    """Blocks used twice and out of order, by a method of its own class's `__call__`; outputs nested, with None."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(8, 8)
        self.layers = nn.ModuleList([shared, nn.Linear(8, 8), nn.Linear(8, 8), shared])
        self.layers[2].weight = self.layers[1].weight
        self.head = nn.Linear(8, 8)

    def __call__(self, x):
        return super().__call__(x=x)["found"][0]

    def forward(self, *, x):
        first, second = x, x.flip(1)
        for layer in (*reversed(self.layers), *self.layers):
            first, second = torch.tanh(layer(first)), torch.tanh(layer(second))
        return {"found": (self.head(first) - self.head(second), None), "none": None}


MODELS = [Experts, Recurrent, Parametrized, Called]


def unusual(stage, options):
    for kind in MODELS:
        accelerator = accelerator_for(stage, options, gradient_accumulation_steps=2)
        rank, size = accelerator.process_index, accelerator.num_processes
        model, mine, reference, theirs = pair(accelerator, kind)
        for step in range(4):
            x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            with accelerator.accumulate(model):
                accelerator.backward((model(x.chunk(size)[rank]) - 1).square().mean())
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                mine.step(), mine.zero_grad()
            buffers = {name: value.clone() for name, value in reference.named_buffers()}
            for part in reversed(x.chunk(size)):
                reference.load_state_dict(buffers, strict=False)
                ((reference(part) - 1).square().mean() / size / 2).backward()
            if step % 2:
                nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
                theirs.step(), theirs.zero_grad()
        found = accelerator.get_state_dict(model)
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=f"{kind.__name__} {name}")
        accelerator.free_memory()


CHECKPOINTED = {"activation_checkpointing": "full"}


@pytest.mark.parametrize(
    ("size", "stage", "options"),
    [
        (2, "zero1", {}),
        (2, "zero2", CHECKPOINTED),
        (2, "zero3", {"offload": "cpu"}),
        pytest.param(4, "zero3", {"replicas": 2}, marks=pytest.mark.slow),
        pytest.param(4, "zero3", {"prefetch": 1}, marks=pytest.mark.slow),
    ],
)
def test_unusual_models_give_one_processs_weights(size, stage, options):
    run(size, unusual, stage, options)


class PastHooks(Net):
    def __call__(self, x):
        return self.forward(x)


def packed():
    """A layer that keeps its weights as torch's quantized ones do."""
    layer = nn.Identity()
    layer.weights = torch.ops.quantized.linear_prepack_fp16(torch.ones(2, 2), None)
    return layer


def refused():
    for model, message in (
        (nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), "'0' has max_norm, which changes its weight in forward"),
        (nn.Sequential(packed(), nn.Linear(2, 2)), "'0' keeps packed weights"),
    ):
        with pytest.raises(PrepareError, match=f"prepare: zero3 cannot train this Sequential: {message}"):
            accelerator_for("zero3").prepare(model)
    with pytest.raises(PrepareError, match="call the model itself, and let its class's own __call__"):
        accelerator_for("zero3").prepare(PastHooks())(vectors())


def test_models_that_go_past_what_gathers_are_refused():
    run(2, refused)

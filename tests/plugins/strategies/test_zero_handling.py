"""What loops and models do with divided parameters themselves: right, or refused by name, against one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from accel.errors import CollectiveError, PrepareError
from accel.testing import run

from .zero_models import STAGES, accelerator_for, adamw, assert_same_gradients, assert_same_weights, make, whole

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
@pytest.mark.parametrize("length", [32, 33])
def test_penalties_over_divided_parameters(stage, length):
    run(2, penalties, stage, squares, length)


def test_penalties_where_a_process_has_no_part_of_a_parameter():
    run(4, penalties, "zero3", squares, 33)


def alone():
    """A loss that comes from parameters alone, and is a divided tensor."""
    accelerator = accelerator_for("zero3")
    model, _, reference, _ = pair(accelerator)
    model(vectors())
    accelerator.backward(squares(model)), squares(reference).backward()
    assert_same_gradients(model, reference)


def test_a_loss_of_parameters_alone():
    run(2, alone)


# -- loops that compute with parameters and the batch ------------------------------------------------------------------


class Contrast(Net):
    """What its own forward does not use is for the loop; as many numbers as do and do not divide evenly."""

    def __init__(self):
        super().__init__()
        self.scale, self.noise = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(1))
        self.centers = nn.Parameter(torch.randn(3, 3))


def classified(model, x):
    """Gathered before forward, after it, twice, and derived; the input lets gradients of the model come first."""
    centers, turn = whole(model.centers), whole(model.layers[0].weight)
    found = torch.tanh(model(x.clone().requires_grad_())) @ whole(model.head.weight * 2)
    logits = whole(model.scale.exp()) * (found @ turn) @ whole(model.head.weight).T @ centers
    return nn.functional.cross_entropy(logits, x.argmax(1) % 3)


def by_operators(model, x):
    """As with a learned temperature, and with learned weights of losses (Kendall et al. 2018)."""
    similar = model.scale.exp() * (model(x) @ model.centers.T) - model.head.bias
    first, second = nn.functional.cross_entropy(similar, x.argmax(1) % 3), similar.square().mean()
    return first * torch.exp(-model.scale) + model.scale + (second / model.noise.exp() + model.noise).sum()


def with_penalty(model, x):
    """Not merely added."""
    return model(x).square().mean() * (1 + squares(model)) + whole(model.centers.norm())


def computed(stage, options, length, bare, accumulation):
    """`length` samples in global batches of 8 times the processes, of which the last may be uneven."""
    for loss in (classified, by_operators, with_penalty):
        accelerator = accelerator_for(stage, options, gradient_accumulation_steps=accumulation)
        size = accelerator.num_processes
        model, mine, reference, theirs = pair(accelerator, Contrast)
        for x in accelerator.prepare(DataLoader(vectors(length), batch_size=8)):
            with accelerator.accumulate(model):
                (torch.Tensor.backward if bare else accelerator.backward)(loss(model, x))
                mine.step(), mine.zero_grad()
        for step, x in enumerate(vectors(length).split(8 * size)):
            for part in x.tensor_split(size):
                (loss(reference, part) * len(part) / len(x) / accumulation).backward() if len(part) else None
            if (step + 1) % accumulation == 0:
                theirs.step(), theirs.zero_grad()
        assert_same_weights(model, reference)
        with torch.no_grad():
            torch.testing.assert_close(by_operators(model, x), by_operators(reference, x))
        accelerator.free_memory()


@pytest.mark.parametrize(
    ("size", "stage", "options", "length", "bare", "accumulation"),
    [
        (2, "zero1", {}, 39, False, 1),
        (2, "zero2", {"offload": "cpu"}, 48, True, 1),
        (2, "zero3", {}, 33, False, 1),
        pytest.param(2, "zero1", {}, 64, False, 2, marks=pytest.mark.slow),
        pytest.param(2, "zero3", {}, 48, True, 1, marks=pytest.mark.slow),
        pytest.param(4, "zero3", {"replicas": 2}, 65, False, 1, marks=pytest.mark.slow),
    ],
)
def test_loops_may_compute_with_parameters_and_the_batch(size, stage, options, length, bare, accumulation):
    run(size, computed, stage, options, length, bare, accumulation)


def unlike(stage, bare, unused):
    """Rank 1 leaves out what `unused` says in the second step."""
    accelerator = accelerator_for(stage)
    model, mine, *_ = pair(accelerator)
    for step in range(2):
        first, out = whole(model.first), model(vectors())
        leaves_out = step and not accelerator.is_main_process
        loss = out.square().mean() + (0 if leaves_out and unused == "whole" else (vectors() @ first).mean())
        loss = torch.zeros((), requires_grad=True) if leaves_out and unused == "all" else loss
        (torch.Tensor.backward if bare else accelerator.backward)(loss)
        mine.step(), mine.zero_grad()


@pytest.mark.parametrize(
    ("stage", "bare", "unused", "message"),
    [
        ("zero1", False, "whole", r"backward: the loss of this process uses [01] results of full_tensor"),
        ("zero3", True, "whole", r"backward: the loss of this process uses [01] results of full_tensor"),
        ("zero2", True, "all", r"rank 0 came to a bare loss\.backward"),
    ],
)
def test_processes_that_compute_with_different_parameters_are_refused(stage, bare, unused, message):
    with pytest.raises((PrepareError, CollectiveError), match=message):
        run(2, unlike, stage, bare, unused)


def not_known():
    accelerator = accelerator_for("zero3")
    model = accelerator.prepare(Net())
    with pytest.raises(PrepareError, match=r"backward: a loss depends on what to_local\(\) gives"):
        accelerator.backward(model(vectors()).mean() + model.first.to_local().sum())
    with pytest.raises(PrepareError, match=r"torch\.stack, took divided parameters, .* use operators"):
        accelerator.backward(torch.stack([model(vectors()).mean(), model.first.square().sum()]).sum())
    first = whole(model.first)
    if accelerator.is_main_process:  # of this process's loss: there is nothing to wait for
        torch.autograd.grad((vectors() @ first).sum(), first)


def test_what_is_not_known_to_be_alike_is_refused():
    run(2, not_known)


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


def hooked(stage):
    """Hooks change gradients, and are told of them; those that `prepare` would lose are refused."""
    accelerator = accelerator_for(stage)
    model, mine, reference, theirs = pair(accelerator)
    part, told = vectors().chunk(accelerator.num_processes)[accelerator.process_index], []
    for m in (model, reference):
        for p in m.parameters():
            p.register_hook(lambda gradient: gradient * 0.5)
        m.first.register_hook(lambda gradient: told.append(whole(gradient)))
    for _ in range(2):
        accelerator.backward(model(part).square().mean() + squares(model))
        (reference(vectors()).square().mean() + squares(reference)).backward()
        mine.step(), mine.zero_grad(), theirs.step(), theirs.zero_grad()
    assert_same_weights(model, reference)
    assert len(told) == 6  # of the penalty by itself too, which one process adds up first
    late = Net()
    late.head.bias.register_hook(print)
    with pytest.raises(PrepareError, match=r"'head\.bias' has hooks for its gradient"):
        accelerator.prepare(late)


@stages
def test_hooks_of_gradients_are_called(stage):
    run(2, hooked, stage)


def alone_hooked():
    model = accelerator_for("zero3", {"offload": "cpu"}).prepare(Net())
    model.first.register_hook(print)
    with pytest.raises(PrepareError, match=r"register_hook\(\) on the divided parameter 'first' would not be called"):
        model(vectors()).sum().backward()


def test_hooks_that_torch_would_not_call_are_refused():
    run(1, alone_hooked)


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
        self.alike = nn.Sequential(*(norms[0](nn.Linear(8, 8)) for _ in "ab"))
        self.none = nn.ParameterDict({"0": torch.empty(8, 0), "1": torch.randn(8)})

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.alike(x) * self.none["1"] + self.none["0"].sum()


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

    def forward(self, x):
        return nn.functional.linear(x, self.first)


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

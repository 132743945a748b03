"""Models made under `empty_init`: no memory until prepare, and then the values that they would have had, to the bit."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accel import Accelerator
from accel.errors import PrepareError
from accel.runtime.deferred import Tape, operations, tape
from accel.testing import run


class Slices(nn.Module):
    """Parameters made part by part, through views, aliases, lists, other parameters and generators of their own."""

    def __init__(self) -> None:
        super().__init__()
        alias = nn.Parameter(torch.empty(40, 40))
        self.alias = alias
        nn.init.normal_(alias)
        self.experts = nn.Parameter(torch.empty(3, 40, 40))
        for expert in self.experts:
            nn.init.xavier_uniform_(expert)
        self.turned = nn.Parameter(torch.randn(30, 50).t() / 10)
        self.scaled = nn.Parameter(self.alias.detach() * 2)
        self.alias.data[:7].mul_(0.5)
        self.own = nn.Parameter(torch.rand(50, 40, generator=torch.Generator().manual_seed(4)))
        self.given = nn.Parameter(torch.arange(6.0))
        self.scale = nn.Parameter(torch.ones(()) * 2.6592)
        changed = torch.tensor([3.0, 4.0])
        self.changed = nn.Parameter(changed * 2)
        changed.zero_()
        self.members = [self.alias, self.experts]


class Asking(nn.Module):
    """A program that depends on values: of parameters, of random numbers, of both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(60, 60)
        self.rates = torch.linspace(0, 0.1, 4).tolist()
        if self.layer.weight.detach().sum() > 0:
            self.layer.weight.data.neg_()
        self.layer.bias.data.fill_(self.layer.weight.detach().norm().item())
        self.register_buffer("sums", self.layer.weight.detach().sum(0), persistent=False)
        self.register_buffer("frequencies", 1 / 10000 ** (torch.arange(0, 8, 2) / 8), persistent=False)
        self.noise = nn.Parameter(torch.bernoulli(torch.full((50, 50), 0.3)))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(70, 40, padding_idx=1), nn.Linear(40, 70, bias=False))
    model[1].weight = model[0].weight
    return model


def initialised() -> nn.Module:
    """What the functions of nn.init do, one after the other."""
    layers = nn.ModuleList(nn.Linear(40, 50) for _ in range(5))
    nn.init.orthogonal_(layers[0].weight)
    nn.init.trunc_normal_(layers[1].weight)
    nn.init.kaiming_normal_(layers[2].weight)
    nn.init.sparse_(layers[3].weight, 0.5)
    nn.init.eye_(layers[4].weight)
    return layers


MODELS = {
    "slices": Slices,
    "asking": Asking,
    "tied": tied,
    "initialised": initialised,
    "half": lambda: nn.Sequential(nn.Linear(60, 60), nn.Conv2d(9, 8, 7), nn.BatchNorm2d(8)).half(),
    "transformer": lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True),
    "lstm": lambda: nn.LSTM(30, 30, 2),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(40, 40)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(40, 40)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("small", [12, operations.SMALL])
def test_values_are_those_of_a_plain_build(name: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`small` decides which parameters have no memory while the model is built, and which lose it at the end."""
    monkeypatch.setattr(operations, "SMALL", small)
    monkeypatch.setattr(tape, "SMALL", small)
    torch.manual_seed(0)
    expected, following = MODELS[name](), torch.rand(3)
    torch.manual_seed(0)
    with Tape() as written:
        model = MODELS[name]()
    assert torch.equal(torch.rand(3), following), "what is drawn afterwards is the same too"
    pairs = itertools.zip_longest(model.named_parameters(), expected.named_parameters())
    for (own, found), (other, wanted) in pairs:
        assert own == other and found.is_meta and type(found) is nn.Parameter
        value = written.find(found)
        assert value is not None
        made = value.make()
        assert torch.equal(made, wanted) and made.stride() == wanted.stride() and made.dtype == wanted.dtype, own
    for (own, buffer), (_, wanted) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, wanted), own


def test_references_and_ties_stay() -> None:
    with Tape():
        model, pair = Slices(), tied()
    assert model.members == [model.alias, model.experts]
    assert pair[0].weight is pair[1].weight


def prepared(strategy: object, folder: Path, early: bool) -> None:
    """Made, trained, saved and loaded without memory, beside a plain build on rank 0's seed."""
    accelerator = Accelerator(device="cpu", strategies=strategy)
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(40, 40), tied_block(), nn.Linear(40, 3))
    torch.manual_seed(accelerator.process_index)
    with accelerator.empty_init():
        model = nn.Sequential(nn.Linear(40, 40), tied_block(), nn.Linear(40, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if early else None
    accelerator.prepare(model)
    optimizer = accelerator.prepare(optimizer or torch.optim.SGD(model.parameters(), 0.1))
    assert_weights(accelerator, model, expected)
    assert model[1][0].weight is model[1][1].weight
    accelerator.save_model(model, folder)
    before = accelerator.get_state_dict(model)
    accelerator.backward(model(torch.ones(2, 40)).sum())
    optimizer.step()
    after = accelerator.get_state_dict(model)
    assert not any(torch.equal(before[name], after[name]) for name in before), "all of them train"
    with accelerator.empty_init():
        first, second = (nn.Sequential(nn.Linear(40, 40), tied_block(), nn.Linear(40, 3)) for _ in "ab")
    accelerator.load_model(first, folder)
    accelerator.prepare(first, second)
    accelerator.load_model(second, folder)
    assert_weights(accelerator, first, expected)
    assert_weights(accelerator, second, expected)


def tied_block() -> nn.Sequential:
    block = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    block[1].weight = block[0].weight
    return block


def assert_weights(accelerator: Accelerator, model: nn.Module, expected: nn.Module) -> None:
    found = accelerator.get_state_dict(model)
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("early", [False, True], ids=["optimizer after", "optimizer before"])
@pytest.mark.parametrize(
    ("strategy", "n"),
    [
        ("single", 1),
        ("ddp", 2),
        ("zero1", 2),
        ({"zero3": {"minimum_size": 0}}, 1),
        ({"zero3": {"minimum_size": 0}}, 3),
        ({"zero3": {"offload": "cpu"}}, 2),
        ({"zero3": {"replicas": 2}}, 4),
    ],
    ids=str,
)
def test_every_strategy_trains_what_rank_0_would_have_built(
    strategy: object, n: int, early: bool, tmp_path: Path
) -> None:
    run(n, prepared, strategy, tmp_path / "weights", early)


class Unwritten(nn.Module):
    """A parameter that nothing writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bare = nn.Linear(4, 4), nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.bare
        return out


def refused(strategy: str, folder: Path) -> None:
    accelerator = Accelerator(device="cpu", strategies=strategy)
    plain = accelerator.prepare(Unwritten())
    accelerator.save_model(plain, folder)
    with accelerator.empty_init():
        model, loaded, given = Unwritten(), Unwritten(), Unwritten()
    accelerator.prepare(model, loaded, given)
    with pytest.raises(PrepareError, match="1 parameters of this Unwritten have no value, the first is 'bare'"):
        model(torch.ones(2, 4))
    accelerator.load_model(loaded, folder)
    given.load_state_dict({name: torch.ones_like(value) for name, value in accelerator.get_state_dict(given).items()})
    loaded(torch.ones(2, 4)), given(torch.ones(2, 4))
    with torch.device("meta"):
        elsewhere = nn.Sequential(nn.Linear(4, 4)), nn.BatchNorm1d(4)
    accelerator.prepare(elsewhere[0])
    with pytest.raises(PrepareError, match=r"the first is '0\.bias'"):
        elsewhere[0](torch.ones(2, 4))
    with pytest.raises(PrepareError, match="buffer 'running_mean' of this BatchNorm1d has no value: it was made on"):
        accelerator.prepare(elsewhere[1])


@pytest.mark.parametrize(("strategy", "n"), [("single", 1), ("ddp", 2), ("zero3", 2)])
def test_what_has_no_value_is_refused_by_name_until_it_is_loaded(strategy: str, n: int, tmp_path: Path) -> None:
    run(n, refused, strategy, tmp_path / "weights")


def test_a_tensor_from_elsewhere_must_not_change() -> None:
    table = torch.ones(200, 200)
    accelerator = Accelerator(device="cpu")
    with accelerator.empty_init():
        model = nn.Module()
        model.table = nn.Parameter(table * 2)
    same = copy.deepcopy(table)
    accelerator.prepare(model)
    assert torch.equal(model.table, same * 2)
    with accelerator.empty_init():
        model = nn.Module()
        model.table = nn.Parameter(table * 2)
    table.zero_()
    with pytest.raises(PrepareError, match=r"a tensor of shape \(200, 200\) .* has changed since"):
        accelerator.prepare(model)


class Large(nn.Module):
    """1.14 GB in float32: 32 blocks of 34 MB, between an embedding and a head of as much."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8 * width, width), nn.Linear(width, 8 * width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.Linear(4 * width, width)) for _ in range(32)
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)


def peak(strategy: str, empty: bool) -> tuple[int, int, int]:
    """Bytes: of the whole model, of what this process holds and its largest block, of memory at the peak."""
    accelerator = Accelerator(device="cpu", strategies=strategy)
    accelerator.prepare(nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400)))  # imports what is imported late
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with accelerator.empty_init() if empty else nullcontext():
        model = Large()
    accelerator.prepare(model)
    found = resident("VmHWM") - base
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    part = sum(parameter.to_local().numel() for parameter in model.parameters()) * 4
    return whole, part + sum(parameter.numel() for parameter in model.blocks[0].parameters()) * 4, found


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_the_peak_is_a_processs_part_and_one_block() -> None:
    for whole, allowed, found in run(4, peak, "zero3", True, timeout=110):
        assert whole > 1 << 30
        assert found < 1.05 * allowed


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_a_model_that_is_whole_at_first_peaks_at_little_more() -> None:
    for whole, _, found in run(4, peak, "zero3", False, timeout=110):
        assert found < 1.08 * whole

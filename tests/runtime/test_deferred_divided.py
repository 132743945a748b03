"""Models made under `empty_init` that are divided by running them: on made-up values, never whole, then filled."""

from __future__ import annotations

import copy
import ctypes
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel import Accelerator
from accel.errors import PrepareError
from accel.runtime.deferred import filling, hollow_whole, runnable
from accel.runtime.divided import check, operators
from accel.runtime.divided.projections import Projections
from accel.runtime.shards import Elsewhere, held_part
from accel.testing import run

from .test_deferred import Large, resident

VOCABULARY, WIDTH, LENGTH = 60, 32, 8


class Block(nn.Module):
    """Queries, keys and values from one layer, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.out(attended.reshape(x.shape))
        out: Tensor = x + self.down(F.gelu(self.up(x)))
        return out


class Model(nn.Module):
    """Positions that no layer has, a head that is tied to the embedding, and an `if` on data."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        if tokens.max() > VOCABULARY:
            x = x.relu()
        logits: Tensor = self.head(x)
        return logits


def batch(index: int) -> Tensor:
    return torch.randint(VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(index))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.roll(1, 1).flatten())


def filled(strategies: Any, folder: Path) -> None:
    """An empty model beside one that is built whole: the same plan and bits, from its own program and from a folder."""
    accelerator = Accelerator(device="cpu", strategies=strategies)
    torch.manual_seed(0)
    expected = Model()
    plain = accelerator.prepare(copy.deepcopy(expected))
    torch.manual_seed(accelerator.process_index)
    with accelerator.empty_init():
        model, loaded = Model(), Model()
    noted = note_memory(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    accelerator.prepare(model, optimizer)
    assert max(noted) == held_bytes(model) < 0.8 * held_bytes(expected), "never more than this process's part"
    if "pipeline" not in strategies:  # which measures
        assert accelerator.describe(model) == accelerator.describe(plain)
    assert_same(accelerator.get_state_dict(model), expected.state_dict())
    accelerator.save_model(model, folder)
    accelerator.load_model(loaded, folder)
    accelerator.prepare(loaded)
    assert_same(accelerator.get_state_dict(loaded), expected.state_dict())
    step = torch.optim.SGD(expected.parameters(), 0.1)
    for index in range(2):
        ours, theirs = loss_of(model, batch(index)), loss_of(expected, batch(index))
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=0)
        accelerator.backward(ours), theirs.backward()
        optimizer.step(), step.step(), optimizer.zero_grad(), step.zero_grad()
    found = accelerator.get_state_dict(model)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def note_memory(model: nn.Module) -> list[int]:
    """The bytes that this process holds of a model each time that what is empty is filled, from now on."""
    noted: list[int] = []
    fill = filling.Filling.fill

    def noting(self: filling.Filling, device: torch.device) -> set[str]:
        unknown = fill(self, device)
        noted.append(held_bytes(model))
        return unknown

    filling.Filling.fill = noting  # type: ignore[method-assign]
    return noted


def held_bytes(model: nn.Module) -> int:
    return sum(held_part(p).nbytes for p in model.parameters() if not isinstance(p, Elsewhere))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("strategies", "n"),
    [
        ({"tensor": {"size": 2}}, 2),
        ({"pipeline": {"size": 2, "schedule": "1f1b"}}, 2),
        ({"pipeline": {"size": 2}, "tensor": {"size": 2}}, 4),
    ],
    ids=str,
)
def test_an_empty_model_is_divided_as_one_with_values_and_filled_with_rank_0s(
    strategies: Any, n: int, tmp_path: Path
) -> None:
    run(n, filled, strategies, tmp_path / "weights", timeout=110)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("other", ["tensor", "pipeline"])
def test_so_it_is_beside_strategies_of_the_data_axis(other: str, data: str, tmp_path: Path) -> None:
    options = {} if data == "ddp" else {"minimum_size": 0}
    run(4, filled, {other: {"size": 2}, data: options}, tmp_path / "weights", timeout=110)


class Fails(Model):
    """Gives something else with each call."""

    calls: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls.append(0)
        return super().forward(tokens) * len(self.calls)


class Writes(Model):
    """Changes a parameter as it computes."""

    def forward(self, tokens: Tensor) -> Tensor:
        self.positions.data.mul_(0.9)
        return super().forward(tokens)


def refused(kind: type[nn.Module], strategy: str) -> str:
    accelerator = Accelerator(device="cpu", strategies={strategy: {"size": 2}})
    with accelerator.empty_init():
        model = kind()
    with pytest.raises(PrepareError) as caught:
        accelerator.prepare(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    return str(caught.value)


def refused_all() -> dict[str, str]:
    said = {f"{k.__name__} {name}": refused(k, name) for k in (Fails, Writes) for name in ("tensor", "pipeline")}
    return {**said, "wrong gradients": held_with_wrong_gradients()}


def held_with_wrong_gradients() -> str:
    """How a model is held where gradients of what layers share are not added up."""
    operators.Copy.backward = staticmethod(lambda ctx, gradient: (gradient, None))
    accelerator = Accelerator(device="cpu", strategies={"tensor": {"size": 2}})
    with accelerator.empty_init():
        model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is divided
        accelerator.prepare(model)
    assert all(parameter.placements[0].is_replicate() for parameter in model.parameters())
    return str(accelerator.describe(model))


def test_what_differs_in_an_empty_model_when_it_is_divided_is_found() -> None:
    for said in run(2, refused_all):
        assert "cannot divide this Fails: on an example it changes output by" in said["Fails tensor"]
        assert "does not give what it gives as a whole" in said["Fails pipeline"]
        for name in ("tensor", "pipeline"):
            assert "a model without memory changes a parameter by aten.mul_" in said[f"Writes {name}"]
        assert "divided, it changes the gradient of blocks.3.norm.bias by" in said["wrong gradients"]


def test_a_model_without_memory_runs_on_values_of_no_meaning() -> None:
    accelerator = Accelerator(device="cpu")
    with accelerator.empty_init():
        model = nn.Sequential(nn.Linear(300, 4000), nn.LayerNorm(4000), nn.Linear(4000, 300))
    with runnable(model, torch.device("cpu")):
        first, second = model(torch.ones(2, 300)), model(torch.ones(2, 300))
        assert torch.equal(first, second) and 0.1 < first.std() < 10
        assert all(p.device.type == "cpu" and p.untyped_storage().nbytes() == 0 for p in model.parameters())
        rows = model[0].weight.as_strided((4000, 100), (300, 1), 7)
        assert torch.equal(rows.sum(), model[0].weight[:, 7:107].sum()) and hollow_whole(rows) is not None
        first.sum().backward()
        assert torch.equal(model[2].weight.grad, model[2].weight.grad[:1].expand(300, -1))
        model.zero_grad()
    assert all(p.is_meta for p in model.parameters()) and hollow_whole(model[0].weight) is None


def projections(loss: Tensor, **parameters: nn.Parameter) -> check.Result:
    with Projections(parameters) as projected:
        loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in parameters.values())
    return check.Result({}, projected.found)


def test_projections_tell_gradients_apart_as_the_gradients_do() -> None:
    wanted, noise = torch.randn(3, 40, 50), torch.randn(3, 40, 50) * 1e-9
    weight, scalar = nn.Parameter(torch.zeros(3, 40, 50)), nn.Parameter(torch.zeros(()))
    one_wrong = wanted.clone()
    one_wrong[2, 3, 4] += 0.1
    expected = projections((weight * wanted).sum() + scalar, weight=weight, scalar=scalar)
    for gradient, same in [
        (wanted + noise, True),
        (wanted.flip(0), False),
        (wanted.roll(1, 1), False),
        (wanted.roll(1, 2), False),
        (wanted / 1.01, False),
        (one_wrong, False),
    ]:
        found = projections((weight * gradient).sum() + scalar, weight=weight, scalar=scalar)
        assert (check.compare(found, expected) == "") == same
    assert check.compare(projections(scalar * 1.0, scalar=scalar), expected).startswith("other outputs or gradients")


class Computing(Large):
    """The large model of ZeRO's test, with a forward."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


def peak(strategies: Any) -> tuple[int, int, int]:
    """Bytes: of the whole model, of what this process holds and its largest block, of memory at the peak."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, as `accel launch` sets it: what is freed is given back
    accelerator = Accelerator(device="cpu", strategies=strategies)
    accelerator.prepare(Model())  # imports what is imported late
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with accelerator.empty_init():
        model = Computing()
    accelerator.prepare(model)
    found = resident("VmHWM") - base
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return whole, held_bytes(model) + sum(parameter.nbytes for parameter in model.blocks[0].parameters()), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategies", "n", "noise"),
    [
        ({"tensor": {"size": 2}}, 2, 0.1),
        ({"pipeline": {"size": 2}}, 2, 0.1),
        ({"tensor": {"size": 2}, "zero3": {}}, 4, 0.15),
        ({"pipeline": {"size": 2}, "zero2": {}}, 4, 0.15),
    ],
    ids=str,
)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_the_peak_is_a_processs_part_and_one_block(strategies: Any, n: int, noise: float) -> None:
    for whole, allowed, found in run(n, peak, strategies, timeout=110):
        assert whole > 1 << 30
        assert found < (1 + noise) * allowed

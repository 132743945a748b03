"""Parts of tensors: where their bytes are, who writes them, in layouts that no strategy of ours has yet."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from accel import Accelerator
from accel.errors import CheckpointError
from accel.interfaces import Entry
from accel.runtime.checkpoint import parts
from accel.runtime.checkpoint.ownership import Duty, Held, all_entries, duties
from accel.runtime.checkpoint.parts import Box, geometries
from accel.testing import run

BOXES = [
    ((), (), ()),
    ((7,), (2,), (3,)),
    ((4, 6), (0, 0), (4, 6)),
    ((4, 6), (1, 0), (2, 6)),
    ((4, 6), (0, 2), (4, 3)),
    ((4, 6), (1, 2), (2, 3)),
    ((3, 4, 5), (0, 1, 0), (3, 2, 5)),
    ((3, 4, 5), (1, 1, 1), (2, 2, 3)),
    ((2, 3, 4, 2), (0, 1, 0, 0), (2, 2, 4, 1)),
    ((4, 6), (4, 0), (0, 6)),
]


@pytest.mark.parametrize(("whole", "offset", "shape"), BOXES)
@pytest.mark.parametrize("chunk", [parts.CHUNK, 8, 3])
def test_bytes_of_a_box(
    whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against numpy's own slicing of an array that holds the number of each of its bytes; any stretch of the box."""
    monkeypatch.setattr(parts, "CHUNK", chunk)
    size = 2
    numbers = np.arange(int(np.prod(whole, dtype=int)) * size).reshape(*whole, size)
    expected = numbers[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].reshape(-1)
    for start, stop in product(range(len(expected) + 1), repeat=2):
        if start < stop:
            found = list(geometries(whole, Box(offset, shape), size, start, stop))
            assert [b for g in found for r in g.runs() for b in range(r, r + g.size)] == list(expected[start:stop])
            assert all(g.total <= chunk for g in found)


def test_rows_of_a_column_shard_are_one_range() -> None:
    assert len(list(geometries((1000, 8), Box((0, 4), (1000, 4)), 4, 0, 16000))) == 1


def held(name: str, offset: int, length: int, alike: bool = True, shape: int = 10) -> Held:
    return Held("model", Entry(name, "int8", (shape,)), Box((offset,), (length,)), alike)


def test_holders_of_the_same_part_share_it() -> None:
    """Two replicas of two halves, a replicated tensor, one that may differ, and one that a single rank has."""
    common = [held("all", 0, 10), held("buffer", 0, 10, alike=False)]
    tables = [
        [held("half", 0, 5), *common],
        [held("half", 5, 5), *common],
        [held("half", 0, 5), *common, held("own", 0, 10)],
        [held("half", 5, 5), *common],
    ]
    names = [entry.name for entry in all_entries(tables)["model"]]
    assert names == ["half", "all", "buffer", "own"]
    found = [set(duties(tables, rank)) for rank in range(4)]
    assert found[0] == {Duty(held("half", 0, 5), 0, 2), Duty(held("all", 0, 10), 0, 2), Duty(common[1], 0, 10)}
    assert found[1] == {Duty(held("half", 5, 5), 0, 2), Duty(held("all", 0, 10), 2, 5)}
    assert found[2] == {Duty(held("half", 0, 5), 2, 5), Duty(held("all", 0, 10), 5, 7), Duty(held("own", 0, 10), 0, 10)}
    assert found[3] == {Duty(held("half", 5, 5), 2, 5), Duty(held("all", 0, 10), 7, 10)}


def test_parts_that_make_no_whole_are_refused() -> None:
    with pytest.raises(CheckpointError, match="model: x: the processes hold 9 of 10 elements"):
        all_entries([[held("x", 0, 5)], [held("x", 6, 4)]])
    with pytest.raises(CheckpointError, match=r"int8 of shape .11,. on rank 1, and int8 of shape .10,. on another"):
        all_entries([[held("x", 0, 10)], [held("x", 0, 11, shape=11)]])


LAYOUTS = [
    (Shard(0), Shard(1)),
    (Shard(1), Replicate()),
    (Replicate(), Shard(2)),
    (Shard(1), Shard(1)),
    (Replicate(), Replicate()),
    (Shard(2), Shard(0)),
]


class Odd(nn.Module):
    """One tensor in each layout, over a grid of two times two processes."""

    def __init__(self, fill: bool, turn: int) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (2, 2))
        for i, value in enumerate(values()):
            layout = LAYOUTS[(i + turn) % len(LAYOUTS)]
            whole = value if fill else torch.zeros_like(value)
            self.register_parameter(f"p{i}", nn.Parameter(distribute_tensor(whole, mesh, layout, src_data_rank=None)))


def values() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 6, 7, generator=generator) for _ in LAYOUTS]


def any_layout(folder: Path) -> None:
    accelerator = Accelerator()
    accelerator.save_model(Odd(True, 0), folder)
    for turn in range(3):
        model = Odd(False, turn)
        accelerator.load_model(model, folder)
        for parameter, expected in zip(model.parameters(), values(), strict=True):
            assert torch.equal(parameter.full_tensor(), expected)
    with torch.no_grad():
        model.p0 = nn.Parameter(model.p4.redistribute(placements=(Replicate(), Replicate())))
        model.p0 = nn.Parameter(
            type(model.p0.data).from_local(model.p0.to_local(), model.p0.device_mesh, [Partial()] * 2)
        )
    with pytest.raises(CheckpointError, match="p0: holds sums that are not complete"):
        accelerator.save_model(model, folder)


def test_any_layout(tmp_path: Path) -> None:
    run(4, any_layout, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[f"p{i}"], value) for i, value in enumerate(values()))


def two_models(folder: Path, resume: bool) -> list[Tensor]:
    """Two models of the same names under one optimizer, and one of its own for the second."""
    torch.manual_seed(resume)
    accelerator = Accelerator(strategies=["zero3"] if accelerator_size() > 1 else ["single"])
    one, two = nn.Linear(3, 4), nn.Linear(3, 4)
    both = torch.optim.Adam([*one.parameters(), *two.parameters()])
    own = torch.optim.SGD(two.parameters(), lr=0.1, momentum=0.9)
    accelerator.prepare(one, two, both, own)
    if resume:
        accelerator.load_state(folder)
    else:
        accelerator.backward((one(torch.ones(2, 3)) * two(torch.ones(2, 3))).sum())
        both.step(), own.step()
        accelerator.save_state(folder)
    states = [optimizer.state[p] for optimizer in (both, own) for g in optimizer.param_groups for p in g["params"]]
    tensors = [*one.parameters(), *two.parameters(), *(v for state in states for v in state.values())]
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach() for t in tensors]


def accelerator_size() -> int:
    from accel.runtime.world import World

    return World.from_environment().size


def test_several_models_and_optimizers(tmp_path: Path) -> None:
    [*_, saved] = run(2, two_models, tmp_path / "c", False)
    [loaded] = run(1, two_models, tmp_path / "c", True)
    assert len(saved) == 4 + 4 * 3 + 2
    assert all(torch.equal(one, other) for one, other in zip(saved, loaded, strict=True))
    names = {"manifest.json", "state.json", "state.safetensors"}
    names |= {f"{kind}{i}.safetensors" for kind in ("model", "optimizer") for i in ("", "_1")}
    assert {path.name for path in (tmp_path / "c").iterdir()} == names
    assert "model:weight.exp_avg" in load_file(tmp_path / "c" / "optimizer.safetensors")
    assert set(load_file(tmp_path / "c" / "optimizer_1.safetensors")) == {
        "weight.momentum_buffer",
        "bias.momentum_buffer",
    }

"""Several axes at once: what the core makes of strategies that place or divide parameters, and split backward.

The strategies here are the smallest that do so; the reference is one process of plain torch.
"""

import copy
import pickle
from importlib.metadata import EntryPoint

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from accel import Accelerator, registry
from accel.errors import CheckpointError
from accel.interfaces import Axis, Strategy
from accel.runtime.shards import Elsewhere
from accel.testing import run


class Stages(Strategy):
    """Each process keeps every other layer, and takes the batch in two halves, one backward pass each."""

    axis = Axis.PIPELINE
    splits_backward = True
    places_parameters = True

    def setup(self, model):
        for parameter in model.parameters():
            dist.broadcast(parameter.detach(), group=self.mesh.group, group_src=0)
        for place, layer in enumerate(model.layers):
            if place % self.mesh.size != self.mesh.index:
                for name, parameter in list(layer.named_parameters()):
                    setattr(layer, name, Elsewhere(parameter))
        model.forward = lambda x: sum(_Halves.apply(x, layer, layer.weight) for layer in model.layers)


class _Halves(torch.autograd.Function):
    """A layer whose backward is two passes, on the process that holds the layer; all processes get its output."""

    @staticmethod
    def forward(ctx, x, layer, weight):
        ctx.x, ctx.layer, mine = x, layer, not weight.is_meta
        output = layer(x).detach() if mine else torch.zeros(x.shape[0], 1)
        dist.all_reduce(output, group=_pipeline())
        return output

    @staticmethod
    def backward(ctx, gradient):
        if not ctx.layer.weight.is_meta:
            for x, part in zip(ctx.x.chunk(2), gradient.chunk(2), strict=True):
                with torch.enable_grad():
                    output = ctx.layer(x)
                output.backward(part)
        return None, None, None


class Divided(Strategy):
    """Weights divided by rows, and gathered where they are used."""

    axis = Axis.TENSOR

    def setup(self, model):
        for layer in model.layers:
            for name, parameter in list(layer.named_parameters()):
                place = Shard(1) if parameter.dim() == 2 else Replicate()
                setattr(layer, name, nn.Parameter(distribute_tensor(parameter, self.mesh.device_mesh, [place])))


class Layers(nn.Module):
    """A sum of linear layers, one value a sample."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 1) for _ in range(4))

    def forward(self, x):
        return sum(nn.functional.linear(x, whole(layer.weight), whole(layer.bias)) for layer in self.layers)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _pipeline():
    return Accelerator.last.mesh.axis(Axis.PIPELINE).group


def make(**settings):
    """An Accelerator that knows the strategies of this file."""
    real = registry._points
    own = [EntryPoint(kind.__name__.lower(), f"{__name__}:{kind.__name__}", "accel.strategies") for kind in OWN]
    registry._points = lambda kind: [*real(kind), *(own if kind == "strategy" else ())]
    Accelerator.last = Accelerator(**settings)
    return Accelerator.last


OWN = (Stages, Divided)


def batches(rank, size):
    """Three batches of 4 for each of `size` ranks; `rank` None is all of them together."""
    generator = torch.Generator().manual_seed(3)
    every = [torch.randn(4 * size, 4, generator=generator) for _ in range(3)]
    return every if rank is None else [batch.chunk(size)[rank] for batch in every]


def train(strategies, accumulate, clip):
    """Gradient norms and the weights this process holds after a few steps."""
    torch.manual_seed(0)
    model = Layers()
    accelerator = make(strategies=strategies, gradient_accumulation_steps=accumulate)
    model = accelerator.prepare(model)
    optimizer = accelerator.prepare(torch.optim.Adam(model.parameters(), lr=0.1))
    data = accelerator.mesh.axis(Axis.DATA)
    norms = []
    for batch in batches(data.index, data.size):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            if accelerator.sync_gradients:
                if clip == "torch":
                    norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.5)).item())
                else:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
            optimizer.zero_grad()
    return norms, {name: whole(p.detach()) for name, p in model.named_parameters() if not p.is_meta}


def reference(size, accumulate):
    """The same by plain torch on the batches of all data ranks, each process's mean loss counting alike."""
    torch.manual_seed(0)
    model = Layers()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    norms, every = [], batches(None, size)
    for start in range(0, len(every), accumulate):
        window = every[start : start + accumulate]
        for batch in window:
            (model(batch).square().mean() / accumulate).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("data", ["ddp", "zero1", "zero3"])
@pytest.mark.parametrize("other", ["stages", "divided"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, "accel"), (3, "torch")])
def test_norms_and_weights_over_two_axes(data, other, accumulate, clip):
    norms, weights = reference(2, accumulate)
    found: dict[str, torch.Tensor] = {}
    for rank_norms, held in run(4, train, {other: {"size": 2}, data: {}}, accumulate, clip):
        assert rank_norms == pytest.approx(norms, rel=1e-5)
        for name, value in held.items():
            torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6)
        found |= held
    assert set(found) == set(weights)


def prepared(strategies, seed=0):
    torch.manual_seed(seed)
    model = Layers()
    accelerator = make(strategies=strategies)
    model, optimizer = accelerator.prepare(model, Stepwise(model.parameters(), lr=0.1))
    return accelerator, model, optimizer


class Stepwise(torch.optim.AdamW):
    """Keeps a plain number beside its tensors, as many optimizers that are not torch's own do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1


def step(accelerator, model, optimizer, size=2):
    for batch in batches(None, size):
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def save(strategies, folder):
    accelerator, model, optimizer = prepared(strategies)
    step(accelerator, model, optimizer)
    accelerator.save_state(folder)
    if strategies != "single":
        with pytest.raises(CheckpointError, match="get_state_dict"):
            pickle.dumps(model.state_dict())
    return accelerator.get_state_dict(model)


def load(strategies, folder):
    accelerator, model, optimizer = prepared(strategies, seed=1)
    accelerator.load_state(folder)
    loaded = accelerator.get_state_dict(model)
    step(accelerator, model, optimizer)
    counts = [optimizer.state[p]["count"] for p in model.parameters() if p in optimizer.state]
    return loaded, counts, accelerator.get_state_dict(model)


def plain():
    """Weights after one and after two rounds of plain torch."""
    torch.manual_seed(0)
    model = Layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    rounds = []
    for _ in range(2):
        for batch in batches(None, 2):
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        rounds.append(copy.deepcopy(model.state_dict()))
    return rounds


AXES = [{"stages": {"size": 2}}, {"divided": {"size": 2}, "zero3": {}}, {"stages": {"size": 2}, "zero2": {}}, "single"]


@pytest.mark.parametrize(("saver", "loader"), [(0, 1), (1, 2), (2, 3), (3, 0)])
def test_a_checkpoint_moves_between_axes(saver, loader, tmp_path):
    processes = [2, 4, 4, 1]
    first, second = plain()
    saved = run(processes[saver], save, AXES[saver], tmp_path / "c")
    for loaded, counts, after in run(processes[loader], load, AXES[loader], tmp_path / "c"):
        assert set(counts) == {6}
        for name, value in loaded.items():
            assert torch.equal(value, saved[0][name])
            torch.testing.assert_close(value, first[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(after[name], second[name], rtol=1e-4, atol=1e-5)


def test_a_model_with_parameters_elsewhere_can_be_moved_copied_and_optimized():
    model = nn.Linear(3, 2)
    model.weight = Elsewhere(model.weight)
    for moved in (model, model.to("cpu"), model.cpu(), copy.deepcopy(model), copy.deepcopy(model).half()):
        assert isinstance(moved.weight, Elsewhere)
        assert (moved.weight.device.type, moved.weight.shape) == ("cpu", (2, 3))
    assert (model.weight.dtype, moved.weight.dtype) == (torch.float32, torch.float16)
    optimizer = torch.optim.AdamW(model.parameters())
    model.bias.grad = torch.ones(2)
    optimizer.step()
    assert set(optimizer.state) == {model.bias}

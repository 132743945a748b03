"""What tensor parallelism costs and saves, beside torch's own `parallelize_module` with a plan written by hand.

    python benchmarks/parallel_tensor.py
    python benchmarks/parallel_tensor.py --width 768 --heads 12 --layers 4 --processes 2 4

Both train one transformer in float32 with AdamW on gloo processes, in turns, round after round; rows show medians, and
ratios are to torch's of the same round. Bytes are counted by a loopback device of their own where this is run by root,
else they are the least that the collectives called would have to send.

- CPU: milliseconds of CPU time of one process's step, user and system; forward and backward alone beside it.
- sent: MB per step, all processes together; beside it the ratio to the formula of Narayanan et al. 2021, section 3.2.
- stored: MB of parameters, gradients and optimizer state on one process; beside it the ratio to 1/n of all.
- kept: MB that forward keeps on one process for backward, parameters apart.
- loss: the largest relative difference to torch's losses.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from traffic import Traffic
from transformer import BYTES, Shape, Transformer, make_batch, make_optimizer
from zero import own_network, run, show
from zero_contender import end_worker, sent, size_of, tensors

CONTENDERS = {
    "torch": "torch",
    "accel": "torch",
    "torch, divided": "torch, divided",
    "accel, divided": "torch, divided",
}
"""Each with what its ratios are to. The latter two divide sequences and logits too: torch by a plan with
`SequenceParallel` and `loss_parallel()`, this project by the options `sequence_parallel` and `loss_parallel`."""

WARM_UP = 2
MB = 1e6


class Block(nn.Module):
    """[b, t, width] -> the same, with a layer for each of query, key and value; heads are counted, not named."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.size = shape.width, shape.width // shape.heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        b, t, _ = y.shape
        parts = [layer(y).view(b, t, -1, self.size).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        attended = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).reshape(b, t, -1))
        out: Tensor = x + self.down(F.gelu(self.up(self.feed_norm(x))))
        return out


def make_model(shape: Shape) -> nn.Module:
    """The same weights on every process."""
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(shape, layers=0))
    model.blocks.extend(Block(shape) for _ in range(shape.layers))
    return model


def by_torch(shape: Shape) -> tuple[nn.Module, Any, Any]:
    """The plan of torch's tutorial: pairs of column and row, the vocabulary by rows; norms stay plain."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = dict.fromkeys(("query", "key", "value", "up"), ColwiseParallel())
    model = make_model(shape)
    for block in model.blocks:
        parallelize_module(block, mesh, {**columns, **dict.fromkeys(("output", "down"), RowwiseParallel())})
    embedding, head = RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, {"embedding": embedding, "head": head})
    return model, make_optimizer(model), Tensor.backward


def by_torch_divided(shape: Shape) -> tuple[nn.Module, Any, Any]:
    """The same with norms on parts of the sequence, one gather for query, key and value, and divided logits."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = dict.fromkeys(("query", "key", "value", "up"), ColwiseParallel())
    rows = dict.fromkeys(("output", "down"), RowwiseParallel(output_layouts=Shard(1)))
    norms = dict.fromkeys(("attention_norm", "feed_norm"), SequenceParallel())
    model = make_model(shape)
    for block in model.blocks:
        parallelize_module(block, mesh, {**columns, **rows, **norms})
        for norm in (block.attention_norm, block.feed_norm):
            norm.register_forward_hook(lambda _, args, out: out.redistribute(placements=[Replicate()]))
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "places": PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(0)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, plan)
    loss_parallel().__enter__()  # for as long as this process trains
    return model, make_optimizer(model), Tensor.backward


def by_accel(shape: Shape, **options: Any) -> tuple[nn.Module, Any, Any]:
    """This project, which finds the plan by itself."""
    from accel import Accelerator

    size = dist.get_world_size()
    accelerator = Accelerator(strategies={"tensor": {"size": size, **options}}, device="cpu", num_processes=size)
    model = make_model(shape)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    return model, optimizer, accelerator.backward


MAKERS: dict[str, Callable[[Shape], tuple[nn.Module, Any, Any]]] = {
    "torch": by_torch,
    "accel": by_accel,
    "torch, divided": by_torch_divided,
    "accel, divided": functools.partial(by_accel, sequence_parallel=True, loss_parallel=True),
}


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that are kept for backward, each memory once; those of parameters apart."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
        self.found: dict[int, tuple[int, Tensor]] = {}
        super().__init__(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        part = local(tensor)
        with torch._C.DisableTorchFunctionSubclass():  # of a tensor that looks whole, the part
            storage = part.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.found[storage.data_ptr()] = storage.nbytes(), tensor  # while it is held, no other gets its address
        return tensor

    def total(self) -> int:
        return sum(size for size, _ in self.found.values())


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def work(name: str, shape: Shape, steps: int, network: bool) -> dict[str, Any]:
    """Train on this process; returns what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, optimizer, backward = MAKERS[name](shape)
    passes, whole, losses, stored, start = [], [], [], 0, 0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            dist.barrier()
            start = sent()
        begin = time.process_time()
        loss = model(make_batch(shape, step, 0))
        backward(loss)
        passes.append((time.process_time() - begin) * 1000)
        if step == 1:
            parameters = list(model.parameters())
            stored = size_of([*parameters, *(p.grad for p in parameters), *tensors(optimizer.state)])
        optimizer.step()
        optimizer.zero_grad()
        whole.append((time.process_time() - begin) * 1000)
        losses.append(loss.item())
    dist.barrier()
    total = (sent() - start) / steps
    kept = Kept(model)
    with kept:
        backward(model(make_batch(shape, 0, 0)))
    if not network:
        with Traffic() as traffic:
            backward(model(make_batch(shape, 0, 0)))
        total = traffic.sent * dist.get_world_size()
    found = {"passes": statistics.median(passes[WARM_UP:]), "cpu": statistics.median(whole[WARM_UP:])}
    return {**found, "sent": total, "stored": stored, "kept": kept.total(), "losses": losses}


def formula(shape: Shape, processes: int, divided: bool) -> float:
    """Bytes that all processes together send in a step: an all-reduce sends each number 2 (n - 1) times.

    Four for each block, forward and backward; for the embedding one, for the head one in backward, and its outputs
    are gathered. Where these are divided, three numbers of each position are added up in their place, and the
    gradients of norms; those of places are gathered.
    """
    activations = shape.batch * shape.length * shape.width
    logits = shape.batch * shape.length * shape.vocabulary
    if divided:
        logits = 6 * shape.batch * shape.length + shape.width * (4 * (2 * shape.layers + 1) + shape.length)
    return BYTES * (processes - 1) * (2 * activations * (4 * shape.layers + 2) + logits)


def measure(name: str, processes: int, shape: Shape, steps: int, network: list[str]) -> list[dict[str, Any]]:
    """What each process measured. Raises RuntimeError with what was printed, if there is no result."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        given = json.dumps({"shape": dataclasses.asdict(shape), "steps": steps, "network": bool(network)})
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        said = run([*network, *torchrun, __file__, "--worker", name, "--given", given, "--out", str(out)])
        if not out.exists():
            raise RuntimeError(said)
        results: list[dict[str, Any]] = json.loads(out.read_text())
        return results


def be_worker(options: Any) -> None:
    """One process of `measure`."""
    warnings.simplefilter("ignore")
    given = json.loads(options.given)
    end_worker(work(options.worker, Shape(**given["shape"]), given["steps"], given["network"]), options.out)


def compare(processes: int, shape: Shape, options: Any, network: list[str]) -> None:
    """Let both take turns, and print the table."""
    rounds = [
        {name: measure(name, processes, shape, options.steps, network) for name in CONTENDERS}
        for _ in range(options.rounds)
    ]
    parameters = sum(parameter.numel() for parameter in make_model(shape).parameters())

    def number(name: str, what: str, base: str = "") -> float:
        means = [statistics.mean(result[what] for result in found[name]) for found in rounds]
        below = [statistics.mean(result[what] for result in found[base]) if base else 1.0 for found in rounds]
        return statistics.median(a / b for a, b in zip(means, below, strict=True))

    titles = "contender, CPU, / torch, passes, / torch, sent, / torch, / formula, stored, n x, kept, / torch, loss"
    rows = [titles.split(", ")]
    for name, base in CONTENDERS.items():
        pairs = zip(rounds[0][name][0]["losses"], rounds[0]["torch"][0]["losses"], strict=True)
        rows.append([name])
        for what in ("cpu", "passes"):
            rows[-1] += [f"{number(name, what):.0f}", f"{number(name, what, base):.2f}"]
        total, stored = number(name, "sent"), number(name, "stored")
        rows[-1] += [f"{total / MB:.1f}", f"{number(name, 'sent', base):.3f}"]
        least = formula(shape, processes, "divided" in name)
        rows[-1] += [
            f"{total / least:.3f}",
            f"{stored / MB:.0f}",
            f"{stored * processes / (4 * BYTES * parameters):.3f}",
        ]
        rows[-1] += [f"{number(name, 'kept') / MB:.1f}", f"{number(name, 'kept', 'torch'):.2f}"]
        rows[-1] += [f"{max(abs(a - b) / b for a, b in pairs):.0e}"]
    print(f"\n{parameters / 1e6:.1f} M parameters, {processes} processes, {options.rounds} round(s)")
    show(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of turns")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a turn")
    for name in ("worker", "given", "out"):
        parser.add_argument(f"--{name}", type=Path if name == "out" else str, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        be_worker(options)
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    network = own_network()
    print("bytes: counted by the loopback device" if network else "bytes: the least that the collectives need")
    for processes in options.processes:
        compare(processes, shape, options, network)


if __name__ == "__main__":
    main()

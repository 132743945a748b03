"""What tensor parallelism costs and saves, beside torch's own `parallelize_module` with a plan written by hand.

    python benchmarks/parallel_tensor.py
    python benchmarks/parallel_tensor.py --width 768 --heads 12 --layers 4 --processes 2 4

Both train one transformer in float32 with AdamW on gloo processes, in turns, round after round; rows show medians, and
ratios are to torch's of the same round. Bytes are counted by a loopback device of their own where this is run by root,
else they are the least that the collectives called would have to send.

- CPU: milliseconds of CPU time of one process's step, user and system; forward and backward alone beside it.
- sent: MB per step, all processes together; beside it the ratio to the formula of Narayanan et al. 2021, section 3.2.
- stored: MB of parameters, gradients and optimizer state on one process; beside it the ratio to 1/n of all.
- loss: the largest relative difference to torch's losses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from traffic import Traffic
from transformer import BYTES, Shape, Transformer, make_batch, make_optimizer
from zero import own_network, run, show
from zero_contender import end_worker, sent, size_of, tensors

CONTENDERS = ("torch", "accel")
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
        b, t, _ = x.shape
        y = self.attention_norm(x)
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


def by_accel(shape: Shape) -> tuple[nn.Module, Any, Any]:
    """This project, which finds the plan by itself."""
    from accel import Accelerator

    size = dist.get_world_size()
    accelerator = Accelerator(strategies={"tensor": {"size": size}}, device="cpu", num_processes=size)
    model = make_model(shape)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    return model, optimizer, accelerator.backward


def work(name: str, shape: Shape, steps: int, network: bool) -> dict[str, Any]:
    """Train on this process; returns what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, optimizer, backward = by_torch(shape) if name == "torch" else by_accel(shape)
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
    if not network:
        with Traffic() as traffic:
            backward(model(make_batch(shape, 0, 0)))
        total = traffic.sent * dist.get_world_size()
    found = {"passes": statistics.median(passes[WARM_UP:]), "cpu": statistics.median(whole[WARM_UP:])}
    return {**found, "sent": total, "stored": stored, "losses": losses}


def formula(shape: Shape, processes: int) -> float:
    """Bytes that all processes together send in a step: an all-reduce sends each number 2 (n - 1) times.

    Four for each block, forward and backward; for the embedding one, for the head one in backward, and its outputs
    are gathered.
    """
    activations = shape.batch * shape.length * shape.width
    logits = shape.batch * shape.length * shape.vocabulary
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

    rows = [
        ["contender", "CPU", "/ torch", "passes", "/ torch", "sent", "/ torch", "/ formula", "stored", "n x", "loss"]
    ]
    for name in CONTENDERS:
        pairs = zip(rounds[0][name][0]["losses"], rounds[0]["torch"][0]["losses"], strict=True)
        rows.append([name])
        for what in ("cpu", "passes"):
            rows[-1] += [f"{number(name, what):.0f}", f"{number(name, what, 'torch'):.2f}"]
        total, stored = number(name, "sent"), number(name, "stored")
        rows[-1] += [f"{total / MB:.1f}", f"{number(name, 'sent', 'torch'):.3f}"]
        rows[-1] += [f"{total / formula(shape, processes):.3f}", f"{stored / MB:.0f}"]
        rows[-1] += [
            f"{stored * processes / (4 * BYTES * parameters):.3f}",
            f"{max(abs(a - b) / b for a, b in pairs):.0e}",
        ]
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

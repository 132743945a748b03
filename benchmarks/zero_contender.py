"""One process of one contender of `benchmarks/zero.py`, which starts it: trains, and rank 0 writes the results."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from traffic import Traffic
from transformer import Shape, make_batch, make_model, make_optimizer

WARM_UP = 2
"""Steps that are not measured: the first makes optimizer state, and torch's lazy parts."""


@dataclasses.dataclass(frozen=True)
class Training:
    """What a contender made of the model: `backward` takes the loss, and `step` ends an optimizer step."""

    model: Any
    optimizer: Any
    backward: Callable[[Tensor], Any]
    step: Callable[[], Any]


def by_hand(
    model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[Tensor], Any] = Tensor.backward
) -> Training:
    """A training that steps as torch does."""

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Training(model, optimizer, backward, step)


def torch_ddp(shape: Shape, option: str) -> Training:
    """Torch's DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    model = DistributedDataParallel(make_model(shape), gradient_as_bucket_view=True)
    return by_hand(model, make_optimizer(model))


def shard(model: Any, **options: Any) -> Any:
    """What torch's own tutorial does: each block, then the rest, which is then gathered once a step."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **{**options, "reshard_after_forward": False})


def torch_fsdp2(shape: Shape, option: str) -> Training:
    """Torch's fully_shard."""
    dist.init_process_group("gloo")
    model = shard(make_model(shape), reshard_after_forward=option == "zero3")
    return by_hand(model, make_optimizer(model))


def accel(shape: Shape, option: str) -> Training:
    """This project, with a strategy."""
    from accel import Accelerator

    accelerator = Accelerator(strategies=option, device="cpu", num_processes=int(os.environ["WORLD_SIZE"]))
    model = make_model(shape)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    return by_hand(model, optimizer, accelerator.backward)


def accelerate(shape: Shape, option: str) -> Training:
    """Hugging Face Accelerate; its FSDP has to be forced on a CPU, where it trains by DDP and does not say so."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    plugin = None
    if option == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
        )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    if plugin:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = make_model(shape)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    return by_hand(model, optimizer, accelerator.backward)


def lightning_fabric(shape: Shape, option: str) -> Training:
    """Lightning Fabric."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    size = int(os.environ["WORLD_SIZE"])
    strategy: Any = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)
    if option == "fsdp2":
        strategy = ModelParallelStrategy(
            lambda model, mesh: shard(model, mesh=mesh["data_parallel"]),
            data_parallel_size=size,
            tensor_parallel_size=1,
            process_group_backend="gloo",
        )
    fabric = Fabric(accelerator="cpu", devices=size, strategy=strategy)
    fabric.launch()
    if option == "fsdp2":
        model = fabric.setup_module(make_model(shape))
        return by_hand(model, fabric.setup_optimizers(make_optimizer(model)), fabric.backward)
    plain = make_model(shape)
    model, optimizer = fabric.setup(plain, make_optimizer(plain))
    return by_hand(model, optimizer, fabric.backward)


def deepspeed(shape: Shape, option: str) -> Training:
    """DeepSpeed, with torch's own optimizer; stage 3 with what makes it free gathered parameters after forward."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    zero: dict[str, Any] = {"stage": int(option[-1])}
    if option == "zero3":
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    config = {
        "train_micro_batch_size_per_gpu": shape.batch,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    deepspeed.init_distributed("gloo", verbose=False)
    model = make_model(shape)
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
    return Training(engine, optimizer, engine.backward, engine.step)


CONTENDERS: dict[str, Callable[[Shape, str], Training]] = {
    make.__name__: make for make in (torch_ddp, torch_fsdp2, accel, accelerate, lightning_fabric, deepspeed)
}


def stored(training: Training) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state that this process stores, between backward and step."""
    if hasattr(training.model, "zero_optimization_stage"):
        return stored_by_deepspeed(training)
    parameters = list(training.model.parameters())
    optimizer = getattr(training.optimizer, "optimizer", training.optimizer)
    return {
        "weights": size_of([*parameters, *gathered(training.model)]),
        "gradients": size_of(parameter.grad for parameter in parameters),
        "states": size_of(tensors(optimizer.state)),
    }


def stored_by_deepspeed(training: Training) -> dict[str, int]:
    """The same of an engine of DeepSpeed, which keeps float32 masters and gradients in places of its own."""
    engine, zero = training.model, training.optimizer
    own = list(engine.module.parameters())
    inner = getattr(zero, "optimizer", zero)
    masters = [parameter for group in inner.param_groups for parameter in group["params"]]
    places = ("averaged_gradients", "all_grad_tensors", "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition")
    found = [parameter.grad for parameter in (*own, *masters)]
    for place in places:
        found += tensors(getattr(zero, place, None))
    kept = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    shards = [getattr(parameter, "ds_tensor", None) for parameter in own]
    weights = [*own, *shards, *masters, *(t for name in kept for t in tensors(getattr(zero, name, None)))]
    return {"weights": size_of(weights), "gradients": size_of(found), "states": size_of(tensors(inner.state))}


def tensors(nested: Any) -> Iterator[Tensor]:
    """All tensors in dicts, lists and tuples."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        yield from tensors(list(nested.values()))
    elif isinstance(nested, (list, tuple)):
        for item in nested:
            yield from tensors(item)


def gathered(model: nn.Module) -> Iterator[Tensor]:
    """Whole parameters of a model under `fully_shard`, which have no memory where they have been freed."""
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", object)()
        one = getattr(state, "_fsdp_param_group", None)  # torch 2.11
        for group in getattr(state, "_fsdp_param_groups", [one] if one is not None else []):
            yield from (p._unsharded_param for p in group.fsdp_params if hasattr(p, "_unsharded_param"))


def size_of(found: Iterable[Tensor | None]) -> int:
    """Bytes of the memory behind tensors, each counted once; of a DTensor, this process's part."""
    storages = [getattr(t, "_local_tensor", t).untyped_storage() for t in found if t is not None]
    total = end = 0
    for first, size in sorted((storage.data_ptr(), storage.nbytes()) for storage in storages):
        total += max(first + size - max(first, end), 0)
        end = max(end, first + size)
    return total


def memory(field: str) -> int:
    """Bytes of resident memory, now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def sent() -> int:
    """Bytes that went over the loopback device; of this run alone if it has a network of its own."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])


class Meter:
    """What one process measures of its own steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        gc.collect()
        self.base = memory("VmRSS")
        self.milliseconds: list[float] = []
        self.losses: list[Tensor] = []
        self.stored: dict[str, int] = {}
        forget_peak()

    def train(self, training: Training, shape: Shape, own_network: bool) -> dict[str, Any]:
        """Train; returns what was measured."""
        rank = dist.get_rank()
        for step in range(WARM_UP):
            self._step(training, make_batch(shape, step, rank), look=True)
        built = memory("VmHWM") - self.base
        gc.collect()
        forget_peak()
        dist.barrier()
        start = sent()
        for step in range(WARM_UP, WARM_UP + self.steps):
            before = time.process_time()
            self._step(training, make_batch(shape, step, rank))
            self.milliseconds.append((time.process_time() - before) * 1000)
        dist.barrier()
        bytes_per_step, peak = (sent() - start) / self.steps, memory("VmHWM") - self.base
        if not own_network:
            with Traffic() as traffic:
                self._step(training, make_batch(shape, 0, rank))
            bytes_per_step = traffic.sent * dist.get_world_size()
        return {
            "cpu": statistics.median(self.milliseconds),
            "sent": bytes_per_step,
            "peak": peak,
            "built": built,
            "losses": [float(loss) for loss in self.losses],
            **self.stored,
        }

    def _step(self, training: Training, tokens: Tensor, look: bool = False) -> None:
        loss = training.model(tokens)
        training.backward(loss)
        if look:
            self.stored = stored(training)
        training.step()
        self.losses.append(loss.detach())


def import_all(contender: str) -> None:
    """Import what is imported sooner or later, so that the baseline of memory holds it."""
    import torch.distributed.fsdp

    if contender == "accel":  # which imports its parts when they are used
        importlib.import_module("accel.accelerator")
        importlib.import_module("accel_plugins.strategies.zero.engine")
    elif not contender.startswith("torch_"):
        importlib.import_module(contender)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports half of torch, the first time


def end_worker(result: Any, out: Path) -> NoReturn:
    """Let rank 0 write what each process measured, and end this one; all ranks."""
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # torch's threads can abort a process whose interpreter is torn down under them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("option")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--own-network", action="store_true", help="nobody else uses the loopback device")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import_all(options.contender)
    shape, meter = Shape(**options.shape), Meter(options.steps)
    result = meter.train(CONTENDERS[options.contender](shape, options.option), shape, options.own_network)
    end_worker(result, options.out)


if __name__ == "__main__":
    main()

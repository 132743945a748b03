"""What scripts written for Hugging Face Accelerate use to configure a run, under the names that they use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..config.deepspeed import DeepSpeed
from ..config.fsdp import FSDP
from ..config.translation import PluginOptions, Translation, becomes, only
from ..errors import ConfigError


@dataclass
class GradientAccumulationPlugin(Translation):
    """How many micro-batches make an optimizer step."""

    num_steps: int | None = becomes("gradient_accumulation_steps")
    adjust_scheduler: bool = only(True, "a prepared scheduler moves on only when its optimizer steps")
    sync_with_dataloader: bool = only(True, "the end of a loader always ends the window")
    sync_each_batch: bool = only(False, "gradients are exchanged once a window")


@dataclass
class DataLoaderConfiguration(Translation):
    """How loaders share out their data."""

    split_batches: bool | None = becomes("split_batches")
    dispatch_batches: bool | None = becomes("dispatch_batches")
    even_batches: bool | None = becomes("even_batches")
    data_seed: int | None = becomes("data_seed")
    use_seedable_sampler: bool = only(True, "shuffling is always a function of data_seed and the epoch", False)
    non_blocking: bool = only(False, "whether a copy can overlap with work is found out from the device", True)
    use_stateful_dataloader: bool = only(True, "a prepared loader always keeps its position in save_state", False)


@dataclass
class ProjectConfiguration(Translation):
    """Where a run writes."""

    project_dir: str | os.PathLike[str] | None = None
    logging_dir: str | os.PathLike[str] | None = None
    automatic_checkpoint_naming: bool = only(False, "save_state() names a folder wherever it is given none", True)
    total_limit: int | None = becomes("total_limit")
    iteration: int = only(0, "checkpoints are numbered from the highest that is there")
    save_on_each_node: bool = only(False, "process 0 writes, to a folder that all machines can read")

    def settings(self) -> dict[str, Any]:
        project, logs = (os.fspath(d) if d is not None else None for d in (self.project_dir, self.logging_dir))
        if logs is not None and logs != project:
            raise ConfigError(
                f"ProjectConfiguration.logging_dir: {logs!r} cannot differ from project_dir: {project!r}; "
                "trackers write there too"
            )
        return super().settings() | ({"project_dir": project} if project is not None else {})


@dataclass
class DeepSpeedPlugin(DeepSpeed):
    """A DeepSpeed run, as accel's own strategy for the same ZeRO stage."""

    is_train_batch_min: bool = only(True, "a loader's own batch size counts", False)
    enable_msamp: bool | None = only(None, "there is no MS-AMP precision", False)
    msamp_opt_level: str | None = only(None, "there is no MS-AMP precision")


@dataclass
class FullyShardedDataParallelPlugin(FSDP):
    """A run of torch's FSDP, as accel's strategy that shards as much."""

    mixed_precision_policy: Any = only(None, "say mixed_precision instead")
    state_dict_config: Any = only(None, "get_state_dict gives whole tensors, and save_state decides for itself")
    optim_state_dict_config: Any = only(None, "save_state decides for itself")
    limit_all_gathers: bool = only(True, "the strategy decides when to fetch parameters")
    param_init_fn: Any = only(None, "models are built whole, then prepared")


@dataclass
class DistributedDataParallelKwargs(PluginOptions):
    """Options of torch's DDP, for runs that use it."""

    dim: int = only(0, "a batch is split along its first dimension")
    broadcast_buffers: bool | None = None
    bucket_cap_mb: float | None = None
    find_unused_parameters: bool | None = None
    check_reduction: bool = only(False, "torch ignores it")
    gradient_as_bucket_view: bool | None = None
    static_graph: bool | None = None
    comm_hook: Any = only(None, "gradients are exchanged as they are", "no")
    comm_wrapper: Any = only(None, "gradients are exchanged as they are", "no")
    comm_state_option: Any = only(None, "gradients are exchanged as they are")

    def settings(self) -> dict[str, Any]:
        options = {
            "broadcast_buffers": self.broadcast_buffers,
            "bucket_size": self.bucket_cap_mb,
            "find_unused_parameters": self.find_unused_parameters,
            "gradient_as_bucket_view": self.gradient_as_bucket_view,
            "static_graph": self.static_graph,
        }
        return super().settings() | {"strategies": {"ddp": _given(options)}}


@dataclass
class GradScalerKwargs(PluginOptions):
    """Options of the loss scaler, for runs that scale their losses."""

    init_scale: float | None = None
    growth_factor: float | None = None
    backoff_factor: float | None = None
    growth_interval: int | None = None
    enabled: bool = only(True, "float16 gradients vanish without loss scaling")

    def settings(self) -> dict[str, Any]:
        options = {
            "initial_scale": self.init_scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
        }
        return super().settings() | {"mixed_precision": {"fp16": _given(options)}}


@dataclass
class AutocastKwargs(Translation):
    """How forward passes are autocast."""

    enabled: bool = only(True, "say mixed_precision='no' instead")
    cache_enabled: bool | None = only(None, "torch's cache of cast weights is always on", True)


@dataclass
class InitProcessGroupKwargs(Translation):
    """How processes find each other."""

    backend: str | None = only(None, "the device decides: nccl for cuda, gloo for cpu")
    init_method: str | None = only(None, "the launcher tells each process where to meet")
    timeout: timedelta | None = None

    def settings(self) -> dict[str, Any]:
        return super().settings() | ({"timeout": self.timeout.total_seconds()} if self.timeout is not None else {})


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}

"""What scripts written for Hugging Face Accelerate use to configure a run, under the names that they use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..errors import ConfigError
from .deepspeed import read_deepspeed, zero_strategy
from .translation import PluginOptions, Translation, becomes, only

_NO_OFFLOAD = "parameters and optimizer state stay on the device"


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
class DeepSpeedPlugin(Translation):
    """A DeepSpeed run, as accel's own strategy for the same ZeRO stage."""

    hf_ds_config: Any = None
    gradient_accumulation_steps: int | None = becomes("gradient_accumulation_steps")
    gradient_clipping: float | str | None = only(
        None, "call accelerator.clip_grad_norm_ before optimizer.step()", "auto"
    )
    zero_stage: int | None = None
    is_train_batch_min: bool = only(True, "a loader's own batch size counts", False)
    offload_optimizer_device: str | None = only(None, _NO_OFFLOAD, "none")
    offload_param_device: str | None = only(None, _NO_OFFLOAD, "none")
    offload_optimizer_nvme_path: str | None = only(None, _NO_OFFLOAD, "none")
    offload_param_nvme_path: str | None = only(None, _NO_OFFLOAD, "none")
    zero3_init_flag: bool | None = only(None, "models are built whole, then prepared", False)
    zero3_save_16bit_model: bool | None = only(None, "get_state_dict gives the master weights", False)
    transformer_moe_cls_names: str | None = only(None, "which layers are experts is up to the strategy")
    enable_msamp: bool | None = only(None, "there is no MS-AMP precision", False)
    msamp_opt_level: str | None = only(None, "there is no MS-AMP precision")

    def settings(self) -> dict[str, Any]:
        """`{"strategies": {"zero2": {}}, ...}`; stage 0 is `ddp`, and stage 2 is the default."""
        own, file = super().settings(), read_deepspeed(self.hf_ds_config)
        if self.zero_stage is not None or "strategies" not in file:
            own["strategies"] = zero_strategy(
                2 if self.zero_stage is None else self.zero_stage, "DeepSpeedPlugin.zero_stage"
            )
        for key in own.keys() & file.keys():
            if own[key] != file[key]:
                raise ConfigError(
                    f"DeepSpeedPlugin: {key} is {own[key]!r} by argument and {file[key]!r} by hf_ds_config; keep one"
                )
        return {**file, **own}


@dataclass
class FullyShardedDataParallelPlugin(Translation):
    """A run of torch's FSDP, as accel's strategy that shards as much."""

    fsdp_version: int = only(2, "both versions' ways to shard are strategies here", 1)
    sharding_strategy: Any = None
    reshard_after_forward: Any = None
    backward_prefetch: Any = only(None, "the strategy decides when to fetch parameters")
    mixed_precision_policy: Any = only(None, "say mixed_precision instead")
    auto_wrap_policy: Any = only(None, "the strategy decides what is gathered together")
    cpu_offload: Any = only(False, _NO_OFFLOAD, None)
    ignored_modules: Any = only(None, "all of a prepared model is sharded")
    state_dict_type: Any = only(None, "get_state_dict gives whole tensors, and save_state decides for itself")
    state_dict_config: Any = only(None, "get_state_dict gives whole tensors, and save_state decides for itself")
    optim_state_dict_config: Any = only(None, "save_state decides for itself")
    limit_all_gathers: bool = only(True, "the strategy decides when to fetch parameters")
    use_orig_params: bool | None = only(None, "parameters keep their names", True)
    param_init_fn: Any = only(None, "models are built whole, then prepared")
    sync_module_states: bool | None = only(None, "weights are always broadcast from process 0", True)
    forward_prefetch: bool | None = only(None, "the strategy decides when to fetch parameters", False)
    activation_checkpointing: bool | None = only(None, "use torch.utils.checkpoint in the model", False)
    cpu_ram_efficient_loading: bool | None = only(None, "models are built whole, then prepared", False)
    transformer_cls_names_to_wrap: Any = only(None, "the strategy decides what is gathered together")
    min_num_params: int | None = only(None, "the strategy decides what is gathered together")

    def settings(self) -> dict[str, Any]:
        """`{"strategies": {"zero3": {}}}` where parameters are freed after forward, else `zero2`; NO_SHARD is `ddp`."""
        asked = self.reshard_after_forward if self.sharding_strategy is None else self.sharding_strategy
        names = {
            "FULL_SHARD": 3,
            "1": 3,
            "TRUE": 3,
            "NONE": 3,
            "SHARD_GRAD_OP": 2,
            "2": 2,
            "FALSE": 2,
            "NO_SHARD": 0,
            "3": 0,
        }
        name = str(getattr(asked, "name", asked)).upper()
        if name not in names:
            raise ConfigError(
                f"FullyShardedDataParallelPlugin.sharding_strategy: {asked!r} cannot be honoured; "
                "FULL_SHARD, SHARD_GRAD_OP and NO_SHARD can"
            )
        where = "FullyShardedDataParallelPlugin.sharding_strategy"
        return super().settings() | {"strategies": zero_strategy(names[name], where)}


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

"""Other libraries' configuration objects: what they become, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import accel
from accel import (
    AutocastKwargs,
    Config,
    ConfigError,
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from accel.compat.accelerator import translate
from accel.config.translation import Translation, combine


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        (DeepSpeedPlugin(), {"strategies": {"zero2": {}}}),
        (DeepSpeedPlugin(zero_stage=0), {"strategies": {"ddp": {}}}),
        (
            DeepSpeedPlugin(zero_stage=3, gradient_accumulation_steps=4),
            {"strategies": {"zero3": {}}, "gradient_accumulation_steps": 4},
        ),
        (DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 1}}), {"strategies": {"zero1": {}}}),
        (FullyShardedDataParallelPlugin(), {"strategies": {"zero3": {}}}),
        (FullyShardedDataParallelPlugin(sharding_strategy="SHARD_GRAD_OP"), {"strategies": {"zero2": {}}}),
        (FullyShardedDataParallelPlugin(reshard_after_forward=False), {"strategies": {"zero2": {}}}),
        (FullyShardedDataParallelPlugin(sharding_strategy="NO_SHARD"), {"strategies": {"ddp": {}}}),
        (
            FullyShardedDataParallelPlugin(cpu_offload=True, activation_checkpointing=True),
            {"strategies": {"zero3": {"offload": "cpu", "activation_checkpointing": "full"}}},
        ),
        (
            DeepSpeedPlugin(zero_stage=3, offload_param_device="cpu", gradient_accumulation_steps="auto"),
            {"strategies": {"zero3": {"offload": "cpu"}}},
        ),
        (GradientAccumulationPlugin(num_steps=3), {"gradient_accumulation_steps": 3}),
        (GradientAccumulationPlugin(), {}),
        (DataLoaderConfiguration(), {}),
        (DataLoaderConfiguration(split_batches=True, data_seed=3), {"split_batches": True, "data_seed": 3}),
        (DataLoaderConfiguration(use_seedable_sampler=True, non_blocking=True, use_stateful_dataloader=True), {}),
        (ProjectConfiguration(project_dir="runs"), {"project_dir": "runs"}),
        (ProjectConfiguration(project_dir=Path("runs"), logging_dir="runs"), {"project_dir": "runs"}),
        (ProjectConfiguration(automatic_checkpoint_naming=True, total_limit=3), {"total_limit": 3}),
        (ProjectConfiguration(), {}),
        (InitProcessGroupKwargs(timeout=timedelta(minutes=2)), {"timeout": 120.0}),
        (InitProcessGroupKwargs(), {}),
        (AutocastKwargs(), {}),
        (GradScalerKwargs(init_scale=8.0), {"mixed_precision": {"fp16": {"initial_scale": 8.0}}}),
        (DistributedDataParallelKwargs(bucket_cap_mb=5), {"strategies": {"ddp": {"bucket_size": 5}}}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_settings(given: Translation, settings: dict[str, Any]) -> None:
    assert given.settings() == settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (DeepSpeedPlugin(zero_stage=4), "DeepSpeedPlugin.zero_stage: must be 0, 1, 2 or 3, got 4"),
        (DeepSpeedPlugin(gradient_clipping=1.0), "DeepSpeedPlugin.gradient_clipping: 1.0 cannot.*clip_grad_norm_"),
        (DeepSpeedPlugin(offload_optimizer_device="nvme"), "DeepSpeedPlugin.offload_optimizer_device: 'nvme' cannot"),
        (
            DeepSpeedPlugin(zero_stage=2, hf_ds_config={"zero_optimization": {"stage": 3}}),
            "{'zero2': {}} from DeepSpeedPlugin contradicts {'zero3': {}} from DeepSpeedPlugin.hf_ds_config",
        ),
        (FullyShardedDataParallelPlugin(sharding_strategy="HYBRID_SHARD"), "sharding_strategy: 'HYBRID_SHARD' cannot"),
        (
            FullyShardedDataParallelPlugin(cpu_offload="disk"),
            "FullyShardedDataParallelPlugin.cpu_offload: 'disk' cannot",
        ),
        (
            FullyShardedDataParallelPlugin(sharding_strategy="FULL_SHARD", reshard_after_forward=False),
            "sharding_strategy: 'FULL_SHARD' contradicts .*reshard_after_forward: False; keep one",
        ),
        (GradientAccumulationPlugin(sync_with_dataloader=False), "sync_with_dataloader: False cannot be honoured"),
        (ProjectConfiguration(project_dir="a", logging_dir="b"), "ProjectConfiguration.logging_dir: 'b' cannot differ"),
        (ProjectConfiguration(iteration=3), "ProjectConfiguration.iteration: 3 cannot"),
        (InitProcessGroupKwargs(backend="mpi"), "InitProcessGroupKwargs.backend: 'mpi' cannot.*device decides"),
        (AutocastKwargs(enabled=False), "AutocastKwargs.enabled: False cannot"),
        (GradScalerKwargs(enabled=False), "GradScalerKwargs.enabled: False cannot"),
        (DistributedDataParallelKwargs(comm_hook="fp16"), "DistributedDataParallelKwargs.comm_hook: 'fp16' cannot"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refusals_name_the_field(given: Translation, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        given.settings()


def test_deepspeed_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 10, "loss_scale_window": 7, "min_loss_scale": 2}
    content = {"train_batch_size": "auto", "fp16": fp16, "gradient_accumulation_steps": 2, "bf16": {"enabled": "auto"}}
    file.write_text(json.dumps(content))
    options = {"initial_scale": 1024.0, "growth_interval": 7, "minimum_scale": 2}
    assert DeepSpeedPlugin(hf_ds_config=str(file), zero_stage=0).settings() == {
        "strategies": {"ddp": {}},
        "gradient_accumulation_steps": 2,
        "mixed_precision": {"fp16": options},
    }
    static = DeepSpeedPlugin(hf_ds_config={"fp16": {"enabled": True, "loss_scale": 128}}).settings()
    assert static["mixed_precision"] == {"fp16": {"initial_scale": 128, "dynamic": False}}
    assert DeepSpeedPlugin(hf_ds_config={"bf16": {"enabled": True}}).settings()["mixed_precision"] == "bf16"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, 'train_micro_batch_size_per_gpu: use "auto"'),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: make the optimizer in the script"),
        (
            {"zero_optimization": {"stage": 2, "overlap_comm": True}},
            "zero_optimization.overlap_comm: has no counterpart",
        ),
        ({"fp16": {"enabled": True, "auto_cast": True}}, "fp16.auto_cast: has no counterpart"),
        ({"zero_optimization": {"stage": "two"}}, "hf_ds_config.zero_optimization.stage: must be 0, 1, 2 or 3"),
    ],
)
def test_deepspeed_refusals(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeepSpeedPlugin(hf_ds_config=content).settings()


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_deepspeed_file_that_is_none(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"hf_ds_config: .*ds\.json"):
        DeepSpeedPlugin(hf_ds_config=file).settings()


def test_options_go_to_the_plugin_in_use_and_keep_what_the_config_says() -> None:
    config = Config.parse({"strategies": {"ddp": {"static_graph": False, "bucket_size": 9}}, "mixed_precision": "bf16"})
    handlers = {"a": DistributedDataParallelKwargs(static_graph=True), "b": GradScalerKwargs(init_scale=2.0)}
    result = translate(config, {}, handlers)
    assert result.strategies[0].dump() == {"ddp": {"static_graph": True, "bucket_size": 9}}
    assert result.mixed_precision.dump() == "bf16"
    result = translate(config, {"mixed_precision": "fp16"}, handlers)
    assert result.mixed_precision.dump() == {"fp16": {"initial_scale": 2.0}}


def test_contradictions_name_both_sources() -> None:
    given = {"gradient_accumulation_steps": 2}
    with pytest.raises(ConfigError, match="2 from Accelerator contradicts 4 from DeepSpeedPlugin"):
        translate(Config(), given, {"deepspeed_plugin": DeepSpeedPlugin(gradient_accumulation_steps=4)})
    assert combine([("a", given), ("b", given)]) == given


@pytest.mark.parametrize("value", [object(), "ddp", {"zero_stage": 2}])
def test_foreign_objects_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="deepspeed_plugin: expected one of accel's own objects, got"):
        translate(Config(), {}, {"deepspeed_plugin": value})


def test_a_strategy_that_is_not_installed_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"strategies: no strategy named 'zero4' is installed; there are: .*ddp"):
        accel.Accelerator(strategies="zero4")


def test_importing_names_costs_no_torch() -> None:
    code = (
        "import sys, accel; from accel import DeepSpeedPlugin, Config, ConfigError; DeepSpeedPlugin(zero_stage=3); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0


def test_every_public_name_resolves() -> None:
    assert all(getattr(accel, name) is not None for name in accel.__all__)
    assert set(dir(accel)) == set(accel.__all__)
    with pytest.raises(AttributeError, match="module 'accel' has no attribute 'accelerate'"):
        _ = accel.accelerate

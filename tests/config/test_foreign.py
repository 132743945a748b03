"""Config files that Hugging Face's `accelerate config` wrote: what they become, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from accel.cli import main
from accel.config import Config, read_file, resolve
from accel.errors import ConfigError

GPUS = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_GPU
downcast_bf16: 'no'
enable_cpu_affinity: false
gpu_ids: all
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 4
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
"""Word for word what its wizard writes for several GPUs; the other kinds of runs differ as below."""

DEEPSPEED = {
    "gradient_accumulation_steps": 4,
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "zero3_init_flag": False,
    "zero_stage": 2,
}
FSDP1 = {
    "fsdp_activation_checkpointing": False,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_backward_prefetch": "BACKWARD_PRE",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_forward_prefetch": False,
    "fsdp_offload_params": False,
    "fsdp_reshard_after_forward": "FULL_SHARD",
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_sync_module_states": True,
    "fsdp_transformer_layer_cls_to_wrap": "BertLayer",
    "fsdp_use_orig_params": True,
    "fsdp_version": 1,
}
FSDP2 = {
    "fsdp_activation_checkpointing": False,
    "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_min_num_params": 100000000,
    "fsdp_offload_params": False,
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_version": 2,
}
PARALLEL = {
    "parallelism_config_dp_replicate_size": 1,
    "parallelism_config_dp_shard_size": 4,
    "parallelism_config_tp_size": 1,
    "parallelism_config_cp_size": 1,
}
OWN = {"num_processes": 4, "mixed_precision": "bf16"}
"""What the file above says, besides the kind of run."""


def deepspeed(**section: Any) -> dict[str, Any]:
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": DEEPSPEED | section}


def fsdp(**section: Any) -> dict[str, Any]:
    return {"distributed_type": "FSDP", "fsdp_config": FSDP2 | section}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write the file above with some keys changed; those that become `...` are left out."""

    def write_file(**changes: Any) -> Path:
        values = {key: value for key, value in (yaml.safe_load(GPUS) | changes).items() if value is not ...}
        path = tmp_path / "default_config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write_file


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, OWN | {"device": "cuda", "strategies": "ddp"}),
        ({"distributed_type": "MULTI_CPU", "use_cpu": True}, OWN | {"device": "cpu", "strategies": "ddp"}),
        ({"distributed_type": "MULTI_XPU"}, OWN | {"device": "xpu", "strategies": "ddp"}),
        ({"distributed_type": "NO", "num_processes": 1}, {"mixed_precision": "bf16"}),
        ({"distributed_type": "NO", "num_processes": 1, "use_cpu": True}, {"mixed_precision": "bf16", "device": "cpu"}),
        ({"distributed_type": ..., "num_processes": ...}, {"mixed_precision": "bf16"}),
        (deepspeed(), OWN | {"strategies": "zero2", "gradient_accumulation_steps": 4}),
        (deepspeed(zero_stage=0), OWN | {"strategies": "ddp", "gradient_accumulation_steps": 4}),
        (deepspeed(zero_stage=1, gradient_accumulation_steps="auto"), OWN | {"strategies": "zero1"}),
        (
            deepspeed(zero_stage=3, offload_param_device="cpu", deepspeed_multinode_launcher="standard"),
            OWN | {"strategies": {"zero3": {"offload": "cpu"}}, "gradient_accumulation_steps": 4},
        ),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": ...}, OWN | {"strategies": "zero2"}),
        (fsdp(), OWN | {"strategies": "zero3"}),
        (fsdp() | {"use_cpu": True}, OWN | {"strategies": "zero3", "device": "cpu"}),
        (fsdp() | {"parallelism_config": PARALLEL}, OWN | {"strategies": "zero3"}),
        (fsdp(fsdp_reshard_after_forward=False), OWN | {"strategies": "zero2"}),
        (fsdp(fsdp_reshard_after_forward="false"), OWN | {"strategies": "zero2"}),
        (
            fsdp(fsdp_offload_params=True, fsdp_activation_checkpointing=True),
            OWN | {"strategies": {"zero3": {"offload": "cpu", "activation_checkpointing": "full"}}},
        ),
        ({"distributed_type": "FSDP", "fsdp_config": FSDP1}, OWN | {"strategies": "zero3"}),
        (
            {"distributed_type": "FSDP", "fsdp_config": FSDP1 | {"fsdp_reshard_after_forward": "SHARD_GRAD_OP"}},
            OWN | {"strategies": "zero2"},
        ),
        (
            {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29500},
            OWN
            | {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
            | {"device": "cuda", "strategies": "ddp"},
        ),
        ({"main_process_port": 0, "same_network": False}, OWN | {"device": "cuda", "strategies": "ddp"}),
        ({"debug": True, "dynamo_config": {}, "fp8_config": {}}, OWN | {"device": "cuda", "strategies": "ddp"}),
        ({"dynamo_config": {"dynamo_backend": "NO"}}, OWN | {"device": "cuda", "strategies": "ddp"}),
    ],
)  # fmt: skip
def test_files_of_all_kinds(write: Any, changes: dict[str, Any], settings: dict[str, Any]) -> None:
    assert Config.parse(read_file(write(**changes))) == Config.parse(settings)


@pytest.mark.parametrize("word", ["no", "'no'", "False"])
def test_no_mixed_precision_however_written(tmp_path: Path, word: str) -> None:
    path = tmp_path / "hf.yaml"
    path.write_text(f"distributed_type: NO\nmixed_precision: {word}\n")
    assert resolve(path, environ={}).config == Config()


def test_a_json_file_too(tmp_path: Path) -> None:
    path = tmp_path / "default_config.json"
    path.write_text(json.dumps(yaml.safe_load(GPUS), indent=2))
    assert read_file(path)["num_processes"] == 4


def test_a_deepspeed_json_beside_it(write: Any, tmp_path: Path) -> None:
    json_file = tmp_path / "ds.json"
    json_file.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}))
    section = {"deepspeed_config_file": str(json_file), "zero3_init_flag": False}
    changes: dict[str, Any] = {"distributed_type": "DEEPSPEED", "deepspeed_config": section, "mixed_precision": ...}
    assert Config.parse(read_file(write(**changes))) == Config.parse(OWN | {"strategies": "zero3"})
    with pytest.raises(ConfigError, match="'fp16' from the file contradicts 'bf16' from deepspeed_config"):
        read_file(write(**changes | {"mixed_precision": "fp16"}))
    json_file.write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    with pytest.raises(
        ConfigError, match=r"deepspeed_config\.deepspeed_config_file: cannot be honoured: optimizer: make"
    ):
        read_file(write(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"compute_environment": "AMAZON_SAGEMAKER", "ec2_instance_type": "ml.p3", "distributed_type": "NO"},
            "compute_environment: 'AMAZON_SAGEMAKER' cannot be honoured, only 'LOCAL_MACHINE': run `accel ",
        ),
        ({"distributed_type": "XLA"}, "distributed_type: 'XLA' cannot be honoured, only 'NO': there are NO, "),
        ({"distributed_type": ["NO"]}, "distributed_type: \"['NO']\" cannot be honoured"),
        ({"distributed_type": "NO"}, "num_processes: 4 contradicts distributed_type: 'NO', which is one process"),
        ({"num_processes": -1}, "num_processes: must be given with distributed_type: 'MULTI_GPU', got -1; the flag"),
        ({"num_processes": ...}, "num_processes: must be given with distributed_type: 'MULTI_GPU', got None"),
        ({"use_cpu": True}, "use_cpu: contradicts distributed_type: 'MULTI_GPU'; MULTI_CPU"),
        ({"gpu_ids": "0,1"}, "gpu_ids: '0,1' cannot be honoured, only 'all': set the environment variable "),
        ({"enable_cpu_affinity": True}, "enable_cpu_affinity: True cannot be honoured, only False: start"),
        ({"rdzv_backend": "c10d"}, "rdzv_backend: 'c10d' cannot be honoured, only 'static': give each machine"),
        ({"main_training_function": "train"}, "main_training_function: 'train' cannot be honoured, only 'main'"),
        ({"downcast_bf16": "yes"}, "downcast_bf16: 'yes' cannot be honoured, only 'no'"),
        ({"tpu_use_cluster": True}, "tpu_use_cluster: True cannot be honoured, only False"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_config.dynamo_backend: 'INDUCTOR' cannot"),
        ({"mpirun_config": {"mpirun_hostfile": "h"}}, "mpirun_config: {'mpirun_hostfile': 'h'} cannot be honoured"),
        ({"deepspeed_config": DEEPSPEED}, "deepspeed_config: is for distributed_type: 'DEEPSPEED', got 'MULTI_GPU'"),
        (deepspeed(gradient_clipping=1.0), "deepspeed_config.gradient_clipping: 1.0 cannot be honoured, only None: "),
        (deepspeed(zero_stage=4), "deepspeed_config.zero_stage: must be 0, 1, 2 or 3, got 4"),
        (deepspeed(zero3_init_flag=True), "deepspeed_config.zero3_init_flag: True cannot be honoured"),
        (deepspeed(offload_param_device="nvme"), "deepspeed_config.offload_param_device: 'nvme' cannot be honoured"),
        (deepspeed(deepspeed_multinode_launcher="pdsh"), "deepspeed_config.deepspeed_multinode_launcher: 'pdsh' "),
        (deepspeed(deepspeed_moe_layer_cls_names="A"), "deepspeed_config.deepspeed_moe_layer_cls_names: 'A' cannot"),
        (deepspeed(zero_stag=2), "deepspeed_config.zero_stag: no such setting; did you mean 'zero_stage'?"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": "ds.json"}, "deepspeed_config: expected a mapping"),
        (fsdp(fsdp_version=3), "fsdp_config.fsdp_version: 3 cannot be honoured"),
        (fsdp(fsdp_reshard_after_forward="HYBRID_SHARD"), "fsdp_config.fsdp_reshard_after_forward: 'HYBRID_SHARD' "),
        (fsdp(fsdp_sharding_strategy="NO_SHARD"), "fsdp_config.fsdp_sharding_strategy: 'NO_SHARD' contradicts"),
        (fsdp(fsdp_state_dict_type="LOCAL_STATE_DICT"), "fsdp_config.fsdp_state_dict_type: 'LOCAL_STATE_DICT' cannot"),
        (fsdp(fsdp_sync_module_states=False), "fsdp_config.fsdp_sync_module_states: False cannot"),
        (fsdp(fsdp_activation_checkpointing_offload=True), "fsdp_config.fsdp_activation_checkpointing_offload: True"),
        (
            fsdp() | {"parallelism_config": PARALLEL | {"parallelism_config_tp_size": 2}},
            "parallelism_config.parallelism_config_tp_size: 2 cannot be honoured, only 1: a file of accel's own can",
        ),
        (
            fsdp() | {"parallelism_config": PARALLEL | {"parallelism_config_dp_shard_size": 2}},
            "parallelism_config.parallelism_config_dp_shard_size: 2 contradicts num_processes: 4",
        ),
        ({"num_procesess": 2}, "num_procesess: no such setting; did you mean 'num_processes'?"),
    ],
)  # fmt: skip
def test_refusals_name_path_value_and_what_would_work(write: Any, changes: dict[str, Any], message: str) -> None:
    path = write(**changes)
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(f" (from {path})")


def test_all_that_cannot_be_honoured_is_told_at_once(write: Any) -> None:
    section = {"gradient_clipping": 1.0, "zero3_init_flag": True}
    with pytest.raises(ConfigError) as caught:
        read_file(write(**deepspeed(**section), gpu_ids="0", use_cpu="maybe"))
    for path in ("gpu_ids", "use_cpu", "deepspeed_config.gradient_clipping", "deepspeed_config.zero3_init_flag"):
        assert f"{path}: " in str(caught.value)


def test_flags_and_environment_have_the_last_word(write: Any) -> None:
    resolved = resolve(write(), {"num_processes": 2}, {"ACCEL_DEVICE": "cpu"})
    assert (resolved.config.num_processes, str(resolved.config.device and resolved.config.device.name)) == (2, "cpu")


@pytest.mark.parametrize(
    "changes",
    [deepspeed(offload_optimizer_device="cpu"), fsdp(fsdp_offload_params=True, fsdp_activation_checkpointing=True)],
)
def test_strategies_have_the_options_that_files_ask_for(write: Any, changes: dict[str, Any]) -> None:
    assert main(["config", "validate", str(write(**changes))]) == 0


def test_what_is_not_installed_is_refused_by_name(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", str(write(distributed_type="MULTI_SDAA"))]) == 2
    assert "device: no device named 'sdaa' is installed; there are: " in capsys.readouterr().err


def test_show_names_the_file_as_the_origin(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write()
    assert main(["config", "show", "--config_file", str(path)]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert lines["num_processes"] == ["4", str(path)]
    assert lines["device"] == ["cuda", str(path)]
    assert lines["mixed_precision"] == ["bf16", str(path)]
    assert lines["data_seed"] == ["0", "default"]


def test_set_writes_a_file_of_our_own(write: Any) -> None:
    path = write(distributed_type="MULTI_CPU", use_cpu=True, mixed_precision="no")
    assert main(["config", "set", "--config_file", str(path), "num_processes=2"]) == 0
    written = yaml.safe_load(path.read_text())
    assert Config.parse(written) == Config().replace(num_processes=2, device="cpu")
    assert "distributed_type" not in written

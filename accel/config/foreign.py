"""Config files that Hugging Face's `accelerate config` wrote, in terms of our settings.

What means nothing here is accepted where leaving it out changes no result; what cannot be honoured is refused, all
of it at once. Names of devices and strategies are checked by whoever loads them, like those in our own files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .deepspeed import DeepSpeed, zero_strategy
from .fsdp import FSDP
from .translation import Translation, becomes, combine, only

_DEVICES = {
    "MULTI_CPU": "cpu",
    "MULTI_GPU": "cuda",
    **{f"MULTI_{name.upper()}": name for name in ("xpu", "npu", "mlu", "sdaa", "musa", "hpu", "neuron")},
}
"""The device of each kind of run that is plain data parallelism."""

_QUOTED = {"true": True, "false": False, "none": None, "null": None}
"""What files written by hand may have in quotes."""

_KINDS = f"there are NO, {', '.join(_DEVICES)}, DEEPSPEED and FSDP"
_OWN = "a file of accel's own can say"
_COMPILE = "call torch.compile on the model in the script"
_EACH_MACHINE = "run `accel launch` once on each machine"
_VISIBLE = "set the environment variable CUDA_VISIBLE_DEVICES on each machine"
_TPU = "there is no launcher for TPUs"


@dataclass
class _DeepSpeedSection(DeepSpeed):
    section = "deepspeed_config"
    renamed = {
        "hf_ds_config": "deepspeed_config_file",
        "transformer_moe_cls_names": "deepspeed_moe_layer_cls_names",
    }

    deepspeed_multinode_launcher: Any = only("standard", _EACH_MACHINE, None)
    deepspeed_hostfile: Any = only(None, _EACH_MACHINE)
    deepspeed_exclusion_filter: Any = only(None, _VISIBLE)
    deepspeed_inclusion_filter: Any = only(None, _VISIBLE)


@dataclass
class _FSDPSection(FSDP):
    section = "fsdp_config"
    prefix = "fsdp_"
    renamed = {"cpu_offload": "offload_params", "transformer_cls_names_to_wrap": "transformer_layer_cls_to_wrap"}


@dataclass
class _ParallelismSection(Translation):
    """Degrees of parallelism beside that of FSDP, which takes the processes that are left."""

    section = "parallelism_config"
    prefix = "parallelism_config_"

    dp_replicate_size: Any = only(1, f"{_OWN} `strategies: {{zero3: {{replicas: N}}}}`")
    dp_shard_size: Any = None
    tp_size: Any = only(1, f"{_OWN} `strategies: {{tensor: {{size: N}}, zero3: {{}}}}`")
    cp_size: Any = only(1, "long sequences are not divided")
    cp_backend: Any = None
    cp_comm_strategy: Any = None
    sp_size: Any = only(1, "long sequences are not divided")
    sp_backend: Any = None
    sp_seq_length: Any = None
    sp_seq_length_is_variable: Any = None
    sp_attn_implementation: Any = None


@dataclass
class _DynamoSection(Translation):
    section = "dynamo_config"
    prefix = "dynamo_"

    backend: Any = only("NO", _COMPILE, "no", False, None)
    mode: Any = None
    use_fullgraph: Any = None
    use_dynamic: Any = None
    use_regional_compilation: Any = None


_SECTIONS: Mapping[str, tuple[type[Translation], str | None]] = {
    "deepspeed_config": (_DeepSpeedSection, "DEEPSPEED"),
    "fsdp_config": (_FSDPSection, "FSDP"),
    "parallelism_config": (_ParallelismSection, "FSDP"),
    "dynamo_config": (_DynamoSection, None),
}
"""What reads each section, and the one kind of run that it is for."""


@dataclass
class _File(Translation):
    section = ""

    compute_environment: Any = only("LOCAL_MACHINE", _EACH_MACHINE)
    distributed_type: Any = only("NO", _KINDS, *_DEVICES, "DEEPSPEED", "FSDP")
    num_processes: Any = becomes("num_processes")
    num_machines: Any = becomes("num_machines")
    machine_rank: Any = becomes("machine_rank")
    main_process_ip: Any = becomes("main_process_ip")
    main_process_port: Any = becomes("main_process_port")
    mixed_precision: Any = becomes("mixed_precision")
    use_cpu: Any = only(False, "it is true or false", True)
    debug: Any = only(False, "it is true or false; shapes are checked either way", True)
    gpu_ids: Any = only("all", _VISIBLE, None)
    enable_cpu_affinity: Any = only(False, "start `accel launch` under numactl")
    rdzv_backend: Any = only("static", "give each machine its machine_rank; they meet at main_process_ip", None)
    same_network: Any = only(True, "it is true or false; machines meet at main_process_ip either way", False)
    main_training_function: Any = only("main", "the script is run as it is")
    downcast_bf16: Any = only("no", _TPU, False)
    deepspeed_config: Any = None
    fsdp_config: Any = None
    parallelism_config: Any = None
    dynamo_config: Any = None
    dynamo_backend: Any = only("NO", _COMPILE, "no", False)
    fp8_config: Any = only(None, f"{_OWN} `mixed_precision: {{NAME: {{OPTION: VALUE}}}}`", {})
    megatron_lm_config: Any = only(None, f"{_OWN} `strategies: {{tensor: {{size: N}}, ddp: {{}}}}`", {})
    mpirun_config: Any = only(None, _EACH_MACHINE, {})
    tpu_name: Any = only(None, _TPU)
    tpu_zone: Any = only(None, _TPU)
    tpu_use_cluster: Any = only(False, _TPU)
    tpu_use_sudo: Any = only(False, _TPU)
    tpu_vm: Any = only(None, _TPU, [])
    tpu_env: Any = only(None, _TPU, [])
    commands: Any = only(None, _TPU, [])
    command_file: Any = only(None, _TPU)

    def settings(self) -> dict[str, Any]:
        """The settings of the file and its sections. Raises ConfigError naming all that cannot be honoured."""
        parts: list[tuple[str, Callable[[], dict[str, Any]]]] = [("the file", super().settings)]
        parts += [("distributed_type", self._run), ("num_processes", self._processes)]
        parts += [(name, functools.partial(self._section, name)) for name in _SECTIONS]
        found, problems = [], []
        for name, settings in parts:
            try:
                found.append((name, settings()))
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("; ".join(problems))
        values = combine(found)
        if values.get("main_process_port") == 0 and values.get("num_machines", 1) == 1:
            del values["main_process_port"]  # that is how it asks for a free port
        return values

    def _run(self) -> dict[str, Any]:
        """The device and the strategy of this kind of run; engines have sections of their own."""
        device = _DEVICES.get(self.distributed_type, "cpu" if self.use_cpu else None)
        if self.use_cpu and device != "cpu":
            raise ConfigError(
                f"use_cpu: contradicts distributed_type: {self.distributed_type!r}; MULTI_CPU is the CPU's"
            )
        strategies = {"strategies": zero_strategy(0, "")} if self.distributed_type in _DEVICES else {}
        return strategies | ({"device": device} if device else {})

    def _processes(self) -> dict[str, Any]:
        """No settings; raises ConfigError unless there are as many processes as this kind of run has."""
        if self.distributed_type == "NO" and self.num_processes not in (None, 1):
            raise ConfigError(
                f"num_processes: {self.num_processes!r} contradicts distributed_type: 'NO', which is one process; "
                "MULTI_GPU and MULTI_CPU are several"
            )
        if self.distributed_type != "NO" and self.num_processes in (None, -1):
            raise ConfigError(
                f"num_processes: must be given with distributed_type: {self.distributed_type!r}, got "
                f"{self.num_processes!r}; the flag --num_processes has the last word"
            )
        return {}

    def _section(self, name: str) -> dict[str, Any]:
        """The settings of a section; an engine has some even if its section says nothing."""
        kind, values = self.distributed_type, getattr(self, name) or {}
        reader, wanted = _SECTIONS[name]
        if wanted not in (None, kind):
            if values:
                raise ConfigError(
                    f"{name}: is for distributed_type: {wanted!r}, got {kind!r}; change that, or remove it"
                )
            return {}
        section = reader.read(values)
        if isinstance(section, _ParallelismSection) and section.dp_shard_size not in (None, self.num_processes):
            raise ConfigError(
                f"{section.where('dp_shard_size')}: {section.dp_shard_size!r} contradicts num_processes: "
                f"{self.num_processes!r}; make them the same"
            )
        return section.settings()


def is_foreign(values: Mapping[str, Any]) -> bool:
    """Whether a config file's plain values are in the words of Hugging Face's `accelerate config`."""
    return "compute_environment" in values or "distributed_type" in values


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values as plain settings of ours. Raises ConfigError naming all that cannot be honoured."""
    values = {name: _unquote(value) for name, value in values.items()}
    if (where := values.get("compute_environment")) != "LOCAL_MACHINE" and where is not None:
        values = {"compute_environment": where}  # the rest is in words of that environment
    kind = values.get("distributed_type", False)
    values["distributed_type"] = str(kind or "NO")  # which YAML reads as false where it is not in quotes
    return _File.read(values).settings()


def _unquote(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _unquote(one) for key, one in value.items()}
    return _QUOTED.get(value.lower(), value) if isinstance(value, str) else value

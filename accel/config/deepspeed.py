"""What scripts and files say of DeepSpeed, and its own config, as plain settings of ours."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .translation import Translation, becomes, combine, only

_TO_HOST = "what is offloaded goes to the memory of the host: 'cpu'"

_FP16_OPTIONS = {"loss_scale_window": "growth_interval", "hysteresis": "hysteresis", "min_loss_scale": "minimum_scale"}
"""DeepSpeed's names of loss scaling options, and ours."""

_ADVICE = {
    "train_batch_size": 'use "auto": the loader\'s batch size counts',
    "train_micro_batch_size_per_gpu": 'use "auto": the loader\'s batch size counts',
    "gradient_clipping": 'use "auto", and accelerator.clip_grad_norm_ before optimizer.step()',
    "optimizer": "make the optimizer in the script",
    "scheduler": "make the scheduler in the script",
}


@dataclass
class DeepSpeed(Translation):
    """A DeepSpeed run, as accel's own strategy for the same ZeRO stage."""

    hf_ds_config: Any = None
    gradient_accumulation_steps: int | str | None = becomes("gradient_accumulation_steps")
    gradient_clipping: float | str | None = only(
        None, "remove it, and call accelerator.clip_grad_norm_ before optimizer.step()", "auto", 0.0
    )
    zero_stage: int | None = None
    offload_optimizer_device: str | None = only(None, _TO_HOST, "none", "cpu")
    offload_param_device: str | None = only(None, _TO_HOST, "none", "cpu")
    offload_optimizer_nvme_path: str | None = only(None, _TO_HOST, "none")
    offload_param_nvme_path: str | None = only(None, _TO_HOST, "none")
    zero3_init_flag: bool | None = only(None, "models are built whole, then prepared", False)
    zero3_save_16bit_model: bool | None = only(None, "get_state_dict gives the master weights", False)
    transformer_moe_cls_names: str | None = only(None, "which layers are experts is up to the strategy")

    def settings(self) -> dict[str, Any]:
        """`{"strategies": {"zero2": {}}, ...}`; stage 0 is `ddp`, and stage 2 is the default."""
        own, file = super().settings(), read_deepspeed(self.hf_ds_config, self.where("hf_ds_config"))
        if own.get("gradient_accumulation_steps") == "auto":
            del own["gradient_accumulation_steps"]
        offload = "cpu" in (self.offload_optimizer_device, self.offload_param_device)
        if self.zero_stage is not None or offload or "strategies" not in file:
            stage = 2 if self.zero_stage is None else self.zero_stage
            options = {"offload": "cpu"} if offload else {}
            own["strategies"] = zero_strategy(stage, self.where("zero_stage"), options)
        return combine([(self.path(), own), (self.where("hf_ds_config"), file)])


def zero_strategy(stage: Any, path: str, options: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Any]:
    """The strategy that shards as much as ZeRO's `stage` does (Rajbhandari et al. 2020); stage 0 is `ddp`."""
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{path}: must be 0, 1, 2 or 3, got {stage!r}")
    return {f"zero{stage}" if stage else "ddp": dict(options)}


def read_deepspeed(config: Mapping[str, Any] | str | os.PathLike[str] | None, path: str) -> dict[str, Any]:
    """The settings that a DeepSpeed config stands for, JSON file or dict; "auto" says nothing.

    Raises ConfigError, beginning with `path`, that names all that cannot be honoured.
    """
    sections = _known(_read(config, path))
    settings: dict[str, Any] = {}
    zero = sections.pop("zero_optimization", {})
    if "stage" in zero:
        settings["strategies"] = zero_strategy(zero.pop("stage"), f"{path}.zero_optimization.stage")
    if "gradient_accumulation_steps" in sections:
        settings["gradient_accumulation_steps"] = sections.pop("gradient_accumulation_steps")
    fp16, bf16 = sections.pop("fp16", {}), sections.pop("bf16", {})
    left = {**sections, **_prefixed("zero_optimization", zero)}
    if fp16.pop("enabled", False):
        settings["mixed_precision"] = {"fp16": _fp16_options(fp16)}
        left |= _prefixed("fp16", fp16)
    if bf16.pop("enabled", False):
        settings["mixed_precision"] = "bf16"
    _refuse({**left, **_prefixed("bf16", bf16)}, path)
    return settings


def _read(config: Mapping[str, Any] | str | os.PathLike[str] | None, path: str) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return dict(config or {})
    try:
        values = json.loads(Path(config).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {config} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {config} must hold a JSON object, got {type(values).__name__}")
    return values


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what is "auto"."""
    return {k: _known(v) if isinstance(v, Mapping) else v for k, v in values.items() if v != "auto"}


def _fp16_options(section: dict[str, Any]) -> dict[str, Any]:
    """Takes out of an fp16 section what it can say in the options of our `fp16`."""
    options = {ours: section.pop(theirs) for theirs, ours in _FP16_OPTIONS.items() if theirs in section}
    if "initial_scale_power" in section:
        options["initial_scale"] = 2.0 ** section.pop("initial_scale_power")
    if fixed := section.pop("loss_scale", 0):
        options.update(initial_scale=fixed, dynamic=False)
    return options


def _prefixed(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in values.items()}


def _refuse(left: Mapping[str, Any], path: str) -> None:
    if left:
        problems = "; ".join(f"{key}: {_ADVICE.get(key, 'has no counterpart here, remove it')}" for key in left)
        raise ConfigError(f"{path}: cannot be honoured: {problems}")

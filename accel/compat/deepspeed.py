"""Reads a DeepSpeed config, the JSON file or a dict like it, into plain settings of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_FP16_OPTIONS = {"loss_scale_window": "growth_interval", "hysteresis": "hysteresis", "min_loss_scale": "minimum_scale"}
"""DeepSpeed's names of loss scaling options, and ours."""

_ADVICE = {
    "train_batch_size": 'use "auto": the loader\'s batch size counts',
    "train_micro_batch_size_per_gpu": 'use "auto": the loader\'s batch size counts',
    "gradient_clipping": 'use "auto", and accelerator.clip_grad_norm_ before optimizer.step()',
    "optimizer": "make the optimizer in the script",
    "scheduler": "make the scheduler in the script",
}


def read_deepspeed(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    """The settings that a DeepSpeed config stands for; "auto" says nothing.

    Raises ConfigError naming all that cannot be honoured.
    """
    sections = _known(_read(config))
    settings: dict[str, Any] = {}
    zero = sections.pop("zero_optimization", {})
    if "stage" in zero:
        where = "hf_ds_config.zero_optimization.stage"
        settings["strategies"] = zero_strategy(zero.pop("stage"), where, _zero_options(zero))
    if "gradient_accumulation_steps" in sections:
        settings["gradient_accumulation_steps"] = sections.pop("gradient_accumulation_steps")
    fp16, bf16 = sections.pop("fp16", {}), sections.pop("bf16", {})
    if fp16.pop("enabled", False):
        settings["mixed_precision"] = {"fp16": _fp16_options(fp16)}
        _refuse(_prefixed("fp16", fp16))
    if bf16.pop("enabled", False):
        settings["mixed_precision"] = "bf16"
    _refuse({**sections, **_prefixed("zero_optimization", zero), **_prefixed("bf16", bf16)})
    return settings


def zero_strategy(stage: Any, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """The strategy that shards as much as ZeRO's `stage` does (Rajbhandari et al. 2020); stage 0 is `ddp`."""
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{path}: must be 0, 1, 2 or 3, got {stage!r}")
    return {f"zero{stage}" if stage else "ddp": options}


def _read(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return dict(config or {})
    try:
        values = json.loads(Path(config).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"hf_ds_config: {config} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"hf_ds_config: {config} must hold a JSON object, got {type(values).__name__}")
    return values


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what is "auto"."""
    return {k: _known(v) if isinstance(v, Mapping) else v for k, v in values.items() if v != "auto"}


def _zero_options(section: dict[str, Any]) -> dict[str, Any]:
    """Takes out of a zero_optimization section what it can say in the options of our strategies."""
    options: dict[str, Any] = {}
    for name in ("offload_optimizer", "offload_param"):
        offload = section.get(name)
        if isinstance(offload, Mapping) and offload.keys() <= {"device", "pin_memory"}:
            device, pin = offload.get("device", "none"), offload.get("pin_memory")
            if device == "cpu":
                options.update({"offload": "cpu"} | ({"pin_memory": pin} if pin is not None else {}))
            if device in ("cpu", "none"):
                del section[name]
    return options


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


def _refuse(left: Mapping[str, Any]) -> None:
    if left:
        problems = "; ".join(f"{key}: {_ADVICE.get(key, 'has no counterpart here, remove it')}" for key in left)
        raise ConfigError(f"hf_ds_config: cannot be honoured: {problems}")

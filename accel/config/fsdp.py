"""What scripts and files say of torch's FSDP, as plain settings of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .deepspeed import zero_strategy
from .translation import Translation, only

_STAGES = {
    **dict.fromkeys(("FULL_SHARD", "1", "TRUE"), 3),
    **dict.fromkeys(("SHARD_GRAD_OP", "2", "FALSE"), 2),
    **dict.fromkeys(("NO_SHARD", "3"), 0),
}
"""The ZeRO stage of each sharding strategy, or answer to whether to reshard after forward; 0 is none."""

_UNITS = "the strategy decides what is gathered together"
_FETCHES = "the strategy decides when to fetch parameters"
_STATE = "get_state_dict gives whole tensors, and `checkpoint` says what save_state writes"


@dataclass
class FSDP(Translation):
    """A run of torch's FSDP, as accel's strategy that shards as much."""

    fsdp_version: int = only(2, "both versions' ways to shard are strategies here", 1)
    sharding_strategy: Any = None
    reshard_after_forward: Any = None
    backward_prefetch: Any = only(None, _FETCHES, "BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH")
    auto_wrap_policy: Any = only(None, _UNITS, "TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
    cpu_offload: Any = only(
        False, "offload is True or False here, for parameters and all that goes with them", None, True
    )
    ignored_modules: Any = only(None, "all of a prepared model is sharded")
    state_dict_type: Any = only(None, _STATE, "FULL_STATE_DICT", "SHARDED_STATE_DICT")
    use_orig_params: bool | None = only(None, "parameters keep their names", True, False)
    sync_module_states: bool | None = only(None, "weights are always broadcast from process 0", True)
    forward_prefetch: bool | None = only(None, _FETCHES, True, False)
    activation_checkpointing: bool | None = only(None, "it is all blocks or none", True, False)
    activation_checkpointing_offload: bool | None = only(None, "inputs of blocks stay on the device", False)
    cpu_ram_efficient_loading: bool | None = only(None, "it is for the loader of Transformers", True, False)
    transformer_cls_names_to_wrap: Any = None
    min_num_params: int | None = None

    def settings(self) -> dict[str, Any]:
        """`{"strategies": {"zero3": {}}}` where parameters are freed after forward, else `zero2`; NO_SHARD is `ddp`."""
        given = {name: getattr(self, name) for name in ("sharding_strategy", "reshard_after_forward")}
        stages = {name: self._stage(name, asked) for name, asked in given.items() if asked is not None}
        if len(set(stages.values())) > 1:
            told = " contradicts ".join(f"{self.where(name)}: {asked!r}" for name, asked in given.items())
            raise ConfigError(f"{told}; keep one of them")
        name, stage = next(iter(stages.items()), ("sharding_strategy", 3))
        options = {"offload": "cpu"} if self.cpu_offload else {}
        if self.activation_checkpointing:
            options["activation_checkpointing"] = "full"
        return super().settings() | {"strategies": zero_strategy(stage, self.where(name), options)}

    def _stage(self, name: str, asked: Any) -> int:
        """The ZeRO stage that a way to shard corresponds to."""
        stage = _STAGES.get(str(getattr(asked, "name", asked)).upper())
        if stage is None:
            raise ConfigError(
                f"{self.where(name)}: {asked!r} cannot be honoured; FULL_SHARD, SHARD_GRAD_OP and NO_SHARD can, "
                "or in a config of accel's own `strategies: {zero3: {replicas: 2}}`"
            )
        return stage

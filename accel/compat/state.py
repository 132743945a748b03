"""What a script can ask about its place in the run before it has an `Accelerator`, or instead of one."""

from __future__ import annotations

from enum import StrEnum

from torch.distributed import ProcessGroup

from ..config import current_config
from ..plan import Plan
from ..runtime.process import Process
from ..runtime.world import World, leave


class DistributedType(StrEnum):
    """The kinds of runs that scripts compare with. Strategies are no kinds of their own: no engine takes over here."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_NPU = "MULTI_NPU"
    MULTI_XPU = "MULTI_XPU"
    DEEPSPEED = "DEEPSPEED"
    FSDP = "FSDP"
    MEGATRON_LM = "MEGATRON_LM"
    XLA = "XLA"

    @classmethod
    def of(cls, process: Process) -> DistributedType:
        """The kind of run that a process is part of."""
        if process.num_processes == 1:
            return cls.NO
        kind = "GPU" if process.device.type == "cuda" else process.device.type.upper()
        return cls(f"MULTI_{kind}")


class Placed(Process):
    """What other libraries call the kind of run that a process takes part in."""

    @property
    def distributed_type(self) -> DistributedType:
        """NO, or MULTI_ and the kind of device."""
        return DistributedType.of(self)

    @property
    def use_distributed(self) -> bool:
        """Whether there are several processes."""
        return self.num_processes > 1


class PartialState(Placed):
    """This process's place among all, and its dealings with them; made by all ranks."""

    def __init__(self, cpu: bool = False) -> None:
        self.world = World.from_environment()
        config = current_config()
        device = Plan.of(config.replace(device="cpu") if cpu else config).find_device().plugin()
        self.device = device.select(self.world.local_rank)
        if self.world.size > 1:
            self.world.connect(device.collectives, config.timeout)

    def data_group(self) -> ProcessGroup | None:
        return self.world.group()

    @property
    def initialized(self) -> bool:
        """Always true; making a `PartialState` is what joins the other processes."""
        return True

    def destroy_process_group(self) -> None:
        """Leave the other processes; happens by itself when the script ends."""
        leave()

"""The mesh of processes: arithmetic on ranks first, torch's groups only when somebody needs them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..interfaces.strategy import Axis
from .world import World


class Mesh:
    """All processes in a grid with named axes, outermost first, in row-major order of ranks.

    >>> mesh = Mesh({Axis.DATA: 4, Axis.TENSOR: 2}, World(5, 8, 5, 8), "cpu", lambda: None)
    >>> mesh.axis(Axis.DATA).index, mesh.axis(Axis.TENSOR).index, mesh.axis(Axis.PIPELINE).size
    (2, 1, 1)
    """

    def __init__(self, sizes: Mapping[Axis, int], world: World, device_type: str, connect: Callable[[], None]) -> None:
        self.sizes, self.world, self.device_type, self.connect = dict(sizes), world, device_type, connect

    @functools.cached_property
    def device_mesh(self) -> DeviceMesh:
        """Torch's mesh; made on first use, by all ranks together."""
        self.connect()
        return init_device_mesh(self.device_type, tuple(self.sizes.values()), mesh_dim_names=tuple(self.sizes))

    @functools.cache  # noqa: B019 - a mesh lives as long as its process
    def axis(self, axis: Axis) -> MeshAxis:
        """One axis as this process sees it; an axis that no strategy fills has size 1."""
        inner = math.prod(
            size for other, size in self.sizes.items() if list(self.sizes).index(other) > self._place(axis)
        )
        size = self.sizes.get(axis, 1)
        return MeshAxis(axis, size, self.world.rank // inner % size, self)

    def _place(self, axis: Axis) -> int:
        return list(self.sizes).index(axis) if axis in self.sizes else len(self.sizes)


@dataclass(frozen=True)
class MeshAxis:
    """One axis of the mesh: implements `accel.interfaces.AxisMesh`."""

    name: Axis
    size: int
    index: int
    mesh: Mesh

    @functools.cached_property
    def group(self) -> ProcessGroup:
        """The processes along the axis; made on first use, by all ranks together."""
        self.mesh.connect()
        if self.size == self.mesh.world.size:
            return dist.group.WORLD  # type: ignore[return-value]
        return self.device_mesh.get_group()

    @property
    def device_mesh(self) -> DeviceMesh:
        """The axis as torch's one-dimensional mesh; made on first use, by all ranks together."""
        return self.mesh.device_mesh[self.name]

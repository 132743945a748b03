"""Gradients through whole copies of divided parameters that a loop makes: `model.head.weight.full_tensor()`.

Each process computes with its own batch and so has a gradient of its own for the whole, of which torch would keep its
part as it is. What counts is the mean over processes, as for parameters that the model's own forward uses. What is
alike on all processes, such as a penalty, is its own mean.

The mean takes all processes: where they do not use the same wholes, that is an error on all, before any waits.
"""

from __future__ import annotations

import functools
import weakref
import zlib
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from accel.errors import PrepareError
from accel.runtime.graph import nodes_of
from accel.runtime.points import BARE, WHOLE, Points

_will_execute = torch._C._will_engine_execute_node
_axes: dict[str, Wholes] = {}
"""By the name of a dim of a mesh."""


class Wholes:
    """The whole tensors that loops make of those that are divided among the processes of `group`.

    They are numbered in the order in which the processes make them, together.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.points = group, Points.of(group)
        self.in_pass = False
        """Whether the backward pass under way goes through any."""
        self._made, self._begun = 0, False
        self._nodes: list[weakref.ref[Any]] = []

    @classmethod
    def along(cls, mesh: DeviceMesh, group: ProcessGroup) -> Wholes:
        """Those along this mesh, which models share; all ranks."""
        names = mesh.mesh_dim_names or ()
        found = next((_axes[name] for name in names if name in _axes), None)
        wholes = found if found is not None and found.group is group else cls(group)
        _axes.update(dict.fromkeys(names, wholes))
        _mind_conversions()
        return wholes

    @property
    def made(self) -> bool:
        """Whether a gradient may have to be averaged."""
        return self._made > 0

    def begin(self, loss: Tensor) -> None:
        """All processes are about to run a backward pass from `loss`. Raises PrepareError where they use other wholes.

        All ranks call it.
        """
        if self.made:
            self._agree(getattr(node, "whole", 0) for node in nodes_of(loss))
        self._begun = True

    def arrive(self) -> None:
        """A backward pass that was not announced is about to wait for others."""
        if self._begun or not self.made:
            return
        self._begun = True
        torch.autograd.Variable._execution_engine.queue_callback(self.end)
        self.points.come_to(BARE)
        nodes = [node for node in (ref() for ref in self._nodes) if node is not None]
        self._agree(node.whole for node in nodes if _will_execute(node))

    def end(self) -> None:
        """The backward pass is over."""
        self._begun = self.in_pass = False

    def remember(self, node: Any) -> None:
        """Note the node of the graph through which a gradient will come that is to be averaged."""
        self._made += 1
        node.whole = self._made
        self._nodes = [*(ref for ref in self._nodes if ref() is not None), weakref.ref(node)]

    def mean(self, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        """Average gradients over the processes; all ranks."""
        return tuple(g if g is None else _mean(g, self) for g in gradients)

    def _agree(self, numbers: Iterable[int]) -> None:
        used = sorted({number for number in numbers if number})
        checksum = zlib.crc32(str(used).encode()) >> 1
        brought = torch.tensor([checksum, -checksum, len(used)], dtype=torch.int32)
        dist.all_reduce(brought, op=dist.ReduceOp.MAX, group=self.group)
        largest, smallest, most = brought.tolist()
        self.in_pass = most > 0
        if largest != -smallest:
            raise PrepareError(
                f"backward: the loss of this process uses {len(used)} results of full_tensor() or of operators between "
                f"divided parameters and plain tensors, and that of another process other ones, up to {most}; let "
                "every loss use the same, times 0 where it does not count"
            )


class _Mean(torch.autograd.Function):
    """The mean of a tensor over the processes. The gradient of a mean of losses through it is its mean again."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wholes: Wholes) -> Tensor:
        wholes.arrive()
        ctx.wholes = wholes
        if tensor.requires_grad:
            wholes.remember(ctx)
        mean = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mean, group=wholes.group)
        return mean.div_(wholes.group.size())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _mean(gradient, ctx.wholes), None


def _mean(tensor: Tensor, wholes: Wholes) -> Any:
    return _Mean.apply(tensor, wholes)  # type: ignore[no-untyped-call]


@functools.cache
def _mind_conversions() -> None:
    """Let what makes plain tensors of divided ones see to their gradients."""
    for name in ("full_tensor", "to_local"):
        setattr(DTensor, name, _minded(getattr(DTensor, name)))
    DTensor.redistribute = _announced(DTensor.redistribute)  # type: ignore[method-assign]


def _announced(redistribute: Any) -> Any:
    """What makes a divided tensor whole waits for all who hold parts of it."""

    @functools.wraps(redistribute)
    def call(tensor: DTensor, device_mesh: Any = None, placements: Any = None, **options: Any) -> DTensor:
        dims = tensor.device_mesh.mesh_dim_names or ()
        for dim, now, then in zip(dims, tensor.placements, placements or (), strict=False):
            if dim in _axes and now != then and not now.is_replicate():
                _axes[dim].points.come_to(WHOLE)
        result: DTensor = redistribute(tensor, device_mesh, placements, **options)
        return result

    return call


def _minded(convert: Any) -> Any:
    @functools.wraps(convert)
    def call(tensor: DTensor, *, grad_placements: Any = None) -> Tensor:
        plain: Tensor = convert(tensor, grad_placements=grad_placements)
        dims = tensor.device_mesh.mesh_dim_names or ()
        wholes = next((_axes[dim] for dim in dims if dim in _axes), None)
        if wholes is not None and grad_placements is None and plain.grad_fn is not None:
            whole = convert.__name__ == "full_tensor" or all(
                p.is_replicate() for dim, p in zip(dims, tensor.placements, strict=True) if dim in _axes
            )
            if whole:
                wholes.remember(plain.grad_fn)
            plain.grad_fn.register_prehook(wholes.mean if whole else _refuse)
        return plain

    return call


def _refuse(gradients: tuple[Any, ...]) -> NoReturn:
    raise PrepareError(
        "backward: a loss depends on what to_local() gives, which is this process's part of a divided parameter, and "
        "it is not known what such a part counts for the others; use full_tensor(), or torch.no_grad() if it is no "
        "part of the loss"
    )

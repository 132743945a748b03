"""What modules of a divided model share: their forward sees plain tensors where parameters are DTensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from accel.errors import PrepareError
from accel.runtime.divided.peers import Peers
from accel.runtime.divided.tensor import Divided, whole_of
from accel.runtime.nested import map_tensors


class Layer:
    """Mixin of all modules of a model that is divided: forward sees plain tensors for parameters."""

    _peers: Peers
    _mesh: DeviceMesh
    _own_forward: ClassVar[Any]
    _pieces = 1
    divided_dims: ClassVar[Mapping[str, int]] = {}
    """The dim along which each parameter is divided, by name; others are held whole."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if _inside.depth and isinstance(value, DTensor) and value.device_mesh == self._mesh:
            return _apart(value.full_tensor() if value.placements[0].is_shard() else value.to_local())
        return value

    def __deepcopy__(self, memo: Any) -> Any:
        raise PrepareError(
            f"copy.deepcopy: this {type(self).__name__} is divided among the processes and cannot be copied; copy it "
            "before prepare() and prepare both, whose parameters then pair up; for its weights, use get_state_dict()"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(*args, **kwargs) if _inside.depth else self._enter(*args, **kwargs)

    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        """The outermost forward."""
        if self._peers.begins:
            self._peers.begins()
        _inside.depth += 1
        try:
            with own_kernels():
                output = self.compute(*args, **kwargs)
        finally:
            _inside.depth -= 1
            self._peers.forget()
        return map_tensors(self._leave, output, Divided)

    def _leave(self, output: Divided) -> Any:
        """What leaves the model is whole, but for logits if a loss shall find them divided."""
        division = output.division
        logits = self._peers.logits and division.dim == output.dim() - 1 and not division.sources
        return output if logits else whole_of(output)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the user's own class."""
        return self._own_forward(*args, **kwargs)

    @staticmethod
    def inside() -> bool:
        """Whether a forward of a divided model is under way."""
        return _inside.depth > 0

    def own(self, name: str) -> Tensor | None:
        """This process's part of a parameter that this layer divides, or the whole of one that it does not."""
        value: Any = self._parameters.get(name)
        dim = self.divided_dims.get(name)
        if not isinstance(value, DTensor):  # no bias, or on another stage
            return None if value is None else value.detach()
        if dim is not None and value.placements[0].is_shard(dim) and value.dim() > 1:
            return value.to_local()  # a product makes its gradient
        if dim is None or value.placements[0].is_shard(dim):
            return _apart(value.to_local())
        return self._peers.take(value.full_tensor(), dim)  # tied to what another layer holds whole

    def dealt(self, name: str) -> Tensor | None:
        """This process's part of a parameter: some rows, or some of each piece."""
        part = self.own(name)
        return part if part is None else self._peers.deal(part, self.divided_dims[name], self.pieces_of(name))

    def pieces_of(self, name: str) -> int:
        """Of how many equal pieces of a parameter this process works on its part."""
        return self._pieces


def _apart(local: Tensor) -> Tensor:
    """What a DTensor holds, with a gradient that shares its memory with no other."""
    made: Tensor = _Apart.apply(local) if local.requires_grad else local  # type: ignore[no-untyped-call]
    return made


class _Apart(torch.autograd.Function):
    """Autograd gives both terms of a sum one gradient, and later adds to it in place unless others hold it too.

    Of a DTensor it sees the outside only: terms would add to each other's gradients.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clone()


class _Inside:
    """How many forward calls of divided models are under way."""

    depth = 0


_inside = _Inside()


@contextlib.contextmanager
def own_kernels() -> Iterator[None]:
    """Inside, torch's transformer layers call their sublayers in evaluation too, as they do in training."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

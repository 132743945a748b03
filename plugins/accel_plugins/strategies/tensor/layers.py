"""Layers whose weights are divided, and all others of a model, whose weights are held by all processes.

A layer keeps its class, but for a subclass of it that lets its forward find plain tensors where parameters are
DTensors: the process's own part in a divided layer, the whole in code that reads a layer's weight from elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from accel.errors import PrepareError
from accel.runtime.adopt import own_class
from accel.runtime.divided.peers import Peers
from accel.runtime.divided.products import added_up, by_columns, by_rows
from accel.runtime.divided.tensor import Divided, whole_of
from accel.runtime.nested import map_tensors
from accel.runtime.shards import held_parameters

_LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is just x W + b, so that it can be divided."""
    known = own_class(module) in _LINEARS or is_transposed(module)
    return known and module._parameters.get("weight") is not None


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in, out], as GPT-2's of Hugging Face does."""
    kind = own_class(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_table(module: nn.Module) -> bool:
    """Whether a layer is just an embedding."""
    return own_class(module) is nn.Embedding


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
            return value.full_tensor() if value.placements[0].is_shard() else value.to_local()
        return value

    def __deepcopy__(self, memo: Any) -> Any:
        raise PrepareError(
            f"copy.deepcopy: this {type(self).__name__} is divided among the processes and cannot be copied; copy it "
            "before prepare() and prepare both, whose parameters then pair up; for its weights, use get_state_dict()"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not _inside.depth and self._peers.begins:
            self._peers.begins()
        _inside.depth += 1
        try:
            output = self.compute(*args, **kwargs)
        finally:
            _inside.depth -= 1
            if not _inside.depth:
                self._peers.forget()
        return output if _inside.depth else map_tensors(self._leave, output, Divided)

    def _leave(self, output: Divided) -> Any:
        """What leaves the model is whole, but for logits if a loss shall find them divided."""
        logits = self._peers.logits and output.division.dim == output.dim() - 1
        return output if logits else whole_of(output)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the user's own class."""
        return self._own_forward(*args, **kwargs)

    def own(self, name: str) -> Tensor | None:
        """This process's part of a parameter that this layer divides, or the whole of one that it does not."""
        value: Any = self._parameters.get(name)
        dim = self.divided_dims.get(name)
        if not isinstance(value, DTensor):  # no bias, or on another stage
            return None if value is None else value.detach()
        if dim is None or value.placements[0].is_shard(dim):
            return value.to_local()
        return self._peers.take(value.full_tensor(), dim)  # tied to what another layer holds whole

    def dealt(self, name: str) -> Tensor | None:
        """This process's part of a parameter: some rows, or some of each piece."""
        part = self.own(name)
        return part if part is None else self._peers.deal(part, self.divided_dims[name], self._pieces)


class _Inside:
    """How many forward calls of divided models are under way."""

    depth = 0


_inside = _Inside()


class Column(Layer):
    """A linear layer of which each process computes some outputs: [.., in] -> [.., out], divided along the last dim."""

    divided_dims = {"weight": 0, "bias": 0}
    transposed = False

    def compute(self, x: Tensor) -> Any:
        weight, bias = self.dealt("weight"), self.dealt("bias")
        assert weight is not None
        return by_columns(x, weight.t() if self.transposed else weight, bias, self._peers, self._pieces)


class Row(Layer):
    """A linear layer of which each process takes some inputs, as a column layer leaves them; their shares are added."""

    divided_dims = {"weight": 1}
    transposed = False

    def compute(self, x: Tensor) -> Any:
        weight = self.own("weight")
        assert weight is not None
        return by_rows(x, weight.t() if self.transposed else weight, self.own("bias"), self._peers)


class TransposedColumn(Column):
    """A column layer whose weight is [in, out]."""

    divided_dims = {"weight": 1, "bias": 0}
    transposed = True


class TransposedRow(Row):
    """A row layer whose weight is [in, out]."""

    divided_dims = {"weight": 0}
    transposed = True


class Head(Column):
    """A column layer whose outputs are put together, such as a head over the vocabulary; unless a loss will be."""

    def compute(self, x: Tensor) -> Any:
        out = super().compute(x)
        return out if self._peers.logits else whole_of(out)


class TransposedHead(Head):
    """The same with a weight of [in, out]."""

    divided_dims = {"weight": 1, "bias": 0}
    transposed = True


class Vocabulary(Layer):
    """An embedding of which each process holds some rows: indices [..] -> [.., width], added over the processes."""

    divided_dims = {"weight": 0}

    def compute(self, indices: Tensor) -> Any:
        weight, peers = self.own("weight"), self._peers
        assert weight is not None
        rows = weight.shape[0]
        places = whole_of(indices) - peers.index * rows
        elsewhere = (places < 0) | (places >= rows)
        padding = -1 if self.padding_idx is None else self.padding_idx - peers.index * rows
        found = F.embedding(
            places.masked_fill(elsewhere, 0), weight, padding_idx=padding if 0 <= padding < rows else None
        )
        return added_up(found.masked_fill(elsewhere.unsqueeze(-1), 0), peers)


class Recurrent(Layer):
    """An RNN, whose forward takes its parameters from a list of its own."""

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        kept: Any = self._flat_weights  # type: ignore[has-type]
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        try:
            return super().compute(*args, **kwargs)
        finally:
            self._flat_weights = kept


STYLES: dict[str, tuple[type[Layer], type[Layer]]] = {
    "column": (Column, TransposedColumn),
    "row": (Row, TransposedRow),
    "gathered": (Head, TransposedHead),
    "vocabulary": (Vocabulary, Vocabulary),
    "replicate": (Layer, Layer),
}
"""The mixin of each way to hold a layer, and that for a weight of [in, out]."""


def apply(model: nn.Module, styles: Mapping[str, tuple[str, int]], peers: Peers, mesh: DeviceMesh) -> None:
    """Divide the layers of a model as `styles` says, by name; replicate all others. Tied parameters stay tied.

    Of each layer, `styles` has a key of `STYLES`, and the number of equal pieces of its outputs.

    Parameters become DTensors on `mesh`; those of a model that has been divided are first put together again.
    """
    mixins = {}
    dims: dict[nn.Parameter, int] = {}
    for name, module in model.named_modules():
        restore_class(module)
        style, pieces = styles.get(name, ("replicate", 1))
        mixins[module] = _mixin(module, style)
        module.__dict__["_pieces"] = pieces
        for key, dim in mixins[module].divided_dims.items():
            if (parameter := module._parameters.get(key)) is not None:
                dims.setdefault(parameter, dim)
    held = held_parameters(model)
    made = {parameter: _distribute(parameter, mesh, dims.get(parameter)) for parameter in held}
    for module, mixin in mixins.items():
        for key, parameter in module._parameters.items():
            if parameter in made:
                module._parameters[key] = made[parameter]
        adopt(module, mixin, peers, mesh)


def _mixin(module: nn.Module, style: str) -> type[Layer]:
    return Recurrent if isinstance(module, nn.RNNBase) else STYLES[style][is_transposed(module)]


def _distribute(parameter: nn.Parameter, mesh: DeviceMesh, dim: int | None) -> nn.Parameter:
    """A parameter as a DTensor, divided along a dim or replicated."""
    whole = parameter.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    placements = [Replicate() if dim is None else Shard(dim)]
    result = nn.Parameter(distribute_tensor(whole, mesh, placements, src_data_rank=None), parameter.requires_grad)
    result.__dict__.update(parameter.__dict__)  # what the user noted there
    return result


def adopt(module: nn.Module, mixin: type[Layer], peers: Peers, mesh: DeviceMesh) -> None:
    """Give a module a mixin's behaviour, in place."""
    module.__dict__["_peers"], module.__dict__["_mesh"] = peers, mesh
    module.__class__ = _adopted_class(mixin, type(module))  # type: ignore[arg-type]


def restore_class(module: nn.Module) -> None:
    """Undo `adopt`; harmless to others."""
    if isinstance(module, Layer):
        module.__class__ = type(module).__bases__[1]
        del module.__dict__["_peers"], module.__dict__["_mesh"], module.__dict__["_pieces"]


@functools.cache
def _adopted_class(mixin: type[Layer], own: type[nn.Module]) -> type[Any]:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    forward = functools.wraps(own.forward)(lambda self, *args, **kwargs: Layer.forward(self, *args, **kwargs))
    return type(own.__name__, (mixin, own), {**names, "forward": forward, "_own_forward": own.forward})

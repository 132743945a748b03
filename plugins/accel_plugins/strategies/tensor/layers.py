"""Layers whose weights are divided, and all others of a model, whose weights are held by all processes.

A layer keeps its class, but for a subclass of it that lets its forward find plain tensors where parameters are
DTensors: the process's own part in a divided layer, the whole in code that reads a layer's weight from elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from accel.runtime.adopt import own_class
from accel.runtime.deferred import hollow_whole
from accel.runtime.divided.peers import Peers
from accel.runtime.divided.products import added_up, by_columns, by_rows
from accel.runtime.divided.tensor import whole_of
from accel.runtime.shards import held_parameters

from .composites import Experts, Heads, HeadsOut
from .layer import Layer

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
    "heads": (Heads, Heads),
    "out": (HeadsOut, HeadsOut),
    "experts": (Experts, Experts),
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
    """A parameter as a DTensor, divided along a dim or replicated; one without memory still has none."""
    placements = [Replicate() if dim is None else Shard(dim)]
    whole: Any = hollow_whole(parameter)
    if whole is not None:
        part = whole if dim is None else whole.chunk(mesh.size(), dim)[mesh.get_local_rank()]
        sizes = {"shape": whole.shape, "stride": whole.stride()}
        divided = DTensor.from_local(part, mesh, placements, run_check=False, **sizes)
    else:
        whole = parameter.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        divided = distribute_tensor(whole.contiguous(), mesh, placements, src_data_rank=None)  # as FSDP wants its parts
    result = nn.Parameter(divided, parameter.requires_grad)
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

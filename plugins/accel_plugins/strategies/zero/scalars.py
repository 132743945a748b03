"""Parameters of shape (): they have no dim to divide, so each process holds the whole of them.

While `fully_shard` lays them out they are vectors of equal elements, one for each shard. Gathering such a vector and
taking its first element gives the scalar; reduce-scattering a gradient that is repeated for each shard gives every
process its sum. So they travel with the other parameters of their group, and need no exchange of their own.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from accel.runtime.deferred import replace_parameters
from accel.runtime.shards import Elsewhere, held_part

_SCALAR = torch.Size([])

Places = set[tuple[int, str]]
"""The ids of modules, and names of parameters in them."""


def widen(model: nn.Module, shards: int) -> Places:
    """Make a model's scalars vectors of `shards` equal elements; returns where they were."""

    def scalar(parameter: nn.Parameter | None) -> bool:
        return parameter is not None and not parameter.dim() and not isinstance(parameter, Elsewhere)

    def vector(parameter: nn.Parameter) -> nn.Parameter | None:
        if not scalar(parameter):
            return None
        return nn.Parameter(parameter.detach().expand(shards).clone(), requires_grad=parameter.requires_grad)

    places = {(id(m), name) for m in model.modules() for name, p in m._parameters.items() if scalar(p)}
    replace_parameters(model.modules(), vector)
    return places


def narrow(parameter: Any, places: Places) -> None:
    """Let torch's record of a vector that `widen` has made be that of a scalar, which each process holds."""
    info = parameter._module_info
    if (id(info.module), info.param_name) not in places:
        return
    old = parameter.sharded_param
    meta, mesh = TensorMeta(_SCALAR, (), old.dtype), old.device_mesh
    spec = DTensorSpec(mesh, (Replicate(),) * mesh.ndim, tensor_meta=meta)
    parameter._orig_size = parameter.sharded_size = _SCALAR
    parameter._contiguous_orig_stride = parameter.contiguous_sharded_stride = ()
    parameter._sharding_spec = spec
    of_other_axis = "_unsharded_dtensor_spec" if hasattr(parameter, "_unsharded_dtensor_spec") else "_tp_spec"  # 2.11
    if (known := getattr(parameter, of_other_axis, None)) is not None:
        setattr(parameter, of_other_axis, replace(known, tensor_meta=meta))
    whole = DTensor.from_local(old._local_tensor.view(()), mesh, spec.placements, run_check=False)
    parameter.sharded_param = nn.Parameter(whole.detach(), requires_grad=old.requires_grad)
    parameter.reset_sharded_param = functools.partial(_reset, parameter)
    parameter._setattr_on_modules(parameter.sharded_param)


def _reset(parameter: Any) -> None:
    """Notice another parameter in the module, as after `load_state_dict(..., assign=True)`."""
    parameter.sharded_param = getattr(parameter._module_info.module, parameter._module_info.param_name)
    parameter._sharded_param_data = held_part(parameter.sharded_param).view(-1)


def repeat_gradient(parameter: Any) -> None:
    """Give the gradient of a scalar the shape in which it is reduced."""
    gradient = parameter.unsharded_accumulated_grad
    if gradient is None:
        gradient, parameter._unsharded_param.grad = parameter._unsharded_param.grad, None
    if gradient is not None and not gradient.dim():
        parameter.unsharded_accumulated_grad = gradient.expand(parameter.mesh_info.shard_mesh_size).contiguous()

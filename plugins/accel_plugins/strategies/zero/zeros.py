"""Parameters that bring no gradient to an exchange: they bring zeros, or nothing where they have no elements."""

from __future__ import annotations

from typing import Any

import torch

from .groups import whole_gradient


def drop_empty(group: Any) -> None:
    """Forget gradients of size 0, which torch cannot reduce and nobody needs."""
    for parameter in group.fsdp_params:
        if not parameter.sharded_param.numel() and hasattr(parameter, "_unsharded_param"):
            parameter.unsharded_accumulated_grad = parameter._unsharded_param.grad = None


def fill(parameter: Any) -> bool:
    """Give zeros to a parameter that trains and has no gradient on this process; returns whether it did."""
    if not parameter.sharded_param.requires_grad or whole_gradient(parameter) is not None:
        return False
    if not hasattr(parameter, "_unsharded_param") or not parameter.sharded_param.numel():
        return False
    parameter._unsharded_param.grad = torch.zeros_like(parameter._unsharded_param)
    return True


class Zeros:
    """What exchanging zeros has made the gradient of a parameter that had none."""

    def __init__(self, parameter: Any) -> None:
        self.parameter, self.gradient, self.version = parameter, *_gradient_of(parameter)

    @property
    def untouched(self) -> bool:
        """Whether nothing was added since, as by a penalty that is computed before forward."""
        gradient, version = _gradient_of(self.parameter)
        return gradient is self.gradient and version == self.version


def _gradient_of(parameter: Any) -> tuple[Any, int]:
    gradient = parameter.sharded_param.grad
    return gradient, -1 if gradient is None else gradient._version

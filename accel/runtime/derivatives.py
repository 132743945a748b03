"""`torch.autograd.grad` with respect to parameters that a strategy keeps from the graph."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch.autograd import graph

from ..errors import PrepareError
from ..interfaces.strategy import Strategy

_run_here = graph._engine_run_backward


def watch_derivatives(strategies: Sequence[Strategy], trained: Callable[[], Container[int]]) -> None:
    """Refuse derivatives that torch would say are None, where forward computes with copies of the parameters.

    `trained` gives the ids of the parameters of prepared models that train at that moment.
    """

    def are_hidden(tensors: Sequence[Any]) -> bool:
        hidden = trained() if tensors else ()
        return any(id(tensor) in hidden for tensor in tensors)

    def run(outputs: Any, *args: Any, **options: Any) -> Any:
        if options.get("accumulate_grad", True):
            return _run_here(outputs, *args, **options)
        inputs = args[3]
        try:
            result: Sequence[Any] = _run_here(outputs, *args, **options)
        except RuntimeError as error:
            if "appears to not have been used" in str(error) and are_hidden(inputs):
                raise _refusal() from error
            raise
        if are_hidden([t for gradient, t in zip(result, inputs, strict=True) if gradient is None]):
            raise _refusal()
        return result

    if any(strategy.hides_parameters and strategy.mesh.size > 1 for strategy in strategies):
        torch.autograd._engine_run_backward = run  # type: ignore[assignment,attr-defined]


def _refusal() -> PrepareError:
    return PrepareError(
        "torch.autograd.grad: the model computes with copies of its parameters, or other processes do, so that there "
        "are no gradients with respect to them here; call accelerator.backward(loss) and use their .grad, or let the "
        "loss depend on them by .full_tensor()"
    )

"""Calls that do not come through the model's forward: of a part, such as an encoder's block, and of `generate`.

A part without gradients is computed by the process that holds it, and all get what it returns: nothing is gained,
and the numbers are those of one process. All processes along the pipeline make such calls together.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from accel.errors import PrepareError
from accel.runtime.nested import tensors

from .absent import Absent
from .message import Failure
from .nest import put_together, take_apart

if TYPE_CHECKING:
    from .engine import StagedModel


def listen(staged: StagedModel) -> None:
    """Serve the calls of a model's parts outside of its forward, and let it generate without a cache."""
    staged.parts.outside = functools.partial(_compute, staged)
    if hasattr(staged.model, "generation_config") and hasattr(staged.model, "generate"):
        _leave_cache_out(staged.model)


def _compute(staged: StagedModel, part: str, forward: Any, args: Any, kwargs: Any) -> Any:
    """What the process that holds a part makes of it, on all."""
    if part not in staged.split.places:  # all hold it
        return forward(*args, **kwargs)
    source, said, sent = staged.rank_of(staged.split.places[part][0]), None, []
    failure, error = None, None
    if staged.rank == source:
        try:
            said, sent = _output(part, forward, args, kwargs)
        except Exception as raised:  # noqa: BLE001 - raised once the others know of it
            error, failure = raised, Failure.of(raised, f"{part}, on rank {dist.get_rank()}")
    found = staged.wire.broadcast(source, ("outside", part), said, sent, failure)
    if error is not None:
        raise error
    if isinstance(found, Failure):
        raise PrepareError(f"pipeline: {found.text}")
    return put_together(*found)


def _output(part: str, forward: Any, args: Any, kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    for _, tensor in tensors(output):
        if isinstance(tensor, Absent):
            raise PrepareError(f"pipeline: {part} needs {tensor.missing}")
    return take_apart(output)


def _leave_cache_out(model: nn.Module) -> None:
    """Hugging Face's `generate` keeps keys and values unless told otherwise; here they would be on several stages."""
    own: Any = model.generate

    @functools.wraps(own)
    def generate(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{"use_cache": False, **kwargs})

    model.generate = generate  # type: ignore[assignment]

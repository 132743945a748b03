"""Finding out what fits into memory."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any, overload

from ..errors import ConfigError


@overload
def find_executable_batch_size(function: Callable[..., Any], starting_batch_size: int = ...) -> Callable[..., Any]: ...
@overload
def find_executable_batch_size(
    function: None = None, starting_batch_size: int = ...
) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
def find_executable_batch_size(function: Callable[..., Any] | None = None, starting_batch_size: int = 128) -> Any:
    """Decorator: calls `function(batch_size, ...)` with half the batch size again whenever memory runs out.

    Each call begins with the last size that fitted. Raises ConfigError if not even one sample fits, or if the
    function cannot take a batch size as its first argument. On several processes memory must run out on all alike.
    """
    if function is None:
        return functools.partial(find_executable_batch_size, starting_batch_size=starting_batch_size)
    name = getattr(function, "__name__", "function")
    if not inspect.signature(function).parameters:
        raise ConfigError(f"find_executable_batch_size: {name}() must take the batch size as its first argument")
    size = starting_batch_size

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal size
        while size >= 1:
            _give_back()
            try:
                return function(size, *args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                size //= 2
        size = starting_batch_size
        raise ConfigError(f"find_executable_batch_size: {name}() runs out of memory even with a batch size of 1")

    return call


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator: can't allocate memory" in str(error)


def _give_back() -> None:
    import torch

    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()

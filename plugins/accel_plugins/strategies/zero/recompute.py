"""Activation checkpointing (Chen et al. 2016): keep a block's inputs, compute its activations again in backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
"""What costs most to compute again; selective checkpointing keeps its results."""


def checkpoint_activations(block: nn.Module, selective: bool) -> None:
    """Let a block's forward keep only its inputs; where `selective`, the results of costly operations too."""
    options: dict[str, Any] = {"use_reentrant": False}
    if next(block.buffers(), None) is not None:
        options["context_fn"] = _Contexts(block, selective)
    elif selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, list(_KEPT))
    block.forward = functools.partial(checkpoint, block.forward, **options)


class _Reusable(AbstractContextManager[None]):
    """A context that can be entered several times, as where backward goes through the same graph twice."""

    def __init__(self, *make: Callable[[], AbstractContextManager[Any]]) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.stack = ExitStack()
        for make in self.make:
            self.stack.enter_context(make())

    def __exit__(self, *raised: Any) -> None:
        self.stack.__exit__(*raised)


_Place = tuple[dict[str, Tensor | None], str]


class _Contexts:
    """What a block computes in, at first and again.

    Buffers that forward changes, such as batch norm's statistics, are again what they were, and count it once.
    """

    def __init__(self, block: nn.Module, selective: bool) -> None:
        self.block, self.selective = block, selective
        self._changing: dict[bool, list[dict[str, Tensor | None]]] = {}

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        first: Any = nullcontext()
        again: Any = nullcontext()
        if self.selective:
            first, again = create_selective_checkpoint_contexts(list(_KEPT))  # type: ignore[no-untyped-call]
        before: list[tuple[_Place, Tensor]] = []
        return (
            _Reusable(lambda: self._note(before), lambda: first),
            _Reusable(lambda: self._restore(before), lambda: again),
        )

    @contextmanager
    def _note(self, before: list[tuple[_Place, Tensor]]) -> Iterator[None]:
        """Copy the buffers of modules that change theirs: those that did before, in training or not, at first all."""
        training = self.block.training
        every = [module._buffers for module in self.block.modules()]
        copies = [(buffers, _copy(buffers)) for buffers in self._changing.get(training, every)]
        yield
        if training not in self._changing:
            copies = [(buffers, copy) for buffers, copy in copies if not _same(buffers, copy)]
            self._changing[training] = [buffers for buffers, _ in copies]
        before += [((buffers, name), tensor) for buffers, copy in copies for name, tensor in copy.items()]

    @contextmanager
    def _restore(self, before: list[tuple[_Place, Tensor]]) -> Iterator[None]:
        held = [(buffers, name, buffers[name]) for (buffers, name), _ in before]
        for (buffers, name), copy in before:
            buffers[name] = copy.clone()
        try:
            yield
        finally:
            for buffers, name, buffer in held:
                buffers[name] = buffer


def _copy(buffers: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}


def _same(buffers: dict[str, Tensor | None], copy: dict[str, Tensor]) -> bool:
    """Whether buffers have the values of their copies: torch does not count what batch norm does to them."""
    held = {name: buffer for name, buffer in buffers.items() if buffer is not None}
    return held.keys() == copy.keys() and all(torch.equal(buffer, copy[name]) for name, buffer in held.items())

"""Activation checkpointing (Chen et al. 2016): keep a block's inputs, compute its activations again in backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
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
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, list(_KEPT))
    block.forward = functools.partial(checkpoint, block.forward, **options)

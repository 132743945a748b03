"""Operations on tensors that are divided over two processes give what they give on whole ones, and its gradient."""

import pytest
import torch
from torch.nn import functional as F

from accel import Accelerator
from accel.runtime.divided.peers import Peers
from accel.runtime.divided.tensor import Divided, Division, divide, part_of, whole_of
from accel.testing import run

B, T, H, W = 2, 3, 4, 5

MASK = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(1)) > 0.3
BIAS = torch.randn(1, H, T, T, generator=torch.Generator().manual_seed(2))

BY_HEADS = {
    "view": lambda x, w: x.flatten(2).view(B, T, H, -1),
    "view apart and together": lambda x, w: x.view(B * T, H * W).reshape(B, T, 2, 2, W),
    "heads into samples": lambda x, w: x.transpose(1, 2).reshape(B * H, T, W) @ x.transpose(1, 2).reshape(B * H, W, T),
    "attention by hand": lambda x, w: (attention(x) + BIAS * w).masked_fill(~MASK, -9).softmax(-1),
    "torch's attention": lambda x, w: F.scaled_dot_product_attention(
        *heads(x), attn_mask=(BIAS * w).expand(B, -1, -1, -1)
    ),
    "causal attention": lambda x, w: (
        F.scaled_dot_product_attention(*heads(x), is_causal=True).transpose(1, 2).flatten(2)
    ),
    "rotation": lambda x, w: x * w + torch.cat((-x[..., W // 2 :], x[..., : W // 2]), dim=-1) * w.cos(),
    "norm of each head": lambda x, w: F.layer_norm(x, (W,), weight=w.expand(W)),
    "a linear layer": lambda x, w: F.linear(x, w.expand(7, W), w.expand(7)),
    "repeated heads": lambda x, w: x[:, :, :, None].expand(B, T, H, 3, W).reshape(B, T, 3 * H, W).permute(0, 2, 3, 1),
    "repeat_interleave": lambda x, w: x.repeat_interleave(2, dim=2).unsqueeze(1).squeeze(1).mT,
    "reductions": lambda x, w: (
        x.mean(-1) + x.sum(dim=(1, 3), keepdim=True).squeeze(-1) * x.var(-1, keepdim=True)[..., 0]
    ),
    "pieces of others": lambda x, w: (
        torch.cat(x.split([2, 3], dim=-1)[::-1], -1) + sum(x.chunk(5, -1)) + x.unbind(-1)[0][..., None]
    ),
    "a power, in place": lambda x, w: (x * 1).mul_(w).add_(torch.arange(H)[:, None] * w).clamp_(-1, 1) ** 2,
    "where": lambda x, w: torch.where(torch.arange(H)[:, None] > 1, x, w),
    "stacked": lambda x, w: torch.stack([x, x * w], dim=1).sum(1) + torch.stack([-x, x], dim=-1).flatten(-2)[..., :W],
    "complex": lambda x, w: torch.view_as_real(torch.view_as_complex(x[..., :4].contiguous().view(B, T, H, 2, 2)) * w),
    "einsum": lambda x, w: torch.einsum("bthw,bshw->bhts", x, x * w) + torch.einsum("bthw,h->bht", x, w)[..., None],
    "einsum by heads": lambda x, w: torch.einsum("hw,bthw->bth", w.expand(H, W), x),
    "an early cache": lambda x, w: torch.cat([torch.tensor([]), x], dim=-1),
    "a product of matrices": lambda x, w: x @ w.expand(W, 2),
    "numbers of the shape": lambda x, w: x / (x.shape[2] + x.size(-2) + x.numel() + len(x)),
    "facts": lambda x, w: x.to(torch.float64).type_as(w) * x.dim() * (x.is_floating_point() + x.requires_grad),
}
"""Of [B, T, H, W], divided along the heads, and a parameter that all hold; what stays divided."""

GATHERED = {
    "sum of all": lambda x, w: x.sum() * w,
    "one head": lambda x, w: x[:, :, 1] * w,
    "some heads": lambda x, w: x[:, :, 1:3] * w,
    "over the heads": lambda x, w: x.softmax(2).cumsum(2),
    "norm of all": lambda x, w: F.layer_norm(x, (H, W)),
    "indexed by a tensor": lambda x, w: x[:, torch.tensor([0, 2])] * x.index_select(2, torch.tensor([3]))[:, :2],
    "einsum over the heads": lambda x, w: torch.einsum("bthw,bthw->btw", x, x * w),
    "einsum with an ellipsis": lambda x, w: torch.einsum("...w,...w->...", x, x),
    "heads that do not divide": lambda x, w: x.reshape(B, T, H * W).view(B, T, W, H),
    "cat of heads": lambda x, w: torch.cat([x, x * w], dim=2),
    "two ways": lambda x, w: x[..., :H] + x[..., :H].transpose(2, 3),
    "plain changed by divided": lambda x, w: (w * torch.ones(B, T, H, W)).add_(x),
}
"""What needs the whole, and so gets it."""

TARGET = torch.tensor([[[0, 1, 3, 2, -100], [3, 3, 0, 1, 2], [1, -100, 2, 0, 0]]]).expand(B, T, W)
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.0])


def classes(x):
    """[B, T, H, W] -> [B, H, T, W]: each head a class."""
    return x.transpose(1, 2)


LOSSES = {
    "of positions": lambda x, w: F.cross_entropy(classes(x * w), TARGET),
    "flat": lambda x, w: F.cross_entropy(x.permute(0, 1, 3, 2).reshape(-1, H), TARGET.flatten(), reduction="sum"),
    "of one": lambda x, w: F.cross_entropy(x[0, 0, :, 0] * w, TARGET[0, 0, 1]),
    "not reduced": lambda x, w: F.cross_entropy(classes(x), TARGET, reduction="none") * w,
    "another index": lambda x, w: F.cross_entropy(classes(x), TARGET.clamp(0), ignore_index=3) * w,
    "smoothed": lambda x, w: F.cross_entropy(classes(x * w), TARGET, label_smoothing=0.3),
    "weighted": lambda x, w: F.cross_entropy(classes(x), TARGET, WEIGHTS, reduction="none") * w,
    "weighted and smoothed": lambda x, w: torch.nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2)(classes(x), TARGET),
    "sum of both": lambda x, w: F.cross_entropy(classes(x), TARGET, WEIGHTS, label_smoothing=0.2, reduction="sum"),
    "large and impossible": lambda x, w: F.cross_entropy(
        classes(x * 1000).masked_fill(torch.arange(H)[:, None, None] == 3, -1e30), TARGET.clamp(0, 2)
    ),
    "of probabilities": lambda x, w: F.cross_entropy(classes(x), classes(x.detach()).softmax(1)) * w,
    "in low precision": lambda x, w: F.cross_entropy(classes(x).bfloat16().float(), TARGET),
}
"""Cross entropy over what is divided; the loss is whole."""

UNEVEN = {
    "a norm": lambda x, w: F.layer_norm(x, (H, W)) * w,
    "a product": lambda x, w: F.linear(x.flatten(2), w.expand(7, H * W), w.expand(7)),
    "a view": lambda x, w: x.view(B, T, -1).unflatten(-1, (W, H)).transpose(1, 2).contiguous() * w,
    "shortcuts": lambda x, w: x + w * torch.arange(T)[:, None, None] + (x > 0) * x.mean(-1, keepdim=True),
    "cat": lambda x, w: torch.cat([x[:, :, :1], x * w], dim=2),
    "stacked": lambda x, w: torch.stack([x, x * w], dim=2),
    "einsum": lambda x, w: torch.einsum("bthw,w->bth", x, w.expand(W)),
}
"""Of [B, T, H, W], divided along T = 3 over two processes; what stays so."""

PUT_TOGETHER = {
    "positions into samples": lambda x, w: x.flatten(0, 1) * w,
    "positions apart": lambda x, w: torch.cat(x.chunk(3, 1)[::-1]) * w,
    "some positions": lambda x, w: x[:, 1:] * w + x[:, :1],
    "repeated positions": lambda x, w: x.repeat_interleave(2, dim=1) * w,
}
"""Of the same, what does not."""


def heads(x):
    return x.transpose(1, 2), x.transpose(1, 2).cos(), x.transpose(1, 2).sin()


def attention(x):
    query, key, _ = heads(x)
    return torch.matmul(query, key.transpose(-2, -1)) / W**0.5


def values():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, H, W, generator=generator).requires_grad_(), torch.full((1,), 0.7, requires_grad=True)


def peers_of_two():
    accelerator = Accelerator(strategies={"tensor": {"size": 2}}, num_processes=2, device="cpu")
    axis = accelerator.strategies[0].mesh
    return Peers(2, axis.index, 2, axis.group)


def backward(result):
    weights = torch.linspace(-1, 2, result.numel()).view_as(result)
    (result * weights).sum().backward()


def compare_all():
    """Each operation, on whole and on divided values; the gradient of the part is the part of the gradient."""
    peers, wrong = peers_of_two(), []
    by_heads, by_positions = Division(peers, 2), Division(peers, 1, length=T)
    rows = [(by_heads, {**BY_HEADS, **GATHERED, **LOSSES}), (by_positions, {**UNEVEN, **PUT_TOGETHER})]
    for division, name, operation in [(d, *item) for d, operations in rows for item in operations.items()]:
        (x, w), (y, v) = values(), values()
        expected = operation(x, w)
        backward(expected)
        found = operation(divide(peers.take(y, division.dim), division), v)
        if isinstance(found, Divided) != (name in BY_HEADS or name in UNEVEN):
            wrong.append(f"{name}: {type(found).__name__}")
        whole = whole_of(found)
        torch.testing.assert_close(whole, expected, msg=lambda text, name=name: f"{name}: {text}")
        backward(whole)
        for mine, theirs in ((y, x), (v, w)):
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert wrong == [], wrong


def test_operations():
    run(2, compare_all)


def compare_fused():
    """What is divided within each of three pieces, as the output of one layer for query, key and value."""
    peers = peers_of_two()
    whole = torch.arange(2 * 24.0).view(2, 24)
    x = divide(peers.own(whole, 1, outer=3), Division(peers, 1, outer=3))
    for piece, expected in zip(x.chunk(3, -1), whole.chunk(3, -1), strict=True):
        assert isinstance(piece, Divided) and piece.division.outer == 1
        assert torch.equal(whole_of(piece.view(2, 2, 4)), expected.view(2, 2, 4))
    assert torch.equal(whole_of(x.view(2, 3, 2, 4)[:, 1] + 1), whole.view(2, 3, 2, 4)[:, 1] + 1)
    assert torch.equal(whole_of(x), whole)
    rows = torch.randn(12, 2, requires_grad=True)
    for dim in (0, 1):
        given, dealt = rows.movedim(0, dim), peers.deal(peers.own(rows, 0).movedim(0, dim), dim, outer=3)
        expected = peers.own(given, dim, outer=3)
        assert torch.equal(dealt, expected)
        weights = torch.arange(expected.numel()).view_as(expected) + 100.0 * peers.index
        [gradient] = torch.autograd.grad((dealt * weights).sum(), rows)
        [wanted] = torch.autograd.grad((expected * weights).sum(), rows)
        both = peers.add(wanted)  # each process works on rows of its own
        assert torch.equal(peers.own(gradient, 0), peers.own(both, 0))


def test_pieces_with_a_part_of_each():
    run(2, compare_fused)


def refuse_in_place():
    peers = peers_of_two()
    x = divide(torch.ones(2, 2), Division(peers, 1))
    with pytest.raises(RuntimeError, match=r"__setitem__: cannot change .* in place .*strategies\.tensor\.plan"):
        x[:, 1] = 0
    assert part_of(x).shape == (2, 2) and x.shape == (2, 4) and not isinstance(part_of(x), Divided)


def test_changes_in_place_that_need_the_whole_are_refused():
    run(2, refuse_in_place)

"""ZeRO on models as people have them: one process's weights, for transformers of several families and a ResNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel import Accelerator
from accel.testing import run

from .zero_models import STAGES, whole

TOKENS = 50


def hugging_face(kind: str) -> nn.Module:
    """A small model of transformers, without dropout."""
    import transformers as t

    sizes = {"vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = {**sizes, "intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    gpt2 = {"vocab_size": TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    if kind == "bert":
        return t.BertForMaskedLM(t.BertConfig(**bert, max_position_embeddings=16))
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(**gpt2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return t.LlamaForCausalLM(t.LlamaConfig(**sizes, intermediate_size=32, num_key_value_heads=1))


class Residual(nn.Module):
    """[b, c, h, w] -> the same, as in a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in "ab")
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.first(x)), inplace=True)
        return F.relu(x + self.norms[1](self.second(hidden)), inplace=True)


class ResNet(nn.Module):
    """[b, 3, 8, 8] -> [b, 5], with batch norm in its blocks; its statistics are of each process's batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.Sequential(Residual(6), Residual(6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.stem(x)).mean((2, 3)))
        return out


def language(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(input_ids=x).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def images(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), x.sum((1, 2, 3)).long() % 5)


def words(generator: torch.Generator) -> Tensor:
    return torch.randint(TOKENS, (4, 7), generator=generator)


def pictures(generator: torch.Generator) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=generator)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[torch.Generator], Tensor]]] = {
    **{kind: (lambda kind=kind: hugging_face(kind), language, words) for kind in ("bert", "gpt2", "llama")},  # type: ignore[misc]
    "resnet": (ResNet, images, pictures),
}


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name][0]()


def family(stages: list[str], name: str) -> None:
    """Every stage on one model, the last also made without memory; each gives the weights of a plain loop."""
    _, loss_of, make_data = MODELS[name]
    expected = plainly(name)
    for stage, empty in (*((stage, False) for stage in stages), (stages[-1], True)):
        accelerator = Accelerator(device="cpu", strategies={stage: {"minimum_size": 0}})
        rank, size = accelerator.process_index, accelerator.num_processes
        if empty:
            with accelerator.empty_init():
                model = build(name, rank)
        else:
            model = build(name, rank)
        optimizer = sgd(model)
        model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(3):
            part = make_data(torch.Generator().manual_seed(step)).chunk(size)[rank]
            accelerator.backward(loss_of(model.train(), part))
            optimizer.step(), optimizer.zero_grad()
        for (place, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(whole(mine), theirs, rtol=1e-6, atol=1e-6, msg=f"{stage} {place}")
        with torch.no_grad():
            x = make_data(torch.Generator().manual_seed(9))
            torch.testing.assert_close(loss_of(model.eval(), x), loss_of(expected.eval(), x), rtol=1e-5, atol=0)
        accelerator.free_memory()


def plainly(name: str) -> nn.Module:
    """One process, plain torch: the mean loss of two parts, each with the buffers as they were; the first's stay."""
    _, loss_of, make_data = MODELS[name]
    model = build(name, 0)
    optimizer = sgd(model)
    for step in range(3):
        start = {key: value.clone() for key, value in model.named_buffers()}
        for part in reversed(make_data(torch.Generator().manual_seed(step)).chunk(2)):
            for key, value in model.named_buffers():
                value.copy_(start[key])
            (loss_of(model.train(), part) / 2).backward()
        optimizer.step(), optimizer.zero_grad()
    return model


def sgd(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_several_families(name: str) -> None:
    if name != "resnet":
        pytest.importorskip("transformers")
    run(2, family, STAGES, name, timeout=100)

"""Models of all kinds, each of four small blocks that two and four processes can divide, with data and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, LENGTH, LAYERS = 48, 32, 4, 8, 4
BATCH, MARK = 8, 47

Sample = dict[str, Tensor]


class Block(nn.Module):
    """[b, t, WIDTH] -> the same, with attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))  # of keys, it has no gradient
        self.o = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        normed = self.first(x)
        q, k, v = (layer(normed).view(b, t, HEADS, d // HEADS).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1)).masked_fill(torch.ones(t, t).tril() == 0, float("-inf"))
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        out: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return out


class GPT(nn.Module):
    """Tokens [b, t] -> logits [b, t, VOCABULARY]."""

    def __init__(self, tied: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        self.blocks = nn.ModuleList([Block()] * LAYERS if shared else [Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.places
        for index, block in enumerate(self.blocks):
            if not self.skips(index, tokens):
                x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out

    def skips(self, index: int, tokens: Tensor) -> bool:
        """Whether a block is left out."""
        return False


class Choosy(GPT):
    """Leaves out a block for batches that are marked."""

    def skips(self, index: int, tokens: Tensor) -> bool:
        return index == 2 and bool((tokens[:, 0] == MARK).all())


class Translator(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.transformer = nn.Transformer(WIDTH, HEADS, 2, 2, 64, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embedding(tokens)
        out: Tensor = self.head(self.transformer(x, x, tgt_mask=mask))
        return out


class CNN(nn.Module):
    """Images [b, 3, 12, 12] -> [b, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 6)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)) for _ in range(LAYERS)))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.blocks(self.start(images))).mean((2, 3)))
        return out


def _tokens(index: int) -> Sample:
    return {"tokens": torch.randint(3, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))}


def _marked(index: int) -> Sample:
    """Every other batch is marked, in all its samples."""
    tokens = _tokens(index)["tokens"]
    tokens[0] = MARK if index // BATCH % 2 else 3
    return {"tokens": tokens}


def _labelled(index: int) -> Sample:
    tokens = _tokens(index)["tokens"]
    return {"input_ids": tokens, "labels": tokens.flip(0)}


def _images(index: int) -> Sample:
    images = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(index))
    return {"pixel_values": images, "labels": torch.tensor(index % 6)}


def _next_token(model: nn.Module, batch: Sample) -> Tensor:
    tokens = batch["tokens"]
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _class(model: nn.Module, batch: Sample) -> Tensor:
    return F.cross_entropy(model(batch["pixel_values"]), batch["labels"])


def _own_loss(model: nn.Module, batch: Sample) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


class Case(NamedTuple):
    """How to make a model, a sample of its data by index, and the mean loss of a batch."""

    make: Callable[[], nn.Module]
    sample: Callable[[int], Sample]
    loss: Callable[[nn.Module, Sample], Tensor]


_SMALL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_PAIR = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_HEADS = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}


def _hugging_face(kind: str, task: str, sample: Callable[[int], Sample] = _labelled, **settings: Any) -> Case:
    def make() -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, kind + task)(getattr(transformers, f"{kind}Config")(**settings))
        return model

    return Case(make, sample, _own_loss)


OWN = {
    "gpt": Case(GPT, _tokens, _next_token),
    "tied gpt": Case(lambda: GPT(tied=True), _tokens, _next_token),
    "shared blocks": Case(lambda: GPT(shared=True), _tokens, _next_token),
    "if on data": Case(Choosy, _marked, _next_token),
    "nn.Transformer": Case(Translator, _tokens, _next_token),
    "cnn": Case(CNN, _images, _class),
}

HUGGING_FACE = {
    "bert": _hugging_face("Bert", "ForMaskedLM", **_SMALL, **_STILL, vocab_size=VOCABULARY),
    "gpt2": _hugging_face(
        "GPT2",
        "LMHeadModel",
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=16,
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **_TOKENS},
    ),
    "llama": _hugging_face("Llama", "ForCausalLM", **_SMALL, **_TOKENS, num_key_value_heads=2),
    "mixtral": _hugging_face("Mixtral", "ForCausalLM", **_SMALL, **_TOKENS, num_key_value_heads=2, num_local_experts=4),
    "t5": _hugging_face(
        "T5",
        "ForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=HEADS,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    ),
    "bart": _hugging_face("Bart", "ForConditionalGeneration", **_PAIR, **_HEADS, **_TOKENS, d_model=WIDTH, dropout=0.0),
    "vit": _hugging_face(
        "ViT", "ForImageClassification", _images, **_SMALL, **_STILL, image_size=12, patch_size=4, num_labels=6
    ),
}

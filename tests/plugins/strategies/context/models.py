"""Models with sequences, each with a batch and a loss; small enough for several processes on one core."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, HEADS, LENGTH, LAYERS = 48, 32, 4, 16, 2


class Attention(nn.Module):
    """One projection for query, key and value, and torch's own attention, as in nanoGPT."""

    heads, dropout = HEADS, 0.0

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, t, d = x.size()
        q, k, v = (part.view(b, t, self.heads, d // self.heads).transpose(1, 2) for part in self.qkv(x).split(d, 2))
        return self.o(self.mix(q, k, v).transpose(1, 2).contiguous().view(b, t, d))

    def mix(self, q, k, v):
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


class OneHead(Attention):
    """A head that does not divide."""

    heads = 1


class DroppingHead(OneHead):
    dropout = 0.5


class ManualAttention(Attention):
    """The same, spelled out."""

    def mix(self, q, k, v):
        t = q.shape[-2]
        scores = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5
        return scores.masked_fill(torch.ones(t, t).tril() == 0, float("-inf")).softmax(-1) @ v


class Block(nn.Module):
    def __init__(self, attention, dropout):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), attention(), nn.LayerNorm(WIDTH)
        self.up, self.down, self.dropout = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Tokens [B, T] -> logits [B, T, VOCABULARY]; input and output share one embedding."""

    def __init__(self, attention=Attention, dropout=0.0, reentrant=None):
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(attention, dropout) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.reentrant = reentrant

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            recompute = self.training and self.reentrant is not None
            x = checkpoint(block, x, use_reentrant=self.reentrant) if recompute else block(x)
        return self.head(self.norm(x))


class Classifier(nn.Module):
    """A BERT-like encoder with a padding mask, that classifies by its first position."""

    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        seen = (tokens != 0)[:, None, None, :]
        x = self.norm(x + self.o(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)))
        return self.head(x[:, 0].tanh())


class Seq2Seq(nn.Module):
    """torch's own encoder and decoder, with their masks."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        x, padding = self.embedding(tokens), tokens == 0
        future = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        y = self.transformer(x, x, tgt_mask=future, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        return self.head(y)


class Recurrent(nn.Module):
    """Has no attention, and a layer that needs whole sequences."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(VOCABULARY, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0])


def hugging_face(kind):
    """A small model of transformers, without dropout."""
    import transformers

    small = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    llama = {**small, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
    t5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": HEADS}
    if kind == "Llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama))
    config = transformers.T5Config(**t5, dropout_rate=0.0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def tokens(seed, rows=2, length=LENGTH):
    made = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    made[0, -3:] = 0  # padding
    return made


def loss_of(model, seed):
    """Of the next token, or of a class; by transformers themselves where they have one."""
    x = tokens(seed)
    if hasattr(model, "config"):
        return model(input_ids=x, attention_mask=(x != 0).long(), labels=x).loss
    logits = model(x)
    if logits.dim() == 2:
        return F.cross_entropy(logits, x[:, 0] % 6)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())

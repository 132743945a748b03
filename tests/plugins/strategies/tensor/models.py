"""Models as people write them, each with a batch and a loss; small enough for several processes on one core."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, LENGTH, LAYERS = 48, 32, 4, 8, 2


class Attention(nn.Module):
    """Separate projections, cut into heads by their number, as in many tutorials."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (layer(x).view(b, t, HEADS, d // HEADS).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1)) / (d // HEADS) ** 0.5
        scores = scores.masked_fill(torch.ones(t, t).tril() == 0, float("-inf"))
        out = self.dropout(scores.softmax(-1)) @ v
        return self.o(out.transpose(1, 2).contiguous().view(b, t, d))


class Block(nn.Module):
    def __init__(self, attention=Attention):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small language model of one's own; the positions are a bare parameter."""

    def __init__(self, tied=False, shared=False, attention=Attention):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, LENGTH, WIDTH) / 10)
        made = [Block(attention) for _ in range(1 if shared else LAYERS)]
        self.blocks = nn.ModuleList(made * (LAYERS if shared else 1))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = nn.Parameter(self.head.weight.detach().t().contiguous().t())  # lies by columns
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tied_gpt():
    return GPT(tied=True)


def shared_gpt():
    return GPT(shared=True)


class Short(GPT):
    """Sequences that neither two nor four processes can divide evenly; the rest of what it is given it leaves out."""

    def forward(self, tokens):
        out = super().forward(tokens[:, : LENGTH - 1])
        return F.pad(out, (0, 0, 0, 1))


def short_gpt():
    return Short()


class FusedAttention(nn.Module):
    """One projection for query, key and value, and torch's own attention, as in nanoGPT."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, t, d = x.size()
        q, k, v = (part.view(b, t, HEADS, d // HEADS).transpose(1, 2) for part in self.qkv(x).split(d, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).contiguous().view(b, t, d))


class StackedAttention(FusedAttention):
    """The same with one dim for query, key and value, as in many vision transformers."""

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


def stacked_gpt():
    return GPT(attention=StackedAttention)


def fused_gpt():
    return GPT(attention=FusedAttention)


class RotatedAttention(Attention):
    """Rotates pairs of a head's numbers, spelled out and as complex numbers, and writes products as sums."""

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (layer(x).view(b, t, HEADS, d // HEADS) for layer in (self.q, self.k, self.v))
        angles = torch.arange(t)[:, None] / 10 ** torch.arange(d // HEADS // 2)
        cos, sin = (part.repeat_interleave(2, -1)[:, None] for part in (angles.cos(), angles.sin()))
        q = q * cos + torch.stack([-q[..., 1::2], q[..., ::2]], -1).flatten(-2) * sin
        turned = torch.view_as_complex(k.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, torch.view_as_real(turned).flatten(-2))
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return self.o(mixed.reshape(b, t, d))


def rotated_gpt():
    return GPT(attention=RotatedAttention)


class WritingAttention(Attention):
    """Adds up what is before each position, written into what it has allocated."""

    def forward(self, x):
        q, out = self.q(x), torch.zeros_like(x)
        out[:, 0] = q[:, 0]
        kept = torch.zeros_like(q).copy_(q)
        for position in range(1, x.shape[1]):
            kept[:, position] = q[:, position] + kept[:, position - 1].sigmoid()
        return self.o(out + kept * self.k(x))


def writing_gpt():
    return GPT(attention=WritingAttention)


class Marked(GPT):
    """Begins with a token of its own: two parameters are added, and have one gradient where there is one sample."""

    def __init__(self):
        super().__init__()
        self.mark = nn.Parameter(torch.randn(1, 1, WIDTH) / 10)

    def forward(self, tokens):
        x = torch.cat([self.mark.expand(len(tokens), -1, -1), self.embedding(tokens[:, 1:])], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Choosy(GPT):
    """Leaves out a block for batches that begin with an even token."""

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions[:, : tokens.shape[1]]
        x = self.blocks[0](x)
        if tokens[0, 0] % 2:
            x = self.blocks[1](x)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """torch's own encoder layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)))


class Seq2Seq(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(self.transformer(x, x))


class Recurrent(nn.Module):
    """An LSTM, and layers without a norm between them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(VOCABULARY, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, VOCABULARY)
        )

    def forward(self, tokens):
        return self.layers(self.lstm(self.embedding(tokens))[0])


class FunctionalHead(GPT):
    """Reads the embedding's weight for its head, outside of the embedding's own forward."""

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions[:, : tokens.shape[1]]
        return F.linear(self.norm(self.blocks[0](x)), self.embedding.weight)


def hugging_face(kind, changes=()):
    """A small model of transformers, without dropout."""
    import transformers

    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "intermediate_size": 64,
        "pad_token_id": 0,
        **dict(changes),
    }
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    gpt2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 1, "n_head": HEADS, "n_positions": 16}
    t5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": HEADS}
    made = {
        "Bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**small, **none)),
        "GPT2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                **gpt2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0
            )
        ),
        "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{"num_key_value_heads": 2, **small})),
        "Mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=4)
        ),
        "T5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(**t5, dropout_rate=0.0, decoder_start_token_id=0)
        ),
        "ViT": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**{**small, **none, "image_size": 12, "patch_size": 4, "num_labels": 6})
        ),
    }
    return made[kind]()


def tokens(seed, rows=4):
    return torch.randint(1, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def loss_of(model, seed, rows=4):
    """The loss of a batch: of the next token, or of a class for a ViT."""
    x = tokens(seed, rows)
    if type(model).__name__.startswith("ViT"):
        images = torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
        return model(pixel_values=images, labels=x[:, 0] % 6).loss
    if type(model).__name__.startswith("T5"):
        return model(input_ids=x, labels=x.flip(1)).loss
    out = model(x)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())

"""A small GPT that learns to write Python, byte by byte, from the standard library's own source.

accel launch examples/language_model.py
accel launch --num_processes 2 examples/language_model.py --layers 6 --width 256 --steps 2000
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset

from accel import Accelerator
from accel.utils import set_seed, tqdm

BYTES = 256


def read_source(megabytes):
    """The standard library's own modules, one after another, as bytes [N]."""
    text, wanted = bytearray(), int(megabytes * 2**20)
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
    return torch.frombuffer(text[:wanted], dtype=torch.uint8)


class Windows(Dataset):
    """Random windows of a text: sample i is the bytes [context + 1] at a place drawn once for all."""

    def __init__(self, text, context, count, seed):
        self.text, self.context = text, context
        self.starts = torch.randint(len(text) - context, (count,), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        start = self.starts[index]
        return self.text[start : start + self.context + 1].long()


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to its input: [B, T, width] -> [B, T, width]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts
        )  # [B, heads, T, width / heads]
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes [B, T] -> logits of the byte that follows each, [B, T, 256]. Input and output share one embedding."""

    def __init__(self, layers, heads, width, context):
        super().__init__()
        self.context = context
        self.embed, self.position = nn.Embedding(BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, text):
        x = self.embed(text) + self.position(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def write(self, prompt, count, temperature=0.8):
        """Continue a prompt by `count` bytes."""
        text = torch.tensor([list(prompt.encode())], device=self.embed.weight.device)
        for _ in range(count):
            logits = self(text[:, -self.context :])[:, -1] / temperature
            text = torch.cat([text, logits.softmax(dim=-1).multinomial(1)], dim=1)
        return bytes(text[0].tolist()).decode(errors="replace")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=64, help="bytes that the model sees")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=16, help="windows in a step, over all processes")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--megabytes", type=float, default=4, help="how much source to read")
    parser.add_argument("--sample", type=int, default=200, help="bytes to write at the end")
    return parser.parse_args()


def main():
    args = parse_arguments()
    accelerator = Accelerator(split_batches=True)
    set_seed(0)
    steps_of_data = args.steps * accelerator.gradient_accumulation_steps
    data = Windows(read_source(args.megabytes), args.context, steps_of_data * args.batch_size, seed=0)
    loader = DataLoader(data, batch_size=args.batch_size)
    model = GPT(args.layers, args.heads, args.width, args.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(args.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
    )
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    accelerator.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data.text):,} bytes of Python")

    model.train()
    step, losses = 0, []
    progress = tqdm(total=args.steps, desc="training")
    for windows in loader:
        with accelerator.accumulate(model):
            optimizer.zero_grad()
            logits = model(windows[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        losses.append(loss.detach())
        if not accelerator.sync_gradients:
            continue
        step += 1
        progress.update()
        if step == 1 or step % max(args.steps // 10, 1) == 0:
            mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            if accelerator.is_main_process:
                progress.write(f"step {step}: loss {mean:.3f}")
            losses.clear()
    progress.close()

    model.eval()
    accelerator.print(model.write("def ", args.sample))
    accelerator.end_training()


if __name__ == "__main__":
    main()

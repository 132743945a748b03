"""A training that can be stopped at any time and goes on where it was: two lines, `resume` and `loader.epoch`.

    accel launch --cpu --num_processes 2 --save_on_signal --max_restarts 3 examples/resume.py

Send SIGTERM to a worker, or kill it: the run goes on. Or press Ctrl-C and start it again, on any number of processes.
Checkpoints are kept in `--project_dir`, by default the current folder.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel import Accelerator

BATCH, SAVE_EVERY = 12, 50


def make_dataset() -> TensorDataset:
    """Noisy samples of a curve."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(1200, 1, generator=generator) * 6 - 3
    return TensorDataset(x, torch.sin(x) + 0.1 * torch.randn(x.shape, generator=generator))


def main() -> None:
    """Train, save now and then, and print the loss over all data."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0, help="that each step pretends to take")
    arguments = parser.parse_args()

    accelerator = Accelerator(split_batches=True)  # the batch size is of all processes together, however many
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), nn.Dropout(0.1), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    dataset = make_dataset()
    loader = DataLoader(dataset, BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    accelerator.resume()
    for epoch in range(loader.epoch, arguments.epochs):
        for step, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            time.sleep(arguments.seconds)
            if step % SAVE_EVERY == SAVE_EVERY - 1:
                accelerator.save_state()
        accelerator.print(f"epoch {epoch} done")

    model.eval()
    with torch.no_grad():
        x, y = dataset.tensors
        accelerator.print(
            f"loss {nn.functional.mse_loss(model(x.to(accelerator.device)), y.to(accelerator.device)):.9f}"
        )


if __name__ == "__main__":
    main()

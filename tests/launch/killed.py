"""The training that the kill tests kill. It resumes, notes what it trains on, and ends as KILL says.

KILL is "none", or "who event rank count delay": when `event` (an audit event of python's, such as "os.rename", or
"step") has happened `count` times on this rank, and after so many microseconds, this process, or one above it, or all
of them, are killed. Arguments: folder, name of the run.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel import Accelerator

SAMPLES, BATCH, EPOCHS, WINDOW = 60, 6, 3, 2


class Steps:
    """Optimizer steps since the first run began."""

    def __init__(self) -> None:
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Killer:
    """Carries out KILL."""

    def __init__(self, order: str, rank: int) -> None:
        self.who, self.event, victim, count, delay = order.split()
        self.left, self.delay = int(count), int(delay) / 1e6
        if rank == int(victim):
            sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != self.event:
            return
        self.left -= 1
        if self.left == 0 and self.delay:
            threading.Thread(target=self.kill, daemon=True).start()
        elif self.left == 0:
            self.kill()

    def kill(self) -> None:
        time.sleep(self.delay)
        agent = os.getppid()
        launcher = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
        if self.who == "group":
            os.killpg(os.getpgid(0), signal.SIGKILL)
        os.kill({"worker": os.getpid(), "agent": agent, "launcher": launcher}[self.who], signal.SIGKILL)


def main(folder: Path, name: str) -> None:
    """Train to the end; the main process leaves a hash of the weights."""
    accelerator = Accelerator(
        split_batches=True, gradient_accumulation_steps=WINDOW, total_limit=2, project_dir=str(folder)
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = TensorDataset(torch.arange(SAMPLES, dtype=torch.float32).reshape(-1, 1))
    loader = DataLoader(data, BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = Steps()
    accelerator.register_for_checkpointing(steps)
    accelerator.resume()
    rank = accelerator.process_index
    ledger = os.open(folder / f"ledger.{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(ledger, f"from {steps.done}\n".encode())
    if os.environ["KILL"] != "none":
        Killer(os.environ["KILL"], rank)
    for epoch in range(loader.epoch, EPOCHS):
        for (x,) in loader:
            sys.audit("step")
            with accelerator.accumulate(model):
                accelerator.backward(model(x / SAMPLES).square().mean())
                os.write(ledger, f"{steps.done} {epoch} {' '.join(str(int(i)) for i in x)}\n".encode())
                optimizer.step(), optimizer.zero_grad()
                steps.done += accelerator.sync_gradients
            if random.Random(loader.state_dict()["samples"][0]).random() < 0.4:  # also amid a window
                accelerator.save_state()
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        weights = b"".join(tensor.numpy().tobytes() for tensor in state.values())
        (folder / "hash").write_text(hashlib.sha256(weights).hexdigest())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""What is trained where methods are compared: the data, read once, and two tasks that take their weights from outside.

A batch is a function of a seed and the step's number alone, so every method sees the same ones. The byte-level GPT is
the examples' (examples/gpt.py), and so is its text, the sources of Python's standard library.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from reporting import machine

sys.path.insert(0, str(machine.ROOT / "examples"))
from gpt import GPT, GPTConfig
from train_gpt import Preset, read_corpus, training_batch, windows

__all__ = [
    "GPT",
    "GPTConfig",
    "Images",
    "Preset",
    "Text",
    "Weights",
    "digest",
    "load_data",
    "lr_factor",
    "training_batch",
    "windows",
]

Weights = dict[str, Tensor]


# Data


def _standard_library() -> Tensor:
    return torch.frombuffer(bytearray(read_corpus(None)), dtype=torch.uint8)


def _manuals() -> Tensor:
    """The pages of Debian's package manpages-dev, in the order of their paths."""
    try:
        listed = subprocess.run(["dpkg", "-L", "manpages-dev"], capture_output=True, text=True, check=True).stdout
        paths = sorted(path for line in listed.splitlines() if (path := Path(line)).suffix == ".gz" and path.is_file())
    except (OSError, subprocess.CalledProcessError):
        paths = []
    if not paths:
        raise RuntimeError("the second text is Debian's package manpages-dev: apt-get install it")
    pages = [gzip.decompress(path.read_bytes()) for path in paths if not path.is_symlink()]
    return torch.frombuffer(bytearray(b"\n".join(pages)), dtype=torch.uint8)


def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.cat((torch.from_numpy(pixels), torch.from_numpy(labels)[:, None]), dim=1).to(torch.uint8)


@cache
def load_data(name: str) -> Tensor:
    """The data in uint8, read once: "text" or "manuals", bytes, or "digits", rows of 64 pixels and the label."""
    return {"text": _standard_library, "manuals": _manuals, "digits": _digits}[name]()


@cache
def digest(name: str) -> str:
    """The SHA-256 of the data: the standard library differs from one version of Python to the next."""
    return hashlib.sha256(load_data(name).numpy().tobytes()).hexdigest()


# Tasks


class Text:
    """The next byte of a text, by a GPT. The last tenth of the text is for validation."""

    def __init__(self, spec: dict[str, Any], data: Tensor, seed: int) -> None:
        self.preset = Preset(GPTConfig(**spec["model"]), spec["batch_size"], spec["steps"])
        self.seed = seed
        self.train_data, self.validation_data = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
        self.starts = torch.arange(count := spec["validation_windows"])
        self.starts = self.starts * (len(self.validation_data) - self.preset.model.block_size) // count
        self.model: nn.Module = GPT(self.preset.model)

    def loss(self, weights: Weights, step: int) -> Tensor:
        return functional_call(self.model, weights, training_batch(self.train_data, self.preset, self.seed, step))

    def validate(self, weights: Weights) -> list[float]:
        """The mean loss over windows spread evenly across the text for validation."""
        total = 0.0
        for part in self.starts.split(self.preset.batch_size):
            batch = windows(self.validation_data, part, self.preset.model.block_size)
            total += functional_call(self.model, weights, batch).item() * len(part)
        return [total / len(self.starts)]


class Images:
    """A CNN on 8 x 8 digits. A third of the images, drawn by the seed, is for validation."""

    def __init__(self, spec: dict[str, Any], data: Tensor, seed: int) -> None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        data = data[order]
        self.images, self.labels = data[:, :-1].float().view(-1, 1, 8, 8) / 16, data[:, -1].long()
        self.n_train = len(data) * 2 // 3
        self.seed, self.batch_size = seed, spec["batch_size"]
        a, b = spec["model"]["channels"]
        self.model: nn.Module = nn.Sequential(
            nn.Conv2d(1, a, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(a, b, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * b, 10),
        )

    def loss(self, weights: Weights, step: int) -> Tensor:
        epoch, batch = divmod(step, self.n_train // self.batch_size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        chosen = torch.randperm(self.n_train, generator=generator)[batch * self.batch_size :][: self.batch_size]
        return F.cross_entropy(functional_call(self.model, weights, (self.images[chosen],)), self.labels[chosen])

    def validate(self, weights: Weights) -> list[float]:
        """The mean loss and the share of wrong answers."""
        labels = self.labels[self.n_train :]
        logits = functional_call(self.model, weights, (self.images[self.n_train :],))
        wrong = (logits.argmax(1) != labels).float().mean()
        return [F.cross_entropy(logits, labels).item(), wrong.item()]


def lr_factor(step: int, steps: int, last: float = 0.0) -> float:
    """Linear warm-up over the first tenth, then a cosine down to `last`."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return last + (1 - last) * cosine

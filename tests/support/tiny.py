"""A training that libraries repeat: a tiny network on data made on the spot, and the same loop in plain torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: What libraries are given: the momentum in 2 bits, so that a state that is cast on its way shows.
OPTIONS = {"lr": 1e-2, "state_dtype": "int2"}
CLIP = 0.5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(number: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(number))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(x).square().mean()
    return found


def copies(params: Iterable[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a.detach(), b.detach()) for a, b in zip(one, other, strict=True))


def trained(cls: type, steps: int, accumulated: int = 1, **options: Any) -> list[Tensor]:
    """Parameters after so many steps of a loop in plain torch, each with clipped gradients, at a constant rate."""
    model = network()
    optimizer = cls(model.parameters(), **{**OPTIONS, **options})
    for number in range(steps * accumulated):
        (loss_of(model, batch(number)) / accumulated).backward()
        if (number + 1) % accumulated == 0:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return copies(model.parameters())

"""What trains beside what: mean gradients or votes, and the optimizer that takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import signadam_ext


@dataclass(frozen=True)
class Method:
    """Attributes:
    exchange: what workers make of their gradients: "mean" of them, "majority" or "mean vote".
    momentum: of each worker, before its vote.
    """

    key: str
    label: str
    exchange: str
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    momentum: float = 0.0

    @property
    def votes(self) -> bool:
        return self.exchange != "mean"


_ADAMW = {"fused": True, "betas": (0.9, 0.95)}
METHODS = (
    Method("adamw", "mean gradients, AdamW", "mean", torch.optim.AdamW, _ADAMW),
    Method("sign_adam_pp", "mean gradients, SignAdamPP", "mean", signadam_ext.SignAdamPP),
    Method("majority", "majority, then SignAdamPP", "majority", signadam_ext.SignAdamPP),
    Method("majority_alone", "majority, no momentum", "majority", signadam_ext.SignSGD),
    Method("majority_momentum", "majority of momenta", "majority", signadam_ext.SignSGD, momentum=0.9),
    Method("mean_vote", "mean vote, then MSGD", "mean vote", signadam_ext.MSGD),
)
BY_KEY = {method.key: method for method in METHODS}
ADAMW, PLUS = "adamw", "sign_adam_pp"


@dataclass(frozen=True)
class Attack:
    """What `adversaries` of the workers send: `factor` times what an honest one would."""

    adversaries: int = 0
    factor: float = -1.0

    @property
    def name(self) -> str:
        return f"{self.adversaries}adversaries{f'x{-self.factor:g}' if self.adversaries else ''}"


HONEST = Attack()
#: Of 5 workers, by method. A vote reads the sign alone, so that a factor is nothing to it.
WORKERS_ATTACKED = 5
ATTACKS: dict[str, tuple[Attack, ...]] = {
    "sign_adam_pp": (HONEST, Attack(1), Attack(2), Attack(1, -10), Attack(2, -10)),
    "majority": (HONEST, Attack(1), Attack(2)),
    "majority_momentum": (HONEST, Attack(1), Attack(2)),
}

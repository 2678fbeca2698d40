"""What is compared: rules, and changes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

import signadam_ext
from experiments.convergence.methods import Method

ADAMW = "adamw"


@dataclass(frozen=True)
class Change:
    """Something of a rule that is tried beside the rule as it is. A candidate has one of each kind at most."""

    key: str
    label: str
    kind: str
    options: dict[str, Any]
    steps: int = 0  # on the grid of rates, from the rule's best rate to where the search begins


CAUTIOUS = Change("cautious_decay", "cautious decay", "decay", {"weight_decay_kind": "cautious"})
CAUTION = Change("caution", "caution", "scale", {"caution": "delayed"})
# Matrices begin with a root mean square of about a tenth, or of 0: a rate ten times as large.
RMS = Change("rms", "lr by RMS", "scale", {"lr_scale": "rms"}, steps=4)


def _beta(beta: float, /, **options: Any) -> Change:
    return Change(f"beta{beta:g}", f"beta {beta:g}", "beta", options)


@dataclass(frozen=True)
class Rule:
    key: str
    label: str
    optimizer: str  # of signadam_ext, or torch's AdamW, which is what all are compared with
    options: dict[str, Any]
    lr: float  # where the search begins in the first rung
    moments: int
    changes: tuple[Change, ...] = ()

    @property
    def made_by(self) -> type[torch.optim.Optimizer] | None:
        """None where the module does not have it."""
        return torch.optim.AdamW if self.key == ADAMW else getattr(signadam_ext, self.optimizer, None)

    @property
    def competes(self) -> bool:
        """Whether it can go on; the others are companions of comparison."""
        return self.moments <= 1


def _changes(*betas: Change) -> tuple[Change, ...]:
    return (CAUTIOUS, CAUTION, RMS, *betas)


_BETA = (_beta(0.95, beta=0.95), _beta(0.98, beta=0.98))
#: Lion's authors advise the first for language models; the update's average alone is longer in the second.
_LION = (_beta(0.95, betas=(0.95, 0.98)), _beta(0.98, betas=(0.98, 0.99)))
RULES = (
    Rule(ADAMW, "AdamW", "AdamW", {"fused": True, "betas": (0.9, 0.95)}, 2e-3, 2),
    Rule("sign_adam_pp", "SignAdamPP", "SignAdamPP", {}, 2e-3, 1, _changes(*_BETA)),
    Rule("signum", "Signum", "Signum", {}, 6e-4, 1, _changes(*_BETA)),
    Rule("signum_nesterov", "Signum, Nesterov", "Signum", {"nesterov": True}, 6e-4, 1, _changes(*_BETA)),
    Rule("lion", "Lion", "Lion", {}, 6e-4, 1, _changes(*_LION)),
    Rule(
        "adam_s",
        "AdamS",
        "AdamS",
        {},
        2e-3,
        1,
        _changes(_beta(0.95, betas=(0.95, 0.95)), _beta(0.98, betas=(0.98, 0.98))),
    ),
    Rule("bcos", "BCOS", "BCOS", {}, 1e-3, 1, _changes(*_BETA)),
    # A gradient of norm 1 over 0.66M entries has a root mean square of 1e-3, its average less.
    Rule("lion_k_huber", "LionK, Huber 1e-4", "LionK", {"kappa": "huber", "epsilon": 1e-4}, 1e-3, 1, _changes(*_LION)),
    Rule(
        "lion_k_threshold",
        "LionK, threshold 3e-5",
        "LionK",
        {"kappa": "threshold", "epsilon": 3e-5},
        6e-4,
        1,
        _changes(*_LION),
    ),
    Rule("ano", "Ano", "Ano", {}, 6e-4, 2),
    Rule("laprop", "LaProp", "LaProp", {"betas": (0.9, 0.95)}, 2e-3, 2),
)


@dataclass(frozen=True)
class Candidate:
    """A rule with changes, in the order of the rule's."""

    rule: Rule
    changes: tuple[Change, ...] = field(default=())

    @property
    def key(self) -> str:
        return "+".join((self.rule.key, *(change.key for change in self.changes)))

    @property
    def label(self) -> str:
        return ", ".join((self.rule.label, *(change.label for change in self.changes)))

    @property
    def options(self) -> dict[str, Any]:
        merged = dict(self.rule.options)
        for change in self.changes:
            merged |= change.options
        return merged

    @cached_property
    def method(self) -> Method:
        """As `experiments.convergence` trains it."""
        made_by = self.rule.made_by
        assert made_by is not None, f"this build of signadam_ext has no {self.rule.optimizer}"
        return Method(self.key, self.label, made_by, self.options)


def together(rule: Rule, changes: Sequence[Change]) -> Candidate:
    """A rule with several changes, of which earlier ones have precedence over others of their kind."""
    first: dict[str, Change] = {}
    for change in changes:
        first.setdefault(change.kind, change)
    return Candidate(rule, tuple(change for change in rule.changes if change in first.values()))

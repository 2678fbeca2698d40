"""The methods that are compared: rules in fp32, and the forms of storage of one of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

import signadam_ext


@dataclass(frozen=True)
class Method:
    key: str
    label: str
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    #: The method around whose best learning rate this one's search begins; None: around the problem's.
    begins_at: str | None = None
    bf16: bool = False  # how weights are stored
    long: bool = False  # whether it is in the longer comparison too

    @property
    def stored(self) -> bool:
        """Whether it is a form of storage."""
        return "state_dtype" in self.options


def _plus(key: str, label: str, **options: Any) -> Method:
    return Method(f"sign_adam_pp{key}", label, signadam_ext.SignAdamPP, options)


def _form(state: str, param_storage: str, label: str, beta: float = 0.9, weights: str = "bf16") -> Method:
    options = {"state_dtype": state, "param_storage": param_storage, "beta": beta}
    key = f"_{state}_{param_storage}" + (f"_beta{beta:g}" if beta != 0.9 else "")
    if weights == "fp32":
        key += "_fp32_weights"
    return replace(_plus(key, label, **options), begins_at=same_in_fp32(beta), bf16=weights == "bf16")


def same_in_fp32(beta: float) -> str:
    """The key of SignAdamPP with this beta, in fp32."""
    return PLUS if beta == 0.9 else f"{PLUS}_beta{beta:g}"


ADAMW, PLUS, FEW_BITS = "adamw", "sign_adam_pp", "sign_adam_pp_int2_stochastic"
REFERENCES = (ADAMW, PLUS)
METHODS = (
    # The betas that are usual for a language model, as the reference; then torch's own.
    Method(ADAMW, "AdamW, betas 0.9, 0.95", torch.optim.AdamW, {"fused": True, "betas": (0.9, 0.95)}, long=True),
    Method("adamw_beta2_0.999", "AdamW, betas 0.9, 0.999", torch.optim.AdamW, {"fused": True, "betas": (0.9, 0.999)}),
    Method("lion", "Lion", signadam_ext.Lion, long=True),
    Method("signum", "Signum", signadam_ext.Signum, long=True),
    replace(_plus("", "SignAdamPP"), long=True),
    Method("sign_adam", "SignAdam", signadam_ext.SignAdam),
    _plus("_adaptive0.5", "SignAdamPP, adaptive 0.5", confidence="adaptive", alpha=0.5),
    _plus("_beta0.95", "SignAdamPP, beta 0.95", beta=0.95),
    replace(_form("int2", "stochastic", "int2, bf16 stochastic"), long=True),
    _form("int4", "stochastic", "int4, bf16 stochastic"),
    _form("int8", "stochastic", "int8, bf16 stochastic"),
    _form("fp32", "stochastic", "fp32, bf16 stochastic"),
    _form("int2", "nearest", "int2, bf16 nearest"),
    _form("int2", "split8", "int2, bf16 split8"),
    _form("int2", "split16", "int2, bf16 split16"),
    _form("int2", "nearest", "int2, fp32 weights", weights="fp32"),
    _form("int2", "stochastic", "int2, bf16 stochastic, beta 0.95", beta=0.95),
)
BY_KEY = {method.key: method for method in METHODS}

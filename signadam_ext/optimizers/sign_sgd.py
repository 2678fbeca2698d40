"""SIGN-SGD with a confidence gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import checks
from ..lists import step_lists
from ..optimizer import Params, SignOptimizer
from ..rule import Rule

RULE = Rule("sign_sgd", moments=(), scalars=lambda group, t: {"alpha": float(group["alpha"])})


class SignSGD(SignOptimizer):
    r"""SIGN-SGD [BW], called stochastic sign descent in [BH], with the confidence gate of [SA].

    .. math::
        p_t = p_{t-1} - \mathrm{lr} \cdot c(g_t), \qquad
        c(g) = \mathrm{sign}(g) \text{ if } |g| > \alpha \text{ else } 0

    With ``alpha=0`` this is plain sign descent. A zero or NaN gradient moves nothing. With ``alpha=5e-4`` it
    computes what the released code of [SA] computes, which updates its momentum but steps by the gated sign. There
    is no moment; the state holds ``step`` alone.

    Args:
        params: parameters, named parameters, or groups; fp32, bf16 or fp16, any shape.
        lr: learning rate, at least 0; every entry moves by exactly this much. A float or a CPU tensor of one
            element. The default is [SA]'s for MNIST; [SA] uses 1e-4 on CIFAR.
        alpha: threshold of the gate, at least 0, absolute, in units of the gradient.
        weight_decay: at least 0.
        decoupled_weight_decay: ``p *= 1 - lr * weight_decay`` before the update (True), or ``g += weight_decay * p``
            before the gate (False).
        maximize: ascend instead of descend.
        weights: how a bf16 or fp16 parameter keeps what its dtype cannot hold. "as_is": rounded to nearest, so that
            steps below half its last place are lost. "stochastic": rounded up or down at random, right on average.
            "split16", "split8" (bf16 only): the low 16 bits of fp32, which makes it exact fp32 training in 4 bytes,
            or the next 8 and the rest stochastically, are kept beside it. "master": an fp32 copy is. An fp32
            parameter is its own master under "stochastic" and "master". A parameter set from outside wins over its
            copy.
        seed: of the random bits, in [0, 2^64). They are a function of seed, parameter, step and element, so they are
            the same on every backend and in a resumed run; no global generator is touched.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
        foreach, fused, differentiable: accepted for torch.optim's sake; the update is always fused.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.

    Groups also carry an empty ``betas``, only so that OneCycleLR and CyclicLR accept the optimizer; what they write
    there is not used.

    Sources: [BW] Bernstein et al., arXiv 1802.04434, Alg. 1; [BH] Balles and Hennig, arXiv 1705.07774, Sec. 1.1; [SA]
    Wang et al., arXiv 1907.09008, Alg. 3.
    """

    HYPERPARAMETERS = ("lr", "alpha")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        alpha: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        weights: str = "as_is",
        seed: int = 0,
        backend: str = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "betas": (),
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "weights": weights,
            "seed": seed,
            "backend": backend,
        }
        super().__init__(params, defaults, foreach=foreach, fused=fused, differentiable=differentiable)

    @classmethod
    def _rule(cls, group: dict[str, Any]) -> Rule:
        return RULE

    @classmethod
    def _check_group(cls, group: dict[str, Any]) -> None:
        super()._check_group(group)
        checks.number("alpha", group["alpha"], 0.0)


def sign_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    alpha: float = 0.0,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`SignSGD`, in place on ``params``.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        lr, alpha: as in :class:`SignSGD`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.
    """
    step_lists(SignSGD, params, grads, {}, lr=lr, alpha=alpha, **hyperparameters)

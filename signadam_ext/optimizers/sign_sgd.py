"""SIGN-SGD with a confidence gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, Checks, Number
from ..core.options import WITHOUT_MOMENTS, Common
from ..core.rule import Rule
from .base import Params, SignOptimizer
from .step_lists import step_lists

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
        {params}
        lr: learning rate, at least 0; an entry moves by this much, or not at all where the sign is 0. A float or a CPU
            tensor of one element. The default is [SA]'s for MNIST; [SA] uses 1e-4 on CIFAR.
        alpha: threshold of the gate, at least 0, absolute, in units of the gradient.
        {common}

    Groups also carry an empty ``betas``, only so that OneCycleLR and CyclicLR accept the optimizer; what they write
    there is not used.

    Sources: [BW] Bernstein et al., arXiv 1802.04434, Alg. 1; [BH] Balles and Hennig, arXiv 1705.07774, Sec. 1.1; [SA]
    Wang et al., arXiv 1907.09008, Alg. 3.
    """

    RULE = RULE
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "alpha": Number()}
    COMMON = WITHOUT_MOMENTS

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        alpha: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        own = {
            "lr": lr,
            "alpha": alpha,
            "betas": (),
        }
        super().__init__(params, own, common)


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

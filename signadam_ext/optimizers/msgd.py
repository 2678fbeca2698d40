"""SGD with momentum, as the papers' sign-based methods are compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, ONE_BETA, Checks
from ..core.options import Common
from ..core.rule import Rule, decays
from .base import Params, SignOptimizer
from .step_lists import step_lists

RULE = Rule("msgd", moments=("exp_avg",), scalars=lambda group, t: decays(group, 1))


class MSGD(SignOptimizer):
    r"""M-SGD [BH]: stochastic gradient descent with momentum.

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) g_t, \qquad p_t = p_{t-1} - \mathrm{lr} \cdot m_t

    The momentum is not bias-corrected, unlike [BH]'s: that is a factor :math:`1 - \beta^t` on the learning rate. With
    ``beta=0`` this is plain SGD; ``torch.optim.SGD(momentum=beta)``, whose buffer lacks the factor 1 - beta, takes
    ``lr * (1 - beta)`` for the same steps.

    Args:
        {params}
        lr: learning rate, at least 0. A float or a CPU tensor of one element.
        {beta}
        {unbounded_state}
        {common}

    State: ``exp_avg`` (m) and
        {common_state}

    Source: [BH] Balles and Hennig, arXiv 1705.07774, Sec. 6.
    """

    RULE = RULE
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "betas": ONE_BETA}

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-2, *, beta: float = 0.9, **common: Unpack[Common]
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": (beta,)}, common)


def msgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta: float = 0.9,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`MSGD`, in place on ``params`` and ``exp_avgs``.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs: fp32, of the parameters' shapes and strides; zeros at first.
        lr, beta: as in :class:`MSGD`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.
    """
    step_lists(MSGD, params, grads, {"exp_avg": exp_avgs}, lr=lr, beta=beta, **hyperparameters)

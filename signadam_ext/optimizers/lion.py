"""Lion: the sign of two blends of momentum and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, TWO_BETAS, Checks
from ..core.options import Common
from ..core.rule import Rule, decays
from .base import Params, SignOptimizer
from .step_lists import step_lists

RULE = Rule("lion", moments=("exp_avg",), scalars=lambda group, t: decays(group, 2))


class Lion(SignOptimizer):
    r"""Lion [LI, Alg. 2].

    .. math::
        u_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        p_t &= (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \mathrm{lr} \cdot \mathrm{sign}(u_t) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    ``sign(0) = sign(NaN) = 0``: a weight whose gradient and momentum are 0 stays. One NaN gradient makes its entry of
    ``m`` NaN, and that weight silently stops updating. The decay is not rounded by itself, so that it acts on
    bf16 parameters as well.

    Args:
        {params}
        lr: learning rate, at least 0; an entry moves by this much, or not at all where the sign is 0. A float or a CPU
            tensor of one element.
        betas: weight of the momentum in the step, and its decay, each in [0, 1).
        {unbounded_state}
        {common}

    State: ``exp_avg`` (m) and
        {common_state}

    Source: [LI] Chen et al., arXiv 2302.06675, Alg. 2; [LI] recommends 3 to 10 times the weight decay of AdamW with a
    learning rate as much smaller.
    """

    RULE = RULE
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "betas": TWO_BETAS}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas}, common)


def lion(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    **hyperparameters: Any,
) -> None:
    """One step of :class:`Lion`, in place on ``params`` and ``exp_avgs``.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs: fp32, of the parameters' shapes and strides; zeros at first.
        lr, betas: as in :class:`Lion`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.
    """
    step_lists(Lion, params, grads, {"exp_avg": exp_avgs}, lr=lr, betas=betas, **hyperparameters)

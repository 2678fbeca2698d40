"""Adam, AdamW and AMSGrad: the baselines, fused as everything else here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import FLAG, LEARNING_RATE, TWO_BETAS, Checks, Number
from ..core.options import BUT_DECAY, CommonButDecay
from ..core.rule import Group, Rule, Scalars, decays, power, rule_by
from .base import Params, SignOptimizer
from .step_lists import step_lists


def _scalars(group: Group, t: int) -> Scalars:
    beta1, beta2 = group["betas"]
    return {
        "lr": float(group["lr"]) / (1 - power(beta1, t)),
        **decays(group, 2),
        "bias_correction": math.sqrt(1 - power(beta2, t)),
        "eps": float(group["eps"]),
    }


RULES = {
    False: Rule("adam", moments=("exp_avg", "exp_avg_sq"), scalars=_scalars, uses_step=True),
    True: Rule("adam_amsgrad", moments=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), scalars=_scalars, uses_step=True),
}


class Adam(SignOptimizer):
    r"""Adam [KB, Alg. 1], with ``amsgrad`` as ``torch.optim.Adam`` has it.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= p_{t-1} - \frac{\mathrm{lr}}{1 - \beta_1^t} \cdot
        \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Equal to ``torch.optim.Adam`` up to rounding, not bit for bit: torch's ``lerp`` and ``addcmul`` round once where
    this rounds each operation. A step's error is at most that of its some fifteen operations, each 2^-24 of its
    result; the tests carry that bound through training and hold ``torch.optim.Adam`` in float64 against it.

    Args:
        {params}
        lr: learning rate, at least 0. A float or a CPU tensor of one element.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        amsgrad: divide by the root of the largest second moment so far.
        {unbounded_state}
        {common}

    Arguments may be given by position in the order of ``torch.optim.Adam``. As there, and unlike the other optimizers
    here, ``decoupled_weight_decay`` is False unless given. ``amsgrad`` refuses a ``state_dtype`` of few bits.

    State: ``exp_avg`` (m), ``exp_avg_sq`` (v), with amsgrad ``max_exp_avg_sq``, and
        {common_state}

    Sources: [KB] Kingma and Ba, arXiv 1412.6980, Alg. 1; Reddi et al., arXiv 1904.09237, for amsgrad.
    """

    RULE = rule_by("amsgrad", RULES)
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": TWO_BETAS,
        "eps": Number(),
        "amsgrad": FLAG,
    }
    COMMON: ClassVar[dict[str, Any]] = {**BUT_DECAY, "decoupled_weight_decay": False}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0.0,
        amsgrad: bool = False,
        **common: Unpack[CommonButDecay],
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, own, common)


class AdamW(Adam):
    r"""AdamW [LH]: :class:`Adam` with decoupled weight decay, 0.01 unless given, as ``torch.optim.AdamW``.

    .. math::
        p_t = (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \text{Adam's step}

    The decay is not rounded by itself, so that it acts on bf16 parameters as well.

    Args:
        {params}
        lr, betas, eps, amsgrad: as of :class:`Adam`.
        {unbounded_state}
        {common}

    State: as of :class:`Adam`.

    Source: [LH] Loshchilov and Hutter, arXiv 1711.05101, Alg. 2.
    """

    COMMON: ClassVar[dict[str, Any]] = BUT_DECAY

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        **common: Unpack[CommonButDecay],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **common)

    def adapt_loaded_group(self, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """The decay of a checkpoint of torch's Adam becomes decoupled, as in torch.optim.AdamW."""
        if "seed" not in saved:  # which ours have
            group["decoupled_weight_decay"] = True


def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = False,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`Adam`, in place on ``params`` and the state lists; of :class:`AdamW` with decoupled decay.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs: fp32, of the parameters' shapes and strides; zeros at first. The last
            only for ``amsgrad``.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, betas, eps, amsgrad, decoupled_weight_decay: as in :class:`Adam`.
        hyperparameters: ``weight_decay``, ``maximize``, ``backend``, as there.
    """
    step_lists(
        Adam,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "max_exp_avg_sq": max_exp_avg_sqs},
        state_steps=state_steps,
        lr=lr,
        betas=betas,
        eps=eps,
        amsgrad=amsgrad,
        decoupled_weight_decay=decoupled_weight_decay,
        **hyperparameters,
    )

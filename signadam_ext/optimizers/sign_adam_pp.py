"""signADAM++: momentum of the gated sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from .. import checks
from ..lists import step_lists
from ..optimizer import Params, SignOptimizer
from ..options import Common
from ..rule import Group, Rule, Scalars

#: ``alpha=None`` stands for these: a fixed threshold is in units of the gradient, an adaptive one multiplies a
#: deviation.
DEFAULT_ALPHA = {"fixed": 0.0, "adaptive": 0.5, "adaptive_delayed": 0.5}


def _scalars(group: Group, t: int) -> Scalars:
    (beta,) = group["betas"]
    alpha, confidence_beta = group["alpha"], group["confidence_beta"]
    return {
        "alpha": float(DEFAULT_ALPHA[group["confidence"]] if alpha is None else alpha),
        "beta1": beta,
        "one_minus_beta1": 1 - beta,
        "confidence_beta": confidence_beta,
        "one_minus_confidence_beta": 1 - confidence_beta,
    }


_FIXED = Rule("sign_adam_pp", moments=("exp_avg",), scalars=_scalars, bounded=True)
RULES = {
    "fixed": _FIXED,
    "adaptive": replace(_FIXED, statistics="ONLY"),
    "adaptive_delayed": replace(_FIXED, statistics="GATHER"),
}


class SignAdamPP(SignOptimizer):
    r"""signADAM++ [SA, Alg. 3]: momentum of the sign of those gradient entries that exceed a confidence threshold.

    .. math::
        c(g) &= \mathrm{sign}(g) \text{ if } |g| > \alpha_t \text{ else } 0 \\
        m_t &= \beta m_{t-1} + (1 - \beta)\, c(g_t) \\
        p_t &= p_{t-1} - \mathrm{lr} \cdot m_t

    An entry at exactly the threshold is dropped. :math:`|m_t| \le 1` always [SA, Lemma 1]. The threshold is, by
    ``confidence``:

    - "fixed": :math:`\alpha_t = \alpha`.
    - "adaptive" [SA, Sec. 6.3]: :math:`\alpha_t = \alpha a_t` with :math:`a_t = b a_{t-1} + (1 - b)\,\mathrm{std}(g_t)`
      for each tensor, b being ``confidence_beta``. Reads the gradient twice, in two launches.
    - "adaptive_delayed": :math:`\alpha_t = \alpha a_{t-1}`, so that the deviation is gathered in the same single
      pass; at t = 1 the threshold is 0.

    A step whose gradient is not finite leaves ``a`` as it is.

    Args:
        {params}
        lr: learning rate, at least 0. A float or a CPU tensor of one element. The default is [SA]'s for MNIST (for
            SIGN-SGD, SIGNUM and ADAM; it gives none for signADAM++).
        {beta}
        confidence: "fixed", "adaptive" or "adaptive_delayed".
        alpha: at least 0. With "fixed" in units of the gradient, otherwise of its running standard deviation. None:
            0 for "fixed", 0.5 otherwise.
        confidence_beta: decay of the running deviation, in [0, 1).
        {bounded_state}
        {common}

    State: ``exp_avg`` (m), fp32 or bf16 of the parameter's shape or packed codes, with ``exp_avg_kind`` and
    ``exp_avg_levels`` beside them; with adaptive confidence ``exp_avg_std`` (a), 0-dim float64 on the parameter's
    device; ``step``; with split weights ``param_low``, with master weights ``master_param``.

    Source: [SA] Wang et al., arXiv 1907.09008, Alg. 3 and Sec. 6.3. The authors' released code moves by the gated sign
    and not by the momentum; this class follows the paper, :class:`SignSGD` with ``alpha=5e-4`` the code.
    """

    HYPERPARAMETERS = ("lr", "betas", "confidence", "alpha", "confidence_beta")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.9,
        confidence: str = "fixed",
        alpha: float | None = None,
        confidence_beta: float = 0.9,
        **common: Unpack[Common],
    ) -> None:
        own = {
            "lr": lr,
            "betas": (beta,),
            "confidence": confidence,
            "alpha": alpha,
            "confidence_beta": confidence_beta,
        }
        super().__init__(params, own, common)

    @classmethod
    def _rule(cls, group: dict[str, Any]) -> Rule:
        return checks.look_up("confidence", group["confidence"], RULES)

    @classmethod
    def _check_group(cls, group: dict[str, Any]) -> None:
        super()._check_group(group)
        checks.betas(group["betas"], ("beta",))
        checks.one_of("confidence", group["confidence"], RULES)
        checks.beta("confidence_beta", group["confidence_beta"])
        if group["alpha"] is not None:
            checks.number("alpha", group["alpha"], 0.0)


def sign_adam_pp(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_stds: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    beta: float = 0.9,
    confidence: str = "fixed",
    alpha: float | None = None,
    confidence_beta: float = 0.9,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`SignAdamPP`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs: fp32, of the parameters' shapes and strides; zeros at first.
        exp_avg_stds: 0-dim float64 on the parameters' devices; zeros at first. Only for adaptive confidence.
        lr, beta, confidence, alpha, confidence_beta: as in :class:`SignAdamPP`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.
    """
    step_lists(
        SignAdamPP,
        params,
        grads,
        {"exp_avg": exp_avgs},
        exp_avg_stds=exp_avg_stds,
        lr=lr,
        betas=(beta,),
        confidence=confidence,
        alpha=alpha,
        confidence_beta=confidence_beta,
        **hyperparameters,
    )

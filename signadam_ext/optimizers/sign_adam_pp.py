"""signADAM++: momentum of the gated sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..backends.confidence import Confidence, backend_for
from ..core import checks
from ..core.hyperparameters import BETA, LEARNING_RATE, ONE_BETA, SHARE, Checks, Number, Optional
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, RuleChoice, Scalars, decays
from ..core.symbols import made_by_host, number
from .base import Params, SignOptimizer
from .step_lists import step_lists

#: ``alpha=None`` stands for these: a fixed threshold is in units of the gradient, an adaptive one multiplies a
#: deviation. A steered one has no alpha.
DEFAULT_ALPHA = {"fixed": 0.0, "adaptive": 0.5, "adaptive_delayed": 0.5}


def _scalars(group: Group, t: int) -> Scalars:
    alpha, confidence, confidence_beta = group["alpha"], group["confidence"], group["confidence_beta"]
    if alpha is None:
        alpha = 0.0 if callable(confidence) else DEFAULT_ALPHA[confidence]
    return {
        **decays(group, 1),
        "alpha": number(alpha),
        "confidence_beta": confidence_beta,
        "one_minus_confidence_beta": 1 - confidence_beta,
    }


def _quantile(target: float) -> float:
    """Of a normal distribution of deviation 1, the magnitude that a share ``target`` exceeds."""
    return -NormalDist().inv_cdf(target / 2 or target)


def _sparsity_scalars(group: Group, t: int) -> Scalars:
    target = group["target"]
    return {
        **decays(group, 1),
        "alpha": 1.0,  # of what is steered, which is the threshold itself
        "steers": 1.0,
        "target": target,
        "gain": number(group["gain"]),
        "quantile": made_by_host(_quantile, target),
    }


_FIXED = Rule("sign_adam_pp", moments=("exp_avg",), scalars=_scalars, bound=1.0)
RULES = {
    "fixed": _FIXED,
    "adaptive": replace(_FIXED, threshold_pass="PASS_BEFORE", threshold_state="exp_avg_std"),
    "adaptive_delayed": replace(_FIXED, threshold_pass="SAME_PASS", threshold_state="exp_avg_std"),
    "sparsity": replace(_FIXED, threshold_pass="SAME_PASS", threshold_state="threshold", scalars=_sparsity_scalars),
}
#: Momentum of what a function makes of the gradient [SA, Alg. 1].
_OWN = Rule("msgd", moments=("exp_avg",), scalars=_scalars, codes_bound=_FIXED.bound)


def _confidence(name: str, value: Any) -> Any:
    if callable(value):
        return value
    if not isinstance(value, str):
        raise ValueError(
            f"{name}={checks.shown(value)}: must be one of {', '.join(map(repr, RULES))}, or a function of (g, alpha)"
        )
    return checks.one_of(name, value, RULES)


def _rule(group: Group) -> Rule:
    confidence = _confidence("confidence", group["confidence"])
    return replace(_OWN, confidence=confidence) if callable(confidence) else RULES[confidence]


class SignAdamPP(SignOptimizer):
    r"""Momentum of the gradient's sign, which fits in 2 bits: signADAM++.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. The default is [SA]'s for MNIST (for
            SIGN-SGD, SIGNUM and ADAM; it gives none for signADAM++). Default: 1e-3.
        beta: decay of the momentum, in [0, 1). Groups keep it as ``betas=(beta,)``, where schedulers look for it.
            Default: 0.9.
        confidence: how the threshold is found: "fixed" (it is ``alpha``), "adaptive" (``alpha`` running deviations of
            the gradient, which is read twice), "adaptive_delayed" (the same from the last step, read once), "sparsity"
            (steered so that a share ``target`` passes), or a function of your own (below). Default: "fixed".
        alpha: at least 0. With "fixed" and a function in units of the gradient, with adaptive confidence of its running
            standard deviation. None: 0.5 for adaptive confidence, otherwise 0. Not for "sparsity".
        confidence_beta: decay of the running deviation, in [0, 1). Default: 0.9.
        target: share of the entries that "sparsity" lets pass, in (0, 1); required there.
        gain: how fast "sparsity" steers, in (0, 1]. Default: 1.
        weight_decay: at least 0. Default: 0.
        decoupled_weight_decay: whether the weight shrinks by ``1 - lr * weight_decay`` before the update, or
            ``weight_decay * p`` is added to the gradient. Default: True.
        maximize: ascend instead of descend. Default: False.
        max_grad_norm: largest norm of all groups' gradients together. A longer gradient counts as if it were scaled to
            this norm, and a step whose norm is not finite is skipped; see ``last_grad_norm`` and ``skipped_steps``. The
            same in all groups; infinite: only the latter. Default: None, nobody looks at the norm.
        state_dtype: how moments are stored between steps: "fp32" or "bf16", or "int8", "int4" or "int2", which keep the
            momentum in 8, 4 or 2 bits and other moments in bf16. ``torch.bfloat16`` is the same as "bf16"; a tuple
            gives each moment its own. Default: "fp32".
        param_storage: what is kept of a bf16 or fp16 parameter beyond its dtype: nothing, rounding to nearest
            ("nearest"), so that steps below half its last place are lost, or at random ("stochastic"); low bits
            ("split8", "split16", not of fp16); an fp32 copy ("master"). An fp32 parameter is its own master under
            each of them. Default: "nearest".
        seed: of stochastic rounding, in [0, 2^64); the same seed gives the same bits on every backend. Default: 0.
        backend: "cpu", "cuda", "triton" or "reference"; "auto" takes cuda, then triton, for CUDA tensors, and triton
            first where steps are scaled by a number of the tensor's (caution, "rms"). Default: "auto".
        weight_decay_kind: "decoupled" or "coupled", as ``decoupled_weight_decay`` says, or "cautious": decoupled, where
            the step does not lead away from 0. Default: None, what ``decoupled_weight_decay`` says.
        weight_decay_scale: what decoupled decay shrinks by: "lr", ``lr * weight_decay``; "corrected", ``lr**2 /
            largest_lr * weight_decay``; "independent", ``weight_decay``; "fully_decoupled", ``lr / base_lr *
            weight_decay``. Default: "lr".
        lr_scale: a factor of each parameter's learning rate, which decay does not see: "shape", ``2 / (rows +
            columns)`` of a matrix; "rms", its root mean square before the last step; or a function of its name (or
            None) and shape. A number in a group is left to schedulers that multiply with it. Default: 1.0.
        caution: entries of a step that do not go against the gradient are left out, and the others larger in exchange:
            by this step's share, which reads everything twice ("exact"), or the last step's ("delayed");
            refused beside a ``confidence`` that is not "fixed", as "rms" is. Default: None.
        foreach, fused, differentiable, capturable: for code written for torch.optim. The update is always fused; True
            for fused also takes the scale of a GradScaler in the step, and skips it without waiting for the device.
            differentiable may not be True.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = SignAdamPP(model.parameters(), lr=1e-3, state_dtype="int2")
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    signADAM++ [SA, Alg. 3] is a momentum of the sign of those gradient entries that exceed a confidence threshold:

    .. math::
        c(g) &= \mathrm{sign}(g) \text{ if } |g| > \alpha_t \text{ else } 0 \\
        m_t &= \beta m_{t-1} + (1 - \beta)\, c(g_t) \\
        p_t &= p_{t-1} - \mathrm{lr} \cdot m_t

    An entry at exactly the threshold is dropped. :math:`|m_t| \le 1` always [SA, Lemma 1]. The threshold is, by
    ``confidence``:

    - "fixed": :math:`\alpha_t = \alpha`.
    - "adaptive" [SA, Sec. 6.3]: :math:`\alpha_t = \alpha a_t` with :math:`a_t = b a_{t-1} + (1 - b)\,\mathrm{std}(g_t)`
      for each tensor, b being ``confidence_beta``. Reads the gradient twice, in two launches. a begins at 0 and is not
      corrected for it: the threshold grows over the first 1 / (1 - b) steps.
    - "adaptive_delayed": :math:`\alpha_t = \alpha a_{t-1}`, so that the deviation is gathered in the same single
      pass; at t = 1 the threshold is 0.
    - "sparsity": the threshold is steered, for each tensor, so that a share ``target`` of the entries passes:
      :math:`\alpha_{t+1} = \alpha_t \exp(\gamma (q_t - \mathrm{target}))`, q being the share that passed and
      :math:`\gamma` the ``gain``. At t = 1 everything passes, and :math:`\alpha_2` is what would be right for normal
      gradients of the same root mean square. From the second step on, the mean share over T steps differs from the
      target by what the threshold has moved in all, :math:`\ln(\alpha_{T+2} / \alpha_2) / (\gamma T)`. It stays
      within 2^20 of the gradient's root mean square either way, so that a share which cannot be reached (more zeros
      than the target leaves) does not carry it off. If the density of the magnitudes does not rise with them,
      thresholds approach the right one from one side, for any gain up to 1. One pass, no history but the threshold.
    - a function ``c(g, alpha)`` of your own in the gate's place [SA, Alg. 1]: :math:`m_t = \beta m_{t-1} + (1 -
      \beta)\, c(g_t, \alpha)`. A Python function of torch operations gets g as a flat fp32 tensor and alpha as a 0-dim
      one, and runs on the reference backend, on any device, many times slower than a kernel; its results are kept
      for the step, one more gradient's memory. A ``@triton.jit`` function gets a block of g and alpha in fp32, and is
      compiled into the Triton kernel. Either works element by element and returns fp32 of g's shape, without NaN
      where g is a number. Such a momentum has no bound, so that ``state_dtype``
      is "fp32", "bf16" or "int8" in blocks. The function is not part of a checkpoint.

    A step whose gradient is not finite leaves ``a`` and a steered threshold as they are. Decoupled weight decay with
    adaptive confidence is [SA]'s signADAM++-AW.

    State: ``exp_avg`` (m), with adaptive confidence ``exp_avg_std`` (a), with "sparsity" ``threshold``, both 0-dim
    float64 on the parameter's device, and ``step``.

    Source: [SA] Wang et al., arXiv 1907.09008, Alg. 3 and Sec. 6.3. The authors' released code moves by the gated sign
    and not by the momentum; this class follows the paper, :class:`SignSGD` with ``alpha=5e-4`` the code.
    """

    RULE = RuleChoice(_rule)
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": ONE_BETA,
        "confidence": _confidence,
        "alpha": Optional(Number()),
        "confidence_beta": BETA,
        "target": Optional(SHARE),
        "gain": Number(0.0, 1.0, open_low=True, open_high=False),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.9,
        confidence: str | Confidence = "fixed",
        alpha: float | None = None,
        confidence_beta: float = 0.9,
        target: float | None = None,
        gain: float = 1.0,
        weight_decay: float | Tensor = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = "fp32",
        param_storage: str = "nearest",
        seed: int = 0,
        backend: str = "auto",
        **others: Unpack[OtherOptions],
    ) -> None:
        # Groups may differ in their confidence, so these are not asked of a group.
        if confidence == "sparsity" and alpha is not None:
            raise ValueError(f"alpha={alpha!r} with confidence='sparsity': the threshold is found, not given")
        if confidence != "sparsity" and (target is not None or gain != 1.0):
            raise ValueError(f"target={target!r}, gain={gain!r}: only for confidence='sparsity'")
        given = {
            "lr": lr,
            "betas": (beta,),
            "confidence": confidence,
            "alpha": alpha,
            "confidence_beta": confidence_beta,
            "target": target,
            "gain": gain,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "param_storage": param_storage,
            "seed": seed,
            "backend": backend,
        }
        super().__init__(params, given, others)

    @classmethod
    def check_relations(cls, group: Group) -> None:
        super().check_relations(group)
        if group["confidence"] == "sparsity" and group["target"] is None:
            raise ValueError("target=None with confidence='sparsity': give the share of the entries that may pass")
        if callable(group["confidence"]):
            backend_for(group["confidence"], group["backend"])


def sign_adam_pp(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_stds: Sequence[Tensor] | None = None,
    thresholds: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    beta: float = 0.9,
    confidence: str | Confidence = "fixed",
    alpha: float | None = None,
    confidence_beta: float = 0.9,
    target: float | None = None,
    gain: float = 1.0,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`SignAdamPP`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs: fp32, of the parameters' shapes and strides; zeros at first.
        exp_avg_stds: 0-dim float64 on the parameters' devices; zeros at first. Only for adaptive confidence.
        thresholds: the same for "sparsity".
        lr, beta, confidence, alpha, confidence_beta, target, gain: as in :class:`SignAdamPP`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> sign_adam_pp(params, grads, exp_avgs, lr=0.5)
        >>> params
        [tensor([-0.0500,  0.0500,  0.0000])]
    """
    step_lists(
        SignAdamPP,
        params,
        grads,
        {"exp_avg": exp_avgs},
        threshold_states=thresholds if confidence == "sparsity" else exp_avg_stds,
        lr=lr,
        beta=beta,
        confidence=confidence,
        alpha=alpha,
        confidence_beta=confidence_beta,
        target=target,
        gain=gain,
        **hyperparameters,
    )

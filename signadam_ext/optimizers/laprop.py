"""LaProp: the momentum of normalized gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core import checks
from ..core.hyperparameters import LEARNING_RATE, TWO_BETAS, Checks, Number
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, RuleChoice, Scalars, decays
from ..core.symbols import number, power, square_root
from .base import Params, SignOptimizer
from .step_lists import step_lists

#: Up to this ``betas[1]`` the momentum has a bound that codes without a scale are made for.
LARGEST_BETA2 = 0.95

#: A normalized gradient never exceeds ``1 / sqrt(1 - beta2)``: of ``v`` its own square is at least ``1 - beta2``. One
#: bound for all betas up to the largest, so that codes keep their meaning where ``betas`` change, and by a few fp32
#: roundings more.
BOUND = (1 + 2.0**-20) / math.sqrt(1 - LARGEST_BETA2)


def _scalars(group: Group, t: int) -> Scalars:
    beta1, beta2 = group["betas"]
    correction = square_root(1 - power(beta2, t))
    scalars = decays(group, 2)
    return {
        **scalars,
        "lr": number(group["lr"]) / (1 - power(beta1, t)),
        "one_minus_beta1": scalars["one_minus_beta1"] * correction,
        "eps": number(group["eps"]) * correction,
        "upper": math.inf,  # but for codes, which have one
    }


_BOUNDED = Rule("laprop", moments=("exp_avg", "exp_avg_sq"), scalars=_scalars, bound=BOUND, uses_step=True)
#: By whether the momentum has a bound.
RULES = {
    True: _BOUNDED,
    False: replace(
        _BOUNDED,
        bound=None,
        codes_bound=BOUND,
        unbounded=f"this momentum has a bound only where betas[1] is at most {LARGEST_BETA2}, on the host",
    ),
}


def _rule(group: Group) -> Rule:
    beta2 = checks.plain(group["betas"][1])
    # A tensor on an accelerator is not waited for.
    is_known = isinstance(beta2, (int, float)) or (isinstance(beta2, Tensor) and beta2.device.type == "cpu")
    return RULES[is_known and float(beta2) <= LARGEST_BETA2]


class LaProp(SignOptimizer):
    r"""The momentum of normalized gradients: LaProp.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 1e-3.
        betas: decay of the momentum and of the second moment, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the root of the second moment, at least 0. Default: 1e-8.
        weight_decay: at least 0. Default: 0.
        decoupled_weight_decay: whether the weight shrinks by ``1 - lr * weight_decay`` before the update, or
            ``weight_decay * p`` is added to the gradient. Default: True.
        maximize: ascend instead of descend. Default: False.
        max_grad_norm: largest norm of all groups' gradients together. A longer gradient counts as if it were scaled to
            this norm, and a step whose norm is not finite is skipped; see ``last_grad_norm`` and ``skipped_steps``. The
            same in all groups; infinite: only the latter. Default: None, nobody looks at the norm.
        state_dtype: how moments are stored between steps: "fp32" or "bf16", or, for ``betas[1]`` up to 0.95, "int8",
            "int4" or "int2", which keep the momentum in 8, 4 or 2 bits and other moments in bf16. Beyond it, "int8"
            keeps the momentum in 8 bits with an exponent for each 32 elements. ``torch.bfloat16`` is the same as
            "bf16"; a tuple gives each moment its own. Default: "fp32".
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
            by this step's share, which reads everything twice ("exact"), or the last step's ("delayed"). Default: None.
        foreach, fused, differentiable, capturable: for code written for torch.optim. The update is always fused; True
            for fused also takes the scale of a GradScaler in the step, and skips it without waiting for the device.
            differentiable may not be True.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = LaProp(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    LaProp [LP, Alg. 1], Adam with its two halves in the other order: each gradient is normalized, and what is averaged
    are normalized gradients:

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
        p_t &= (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \frac{\mathrm{lr}}{1 - \beta_1^t} m_t

    Lambda is ``weight_decay``. The factor :math:`\sqrt{1 - \beta_2^t}` is taken out of the fraction, where it is a
    scalar, and spares a division. The code that its authors released averages the learning rate along with the
    momentum, which differs where the rate changes, and decays weights by lambda alone, after the step; here, as in the
    paper, the rate multiplies the step.

    No entry of m exceeds :math:`1 / \sqrt{1 - \beta_2}`, which is 4.47 for 0.95. So for ``betas[1]`` up to 0.95 codes
    need no scale: q stands for 4.4721 q / L, with L = 127, 7 and 1. A larger ``betas[1]`` has a bound as well, of which
    gradients seldom reach a tenth: there "int8" is in blocks. A NaN gradient leaves p and v NaN and m 0, since codes
    have no NaN.

    State: ``exp_avg`` (m), ``exp_avg_sq`` (v) and ``step``.

    Source: [LP] Ziyin, Wang and Ueda, arXiv 2002.04839, Alg. 1.
    """

    RULE = RuleChoice(_rule)
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "betas": TWO_BETAS, "eps": Number()}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
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
        given = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
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


def laprop(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`LaProp`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs: fp32, of the parameters' shapes and strides; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, betas, eps: as in :class:`LaProp`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> exp_avg_sqs = [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> laprop(params, grads, exp_avgs, exp_avg_sqs, state_steps, lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        LaProp,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs},
        state_steps=state_steps,
        lr=lr,
        betas=betas,
        eps=eps,
        **hyperparameters,
    )

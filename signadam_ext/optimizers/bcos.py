"""BCOS: stepsizes of each entry from one moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import FLAG, LEARNING_RATE, ONE_BETA, Checks, Number
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars, rule_by
from ..core.symbols import is_nonzero, number
from .base import Params, SignOptimizer
from .step_lists import step_lists


def _momentum(group: Group, t: int) -> tuple[Any, Scalars]:
    """Beta, which is 0 at the first step, whose gradient thus becomes the momentum; and the scalars of both forms."""
    beta = group["betas"][0] * is_nonzero(t - 1)
    rest = 1 - beta
    return beta, {
        "beta1": beta,
        "one_minus_beta1": rest,
        "one_minus_beta2": rest * rest,
        "eps": number(group["eps"]),
    }


def _scalars(group: Group, t: int) -> Scalars:
    beta, scalars = _momentum(group, t)
    square = beta * beta
    return {**scalars, "beta2": square * (2 - square)}


def _simple_scalars(group: Group, t: int) -> Scalars:
    _, scalars = _momentum(group, t)
    return {**scalars, "beta2": 1 - scalars["one_minus_beta2"]}


RULES = {
    False: Rule("bcos", moments=("exp_avg",), scalars=_scalars, uses_step=True),
    True: Rule("adam_s", moments=("exp_avg",), scalars=_simple_scalars, uses_step=True),
}


class BCOS(SignOptimizer):
    r"""Block-coordinate optimal stepsizes: steps like Adam's from one moment and one beta.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. The authors' code has no default.
            Default: 1e-3.
        beta: decay of the momentum, in [0, 1). Groups keep it as ``betas=(beta,)``, where schedulers look for it.
            Default: 0.9.
        eps: added to the root in the denominator, at least 0. Default: 1e-6.
        simple: whether the second moment leaves out the product of momentum and gradient. Default: False.
        weight_decay: at least 0. Default: 0.1.
        decoupled_weight_decay: whether the weight shrinks by ``1 - lr * weight_decay`` before the update, or
            ``weight_decay * p`` is added to the gradient. Default: True.
        maximize: ascend instead of descend. Default: False.
        max_grad_norm: largest norm of all groups' gradients together. A longer gradient counts as if it were scaled to
            this norm, and a step whose norm is not finite is skipped; see ``last_grad_norm`` and ``skipped_steps``. The
            same in all groups; infinite: only the latter. Default: None, nobody looks at the norm.
        state_dtype: how moments are stored between steps: "fp32" or "bf16", or "int8", which keeps the momentum in 8
            bits with an exponent for each 32 elements, and other moments in bf16. ``torch.bfloat16`` is the same as
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
        >>> optimizer = BCOS(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    BCOS with the conditional estimator of the momentum's second moment [BC], decoupled weight decay as in BCOSW:

    .. math::
        v_t &= (3 \beta^2 - 2 \beta^3)\, m_{t-1}^2 + (1 - \beta)^2 g_t^2 + 2 \beta (1 - \beta)^2 m_{t-1} g_t \\
        m_t &= \beta m_{t-1} + (1 - \beta) g_t \\
        p_t &= (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \mathrm{lr} \cdot \frac{m_t}{\sqrt{v_t} + \epsilon}

    Lambda is ``weight_decay``. At the first step :math:`m_0 = g_1`, so it moves every weight by nearly ``lr``. With
    ``simple``, :math:`v_t = (1 - (1 - \beta)^2)\, m_{t-1}^2 + (1 - \beta)^2 g_t^2`: :class:`AdamS` with that weight,
    but for the first step. ``v`` is made anew at each step and kept nowhere.

    Three things differ from the authors' code. ``v`` is computed as the sum of squares that it is equal to,
    :math:`\beta^2 (2 - \beta^2)\, m_{t-1}^2 + (1 - \beta)^2 (g_t + \beta m_{t-1})^2`, since as printed its rounding can
    leave it below 0, and the root NaN, where squares underflow. Coupled decay leaves ``p.grad`` as it is, and enters
    the first momentum as well. A parameter without a gradient is left alone, where theirs raises.

    State: ``exp_avg`` (m) and ``step``.

    Source: [BC] Jiang and Xiao, arXiv 2507.08963; ``bcos.py`` of facebookresearch/bcos, mode "c".
    """

    RULE = rule_by("simple", RULES)
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": ONE_BETA,
        "eps": Number(),
        "simple": FLAG,
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.9,
        eps: float = 1e-6,
        simple: bool = False,
        weight_decay: float | Tensor = 0.1,
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
            "betas": (beta,),
            "eps": eps,
            "simple": simple,
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


def bcos(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta: float = 0.9,
    eps: float = 1e-6,
    simple: bool = False,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`BCOS`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs: fp32, of the parameters' shapes and strides; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, beta, eps, simple: as in :class:`BCOS`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> bcos(params, grads, exp_avgs, state_steps, lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        BCOS,
        params,
        grads,
        {"exp_avg": exp_avgs},
        state_steps=state_steps,
        lr=lr,
        beta=beta,
        eps=eps,
        simple=simple,
        **hyperparameters,
    )

"""MARS-Lion: variance reduction in Lion's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, ONE_BETA, Checks, Number
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars
from .base import Params, SignOptimizer
from .step_lists import step_lists


def _scalars(group: Group, t: int) -> Scalars:
    (beta,) = group["betas"]
    now = beta * (1 - group["gamma"])
    return {"beta1": now, "one_minus_beta1": 1 - now, "beta2": beta, "one_minus_beta2": 1 - beta}


RULE = Rule("lion", moments=("exp_avg",), scalars=_scalars)


class MARSLion(SignOptimizer):
    r"""Sign of a momentum whose gradients are corrected for their change: MARS-Lion.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0; an entry moves by this much, or not at all where the sign is 0. A float or a CPU
            tensor of one element. Default: 1e-4.
        beta: decay of the momentum, in [0, 1). Groups keep it as ``betas=(beta,)``, where schedulers look for it.
            Default: 0.95.
        gamma: how much of the gradient's change is added to it, in [0, 1]; 0 is SIGNUM. Default: 0.025.
        weight_decay: at least 0. Default: 0.
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
        >>> optimizer = MARSLion(model.parameters(), lr=1e-4)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    MARS-Lion [MA] of the last step's gradient, without clipping:

    .. math::
        c_t &= g_t + \gamma \frac{\beta}{1 - \beta} (g_t - g_{t-1}), \qquad g_0 = 0 \\
        m_t &= \beta m_{t-1} + (1 - \beta) c_t \\
        p_t &= (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \mathrm{lr} \cdot \mathrm{sign}(m_t)

    Lambda is ``weight_decay``. In exact arithmetic this is :class:`Lion` with ``betas=(beta * (1 - gamma), beta)``,
    whose blend of momentum and gradient is the momentum here, and it is computed so: no gradient is kept. The authors'
    defaults are ``Lion(betas=(0.92625, 0.95))``, and Lion's own betas are gamma = 1/11 at beta = 0.99.

    The authors' code scales each tensor's ``c`` down to the norm 1 where it is larger, which this does not, and keeps
    the last gradient; for the first see ``max_grad_norm``, which bounds the gradients instead. It has no learning rate
    for this rule by itself: the default is Lion's.

    State: ``exp_avg`` (Lion's momentum) and ``step``.

    Source: [MA] Yuan et al., arXiv 2411.10438.
    """

    RULE = RULE
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": ONE_BETA,
        "gamma": Number(0.0, 1.0, open_high=False),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        *,
        beta: float = 0.95,
        gamma: float = 0.025,
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
            "betas": (beta,),
            "gamma": gamma,
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


def mars_lion(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta: float = 0.95,
    gamma: float = 0.025,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`MARSLion`, in place on ``params`` and ``exp_avgs``.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs: fp32, of the parameters' shapes and strides; zeros at first.
        lr, beta, gamma: as in :class:`MARSLion`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> mars_lion(params, grads, exp_avgs, lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(MARSLion, params, grads, {"exp_avg": exp_avgs}, lr=lr, beta=beta, gamma=gamma, **hyperparameters)

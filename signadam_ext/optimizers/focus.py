"""FOCUS: the sign of the momentum, and a pull to the average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, TWO_BETAS, Checks, Number
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars
from ..core.symbols import number, power
from .base import Params, SignOptimizer
from .step_lists import step_lists


def _scalars(group: Group, t: int) -> Scalars:
    beta1, beta2 = group["betas"]
    lr = number(group["lr"])
    return {
        "beta1": beta1,
        "one_minus_beta1": 1 - beta1,
        "averaging": (1 - beta2) / (1 - power(beta2, t)),
        "lr": lr,
        "mix": lr * number(group["gamma"]),
        "decay": 1.0,  # which the rule does
    }


RULE = Rule(
    "focus",
    moments=("param_avg", "exp_avg"),
    scalars=_scalars,
    uses_step=True,
    reads_param=True,
    starts_as_param="param_avg",
)


class FOCUS(SignOptimizer):
    r"""Signum with a pull of every weight to its average over the steps so far: FOCUS.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 0.01.
        betas: decay of the momentum and of the average of weights, each in [0, 1). Default: (0.9, 0.999).
        gamma: strength of the pull, at least 0. Default: 0.1.
        weight_decay: at least 0. Default: 0.
        decoupled_weight_decay: whether ``lr * weight_decay`` times the average is taken from the weight, or
            ``weight_decay * p`` is added to the gradient. Default: True.
        maximize: ascend instead of descend. Default: False.
        max_grad_norm: largest norm of all groups' gradients together. A longer gradient counts as if it were scaled to
            this norm, and a step whose norm is not finite is skipped; see ``last_grad_norm`` and ``skipped_steps``. The
            same in all groups; infinite: only the latter. Default: None, nobody looks at the norm.
        state_dtype: how the momentum is stored between steps: "fp32" or "bf16". ``torch.bfloat16`` is the same as
            "bf16"; of a tuple, which begins with "fp32" for the average, the second says it. The average of weights is
            kept in fp32 whatever the parameter's dtype: every step moves it by little. Default: "fp32".
        param_storage: what is kept of a bf16 or fp16 parameter beyond its dtype: nothing, rounding to nearest
            ("nearest"), so that steps below half its last place are lost, or at random ("stochastic"); low bits
            ("split8", "split16", not of fp16); an fp32 copy ("master"). An fp32 parameter is its own master under
            each of them. Default: "nearest".
        seed: of stochastic rounding, in [0, 2^64); the same seed gives the same bits on every backend. Default: 0.
        backend: "cpu", "cuda", "triton" or "reference"; "auto" takes cuda, then triton, for CUDA tensors, and triton
            first where steps are scaled by a number of the tensor's (caution, "rms"). Default: "auto".
        weight_decay_kind: "decoupled" or "coupled", as ``decoupled_weight_decay`` says; "cautious" is refused, since
            the step depends on the parameter. Default: None, what ``decoupled_weight_decay`` says.
        weight_decay_scale: what decoupled decay shrinks by: "lr", ``lr * weight_decay``; "corrected", ``lr**2 /
            largest_lr * weight_decay``; "independent", ``weight_decay``; "fully_decoupled", ``lr / base_lr *
            weight_decay``. Default: "lr".
        lr_scale: a factor of each parameter's learning rate, which decay does not see: "shape", ``2 / (rows +
            columns)`` of a matrix; or a function of its name (or None) and shape. A number in a group is left to
            schedulers that multiply with it. Default: 1.0.
        caution: refused, as "cautious" is. Default: None.
        foreach, fused, differentiable, capturable: for code written for torch.optim. The update is always fused; True
            for fused also takes the scale of a GradScaler in the step, and skips it without waiting for the device.
            differentiable may not be True.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = FOCUS(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    FOCUS [FO, Alg. 1], whose step has two signs, that of the momentum and that of the way from the average of the
    weights:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        \bar{p}_t = \bar{p}_{t-1} + \frac{1 - \beta_2}{1 - \beta_2^t} (p_{t-1} - \bar{p}_{t-1}) \\
        p_t &= p_{t-1} - \mathrm{lr}\, (\mathrm{sign}(m_t) + \gamma\, \mathrm{sign}(p_{t-1} - \bar{p}_t)
            + \lambda \bar{p}_t)

    Lambda is ``weight_decay``, whose pull goes along the average. The average is kept as it is corrected for its bias,
    which is the paper's :math:`\hat{p}_t` in another form: the first step makes it the weight itself, whatever it was
    before, so that :math:`p - \bar{p}` is 0. The code that its authors released keeps the sum and divides at each step,
    which at the first leaves rounding errors, whose signs move some entries by ``gamma * lr``.

    With ``gamma=0`` and without decay this is :class:`Signum`, with a tensor of state that is read for nothing.

    State: ``param_avg`` (the average, which begins as the parameter), ``exp_avg`` (m) and ``step``.

    Source: [FO] Liu, Liu and Gore, arXiv 2501.12243, Alg. 1; liuyz0/FOCUS.
    """

    RULE = RULE
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "betas": TWO_BETAS, "gamma": Number()}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        gamma: float | Tensor = 0.1,
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


def focus(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    param_avgs: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    gamma: float = 0.1,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`FOCUS`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        param_avgs, exp_avgs: fp32, of the parameters' shapes and strides; the parameters and zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, betas, gamma: as in :class:`FOCUS`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> param_avgs, exp_avgs = [torch.zeros(3)], [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> focus(params, grads, param_avgs, exp_avgs, state_steps, lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        FOCUS,
        params,
        grads,
        {"param_avg": param_avgs, "exp_avg": exp_avgs},
        state_steps=state_steps,
        lr=lr,
        betas=betas,
        gamma=gamma,
        **hyperparameters,
    )

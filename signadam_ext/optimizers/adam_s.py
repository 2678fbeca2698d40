"""AdamS: the last momentum in place of Adam's second moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, TWO_BETAS, Checks, Number
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars, decays
from ..core.symbols import number
from .base import Params, SignOptimizer
from .step_lists import step_lists


def _scalars(group: Group, t: int) -> Scalars:
    return {**decays(group, 2), "eps": number(group["eps"])}


RULE = Rule("adam_s", moments=("exp_avg",), scalars=_scalars)


class AdamS(SignOptimizer):
    r"""Adam whose denominator is made of the last momentum and the gradient: one moment.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 1e-3.
        betas: decay of the momentum, and the momentum's weight in the denominator, each in [0, 1). Default: (0.9,
            0.95).
        eps: added to the root in the denominator, at least 0. Default: 1e-8.
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
        >>> optimizer = AdamS(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    AdamS [AS]:

    .. math::
        v_t &= \beta_2 m_{t-1}^2 + (1 - \beta_2) g_t^2, \qquad m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        p_t &= (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \mathrm{lr} \cdot \frac{m_t}{\sqrt{v_t} + \epsilon}

    Lambda is ``weight_decay``. ``v`` is made anew at each step, of the momentum before it, and kept nowhere: the state
    is that of SGD with momentum. There is no bias correction: the first step is ``(1 - betas[0]) / sqrt(1 - betas[1])``
    times ``lr``, 0.45 with the default betas. No step exceeds ``sqrt(b1**2 / b2 + (1 - b1)**2 / (1 - b2))`` times
    ``lr``, 1.03 with them. :class:`BCOS` in its simple form is this rule with ``b2 = 1 - (1 - b1)**2``.

    One code of others takes the new momentum for ``v``, and another optimizer, of stable weight decay, has the same
    name: neither is this one.

    State: ``exp_avg`` (m) and ``step``.

    Source: [AS] Zhang, Wang and Chen, arXiv 2505.16363.
    """

    RULE = RULE
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "betas": TWO_BETAS, "eps": Number()}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
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


def adam_s(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`AdamS`, in place on ``params`` and ``exp_avgs``.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs: fp32, of the parameters' shapes and strides; zeros at first.
        lr, betas, eps: as in :class:`AdamS`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> adam_s(params, grads, exp_avgs, lr=0.5)
        >>> params
        [tensor([-0.2236,  0.2236,  0.0000])]
    """
    step_lists(AdamS, params, grads, {"exp_avg": exp_avgs}, lr=lr, betas=betas, eps=eps, **hyperparameters)

"""AdaBound and AMSBound: Adam whose learning rate of each entry is bounded, ever more narrowly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, SHARE, TWO_BETAS, Checks, Number
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars, decays
from ..core.symbols import at_least, is_nonzero, number, power, square_root
from .base import Params, SignOptimizer
from .step_lists import step_lists


def _scalars(group: Group, t: int) -> Scalars:
    beta1, beta2 = group["betas"]
    lr, base_lr = number(group["lr"]), number(group["base_lr"])
    # One that began at 0 has no beginning to be in proportion to: itself, and while it is 0 any number.
    base_lr = base_lr + (1 - is_nonzero(base_lr)) * lr
    final = number(group["final_lr"]) * lr / at_least(base_lr, 2.0**-1000)
    width = number(group["gamma"]) * t
    return {
        **decays(group, 2),
        "lr": lr * square_root(1 - power(beta2, t)) / (1 - power(beta1, t)),
        "eps": number(group["eps"]),
        "lower": final * (1 - 1 / (width + 1)),
        "upper": final * (1 + 1 / width),
    }


RULE = Rule("ada_bound", moments=("exp_avg", "exp_avg_sq"), scalars=_scalars, uses_step=True)
AMS_RULE = replace(RULE, name="ams_bound", moments=(*RULE.moments, "max_exp_avg_sq"), keeps_largest=True)


class AdaBound(SignOptimizer):
    r"""Adam with bounds on the learning rate of each entry: AdaBound.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 1e-3.
        betas: decay of the two moments, each in [0, 1). Default: (0.9, 0.999).
        final_lr: learning rate to which both bounds tend, at least 0, in place of ``base_lr``, which a group keeps of
            the learning rate it began with. Default: 0.1.
        gamma: how fast they do, in (0, 1). Default: 1e-3.
        eps: added to the root of the second moment, at least 0. Default: 1e-8.
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
        >>> optimizer = AdaBound(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    AdaBound [LX, Alg. 2], as in the authors' code: the learning rate of each entry is Adam's, cut off at bounds that
    begin at 0 and infinity and meet, so that training ends as with SGD:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        f_t &= \mathrm{final\_lr} \cdot \mathrm{lr} / \mathrm{base\_lr}, \qquad
        \eta_t = \mathrm{clip}\left(\frac{\mathrm{lr}\, \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)}{\sqrt{v_t} + \epsilon},\
        f_t \left(1 - \tfrac{1}{\gamma t + 1}\right),\ f_t \left(1 + \tfrac{1}{\gamma t}\right)\right) \\
        p_t &= (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \eta_t m_t

    Lambda is ``weight_decay``. The bounds follow a schedule of ``lr``: they are in proportion to ``lr / base_lr``.
    ``base_lr`` is in the group, and so in a checkpoint; the authors' code keeps it outside, loses it when a state is
    loaded, and knows none of a group that is added later. Where the learning rate began at 0 and the group is not told
    its ``base_lr``, bounds follow no schedule. The paper's algorithm corrects no bias and divides by
    :math:`\sqrt t`; the code corrects it and does not divide. Its decay is coupled, and in AdaBoundW by lambda alone;
    here it is as in the other classes.

    State: ``exp_avg`` (m), ``exp_avg_sq`` (v) and ``step``.

    Source: [LX] Luo, Xiong, Liu and Sun, arXiv 1902.09843, Alg. 2.
    """

    RULE = RULE
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": TWO_BETAS,
        "final_lr": Number(),
        "gamma": SHARE,
        "eps": Number(),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        final_lr: float | Tensor = 0.1,
        gamma: float | Tensor = 1e-3,
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
            "final_lr": final_lr,
            "gamma": gamma,
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


class AMSBound(AdaBound):
    r"""AdaBound by the largest second moment so far: AMSBound.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 1e-3.
        betas: decay of the two moments, each in [0, 1). Default: (0.9, 0.999).
        final_lr: learning rate to which both bounds tend, at least 0, in place of ``base_lr``, which a group keeps of
            the learning rate it began with. Default: 0.1.
        gamma: how fast they do, in (0, 1). Default: 1e-3.
        eps: added to the root of the second moment, at least 0. Default: 1e-8.
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
        >>> optimizer = AMSBound(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    AMSBound [LX]: :class:`AdaBound` with the largest second moment so far in place of the second moment, as AMSGrad has
    it, so that an entry's learning rate does not rise:

    .. math::
        \hat v_t = \max(\hat v_{t-1}, v_t)

    The authors' code has it as ``amsbound=True``. A ``state_dtype`` of few bits is
    refused.

    State: ``exp_avg`` (m), ``exp_avg_sq`` (v), ``max_exp_avg_sq`` and ``step``.

    Source: [LX] Luo, Xiong, Liu and Sun, arXiv 1902.09843.
    """

    RULE = AMS_RULE


def ada_bound(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    final_lr: float = 0.1,
    gamma: float = 1e-3,
    eps: float = 1e-8,
    base_lr: float | Tensor | None = None,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`AdaBound`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs: fp32, of the parameters' shapes and strides; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, betas, final_lr, gamma, eps: as in :class:`AdaBound`.
        base_lr: the ``lr`` that training began with: bounds are in proportion to ``lr / base_lr``. None: ``lr``.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> exp_avg_sqs = [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> ada_bound(params, grads, exp_avgs, exp_avg_sqs, state_steps, lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        AdaBound,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs},
        {"base_lr": base_lr},
        state_steps=state_steps,
        lr=lr,
        betas=betas,
        final_lr=final_lr,
        gamma=gamma,
        eps=eps,
        **hyperparameters,
    )


def ams_bound(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    final_lr: float = 0.1,
    gamma: float = 1e-3,
    eps: float = 1e-8,
    base_lr: float | Tensor | None = None,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`AMSBound`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs: fp32, of the parameters' shapes and strides; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, betas, final_lr, gamma, eps: as in :class:`AMSBound`.
        base_lr, hyperparameters: as of :func:`ada_bound`.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> moments = [[torch.zeros(3)] for _ in range(3)]
        >>> ams_bound(params, grads, *moments, [torch.tensor(0.0)], lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        AMSBound,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "max_exp_avg_sq": max_exp_avg_sqs},
        {"base_lr": base_lr},
        state_steps=state_steps,
        lr=lr,
        betas=betas,
        final_lr=final_lr,
        gamma=gamma,
        eps=eps,
        **hyperparameters,
    )

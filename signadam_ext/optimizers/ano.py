"""Ano and Anolog: the direction of the momentum, the size of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, Betas, Checks, Number
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars, decays
from ..core.symbols import logarithm, number, power, square_root
from .base import Params, SignOptimizer
from .step_lists import step_lists

#: Of the second moment: with a smaller one it would fall below 0.
SMALLEST_BETA = 0.5


def _second_moment(group: Group, beta2: Any, t: int) -> Scalars:
    """Its decay, and its bias correction in ``lr`` and ``eps``."""
    left = 1 - power(beta2, t)
    return {
        "lr": number(group["lr"]) * square_root(left),
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "eps": group["eps"] * left,
    }


def _scalars(group: Group, t: int) -> Scalars:
    return {**decays(group, 2), **_second_moment(group, group["betas"][1], t)}


def _logarithmic_scalars(group: Group, t: int) -> Scalars:
    share = 1 / logarithm(number(t) + 2)
    return {"beta1": 1 - share, "one_minus_beta1": share, **_second_moment(group, group["beta2"], t)}


RULE = Rule("ano", moments=("exp_avg", "exp_avg_sq"), scalars=_scalars, uses_step=True)
LOGARITHMIC = Rule("ano", moments=("exp_avg", "exp_avg_sq"), scalars=_logarithmic_scalars, uses_step=True)


class Ano(SignOptimizer):
    r"""Sign of the momentum, size of the gradient: steps that react at once in noise.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 1e-4.
        betas: decay of the two moments, the first in [0, 1), the second in [0.5, 1). Default: (0.92, 0.99).
        eps: added to the second moment, under the root, at least 0. Default: 1e-8.
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
        >>> optimizer = Ano(model.parameters(), lr=1e-4)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    Ano [AN]:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, \mathrm{sign}(g_t^2 - v_{t-1})\, g_t^2 \\
        p_t &= (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \mathrm{lr} \cdot
        \frac{|g_t|}{\sqrt{v_t / (1 - \beta_2^t) + \epsilon}}\, \mathrm{sign}(m_t)

    Lambda is ``weight_decay``. ``v`` moves towards the squared gradient as Yogi's, and decays beside, which Yogi's does
    not; it is never negative for ``betas[1]`` of 0.5 and more. ``eps`` is under the root as in the authors' package
    (``ano-optimizer`` 1.0.0); the paper adds it to the root. ``m`` needs no bias correction, since only its sign
    counts. A weight whose gradient is 0 stays.

    State: ``exp_avg`` (m), ``exp_avg_sq`` (v) and ``step``.

    Source: [AN] Kegreisz, arXiv 2508.18258.
    """

    RULE = RULE
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": Betas(("betas[0]", "betas[1]"), low=SMALLEST_BETA),
        "eps": Number(),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        *,
        betas: tuple[float, float] = (0.92, 0.99),
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


class Anolog(SignOptimizer):
    r"""Ano whose momentum remembers longer as training goes on, by a logarithm.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 1e-4.
        beta2: decay of the second moment, in [0.5, 1). Default: 0.999.
        eps: added to the second moment, under the root, at least 0. Default: 1e-8.
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
        >>> optimizer = Anolog(model.parameters(), lr=1e-4)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    :class:`Ano` with a first decay that no one has to choose [AN]:

    .. math::
        \beta_{1,t} = 1 - \frac{1}{\log(t + 2)}

    It is 0.09 at the first step, 0.78 at the hundredth and 0.91 at the hundred thousandth. This is the paper's
    schedule. Both codes of its author have ``1 - 1 / log(max(2, t))``, which is -0.44 at the first two steps: there the
    gradient counts 1.44 times, and the momentum before it is subtracted. They also differ from each other in ``beta2``,
    0.99 and 0.999, and the one of the experiments leaves out the bias correction of the second moment, which this has.

    The logarithm is made of additions, multiplications and divisions, with the same bits on every backend.

    State: ``exp_avg`` (m), ``exp_avg_sq`` (v) and ``step``. Groups also carry an empty ``betas``, only so that
    OneCycleLR and CyclicLR accept the optimizer; what they write there is not used.

    Source: [AN] Kegreisz, arXiv 2508.18258.
    """

    RULE = LOGARITHMIC
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "beta2": Number(SMALLEST_BETA, 1.0), "eps": Number()}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        *,
        beta2: float = 0.999,
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
            "beta2": beta2,
            "betas": (),
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


def ano(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.92, 0.99),
    eps: float = 1e-8,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`Ano`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs: fp32, of the parameters' shapes and strides; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, betas, eps: as in :class:`Ano`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> exp_avg_sqs = [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> ano(params, grads, exp_avgs, exp_avg_sqs, state_steps, lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        Ano,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs},
        state_steps=state_steps,
        lr=lr,
        betas=betas,
        eps=eps,
        **hyperparameters,
    )


def anolog(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta2: float = 0.999,
    eps: float = 1e-8,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`Anolog`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs: fp32, of the parameters' shapes and strides; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, beta2, eps: as in :class:`Anolog`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> exp_avg_sqs = [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> anolog(params, grads, exp_avgs, exp_avg_sqs, state_steps, lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        Anolog,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs},
        state_steps=state_steps,
        lr=lr,
        beta2=beta2,
        eps=eps,
        **hyperparameters,
    )

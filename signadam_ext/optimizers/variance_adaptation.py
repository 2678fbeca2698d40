"""SVAG, M-SVAG and ADAM*: steps scaled by what the gradient's variance leaves of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core import checks
from ..core.hyperparameters import FLAG, LEARNING_RATE, ONE_BETA, Checks, Choice
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, RuleChoice, Scalars, decays, rule_by
from ..core.symbols import at_least, power
from .base import Params, SignOptimizer
from .step_lists import step_lists

#: Where the variance comes from: exponential averages of the gradient, or ``param.grad_variance``.
VARIANCES = ("ema", "minibatch")


def variance_share(beta: float, t: int) -> float:
    """rho of [BH, Eq. 10]: the momentum's variance in units of the gradient's; 1 at t = 1, late (1 - b) / (1 + b)."""
    left = power(beta, t)
    return ((1 - beta) * (1 + left)) / ((1 + beta) * (1 - left))


def _scalars(group: Group, t: int) -> Scalars:
    (beta,) = group["betas"]
    rho = variance_share(beta, t)
    return {
        **decays(group, 1),
        "bias_correction": 1 - power(beta, t),
        "rho": rho,
        # The draft's estimate is not divided; 0 stands for a variance of 0.
        "one_minus_rho": at_least(1 - rho, 0.0) if group["bias_correct_variance"] else 1.0,
    }


def _minibatch_scalars(group: Group, t: int) -> Scalars:
    (mu,) = group["betas"]
    return {"beta1": mu, "beta2": mu * mu}


def _ema(name: str, follows_gradient: bool = False) -> Rule:
    moments = ("exp_avg", "exp_avg_sq")
    return Rule(name, moments, _scalars, uses_step=True, follows_gradient=follows_gradient)


def _minibatch(name: str) -> Rule:
    return Rule(name, moments=("momentum_buffer", "exp_avg_var"), scalars=_minibatch_scalars, reads_variance=True)


SVAG_RULE = _ema("svag", follows_gradient=True)
MSVAG_RULES = {"ema": _ema("msvag"), "minibatch": _minibatch("msvag_minibatch")}
ADAM_STAR_RULES = {"ema": _ema("adam_star"), "minibatch": _minibatch("adam_star_minibatch")}
ADAM_STAR_PLAIN_RULE = _ema("adam_star_plain", follows_gradient=True)


class SVAG(SignOptimizer):
    r"""SGD that makes each entry of the gradient smaller the more it varies.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 0.01.
        beta: decay of the momentum, in [0, 1). Groups keep it as ``betas=(beta,)``, where schedulers look for it.
            Default: 0.9.
        bias_correct_variance: divide the variance by 1 - rho (below), which makes it unbiased; False leaves it too
            small, as in the draft [BH0]. Default: True.
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
        caution: refused, since the step always has the gradient's sign. Default: None.
        foreach, fused, differentiable, capturable: for code written for torch.optim. The update is always fused; True
            for fused also takes the scale of a GradScaler in the step, and skips it without waiting for the device.
            differentiable may not be True.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = SVAG(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    SVAG [BH, Alg. 3] scales each entry of the gradient by what its variance leaves of it:

    .. math::
        \tilde m_t &= \beta \tilde m_{t-1} + (1 - \beta) g_t, \quad
        \tilde v_t = \beta \tilde v_{t-1} + (1 - \beta) g_t^2, \quad
        m_t = \tilde m_t / (1 - \beta^t), \; v_t = \tilde v_t / (1 - \beta^t) \\
        \rho_t &= \frac{(1 - \beta)(1 + \beta^t)}{(1 + \beta)(1 - \beta^t)}, \quad
        s_t = \max(v_t - m_t^2, 0) / (1 - \rho_t) \\
        p_t &= p_{t-1} - \mathrm{lr} \cdot \frac{m_t^2}{m_t^2 + s_t}\, g_t

    At t = 1, and with ``beta=0``, there is no variance to be seen and s is 0. Where the denominator is 0 the parameter
    stays. The factor lies in [0, 1] as it is; the authors' released code clips it there, and caps rho at 0.9999.

    Moments in few bits add to the variance that this method measures, so that it takes smaller steps.

    State: ``exp_avg`` and ``exp_avg_sq``, before their bias correction, and ``step``.

    Source: [BH] Balles and Hennig, arXiv 1705.07774, Alg. 3 and Sec. 4.
    """

    RULE = SVAG_RULE
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": ONE_BETA,
        "bias_correct_variance": FLAG,
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        beta: float = 0.9,
        bias_correct_variance: bool = True,
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
            "bias_correct_variance": bias_correct_variance,
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


class MSVAG(SignOptimizer):
    r"""SGD with momentum that makes each entry of a step smaller the more its gradient varies.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. With "minibatch" the momentum sums to 1 /
            (1 - beta) times as much, so that the learning rate is to be smaller by 1 - beta. Default: 0.01.
        beta: decay of the momentum, in [0, 1). Groups keep it as ``betas=(beta,)``, where schedulers look for it.
            Default: 0.9.
        bias_correct_variance: divide the variance by 1 - rho (below), which makes it unbiased; False leaves it too
            small, as in the draft [BH0]. Means nothing for "minibatch". Default: True.
        variance: "ema": estimated from moving averages; "minibatch": read from ``p.grad_variance``, which
            :func:`signadam_ext.per_sample_variance` fills. Default: "ema".
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
        >>> optimizer = MSVAG(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    M-SVAG [BH, Alg. 1] does the same with the momentum. With m, s and rho as in :class:`SVAG`:

    .. math::
        p_t = p_{t-1} - \mathrm{lr} \cdot \frac{m_t^2}{m_t^2 + \rho_t s_t}\, m_t

    The first step is a gradient step. With ``variance="minibatch"`` [BH0, Alg. 3] the variance is not estimated from
    the past but read from ``param.grad_variance``, which :func:`signadam_ext.per_sample_variance` fills. With mu for
    ``beta``:

    .. math::
        m_t = \mu m_{t-1} + g_t, \quad S_t = \mu^2 S_{t-1} + \hat s_t, \quad
        p_t = p_{t-1} - \mathrm{lr} \cdot \frac{m_t^2}{m_t^2 + S_t}\, m_t

    Where a denominator is 0 the parameter stays. The factor lies in [0, 1] as it is; the authors' released code clips
    it there, and caps rho at 0.9999 instead of taking s = 0 at t = 1.

    Moments in few bits add to the variance that this method measures, so that it takes smaller steps. Neither
    ``maximize`` nor coupled weight decay changes a variance, so ``grad_variance`` is taken as it is: it must not be
    negative, and it stays until it is written again, also over a step that forgets to. With
    :func:`signadam_ext.release_gradients` it must be there before backward. ``m * m`` loses digits below ``|m|`` of
    1e-19 and overflows above 1.8e19.

    State: ``exp_avg`` and ``exp_avg_sq``, before their bias correction, or with "minibatch" ``momentum_buffer``
    (m) and ``exp_avg_var`` (S), and ``step``.

    Sources: [BH] Balles and Hennig, arXiv 1705.07774, Alg. 1; [BH0] its anonymous draft for ICLR 2018, Alg. 3.
    """

    RULE = rule_by("variance", MSVAG_RULES)
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": ONE_BETA,
        "bias_correct_variance": FLAG,
        "variance": Choice(VARIANCES),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        beta: float = 0.9,
        bias_correct_variance: bool = True,
        variance: str = "ema",
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
            "bias_correct_variance": bias_correct_variance,
            "variance": variance,
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


def _adam_star_rule(group: Group) -> Rule:
    rule = checks.look_up("variance", group["variance"], ADAM_STAR_RULES)
    if group["momentum"]:
        return rule
    if rule.reads_variance:
        raise ValueError(
            f"momentum=False with variance={group['variance']!r}: ADAM* without momentum is defined by exponential "
            "averages only; use variance='ema'"
        )
    return ADAM_STAR_PLAIN_RULE


class AdamStar(SignOptimizer):
    r"""Sign of the momentum, each entry smaller the more its gradient varies: the ADAM* of *Dissecting Adam*.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 1e-3.
        beta: decay of the momentum, in [0, 1). Groups keep it as ``betas=(beta,)``, where schedulers look for it.
            Default: 0.9.
        momentum: whether the step has the sign of the momentum or of the gradient. Default: True.
        bias_correct_variance: divide the variance by 1 - rho (below), which makes it unbiased; False leaves it too
            small, as in the draft [BH0]. Means nothing for "minibatch". Default: True.
        variance: "ema": estimated from moving averages; "minibatch": read from ``p.grad_variance``, which
            :func:`signadam_ext.per_sample_variance` fills; with momentum only. Default: "ema".
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
            by this step's share, which reads everything twice ("exact"), or the last step's ("delayed");
            refused without momentum. Default: None.
        foreach, fused, differentiable, capturable: for code written for torch.optim. The update is always fused; True
            for fused also takes the scale of a GradScaler in the step, and skips it without waiting for the device.
            differentiable may not be True.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = AdamStar(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    ADAM* [BH, Alg. 4]. With m, s and rho as in :class:`SVAG`:

    .. math::
        p_t &= p_{t-1} - \mathrm{lr} \cdot m_t / \sqrt{m_t^2 + \rho_t s_t} \\
        p_t &= p_{t-1} - \mathrm{lr} \cdot \mathrm{sign}(g_t)\, |m_t| / \sqrt{m_t^2 + s_t}
        \quad \text{with momentum=False [BH, C.3]}

    With ``variance="minibatch"`` [BH0, Alg. 5], m and S as in :class:`MSVAG`:

    .. math::
        p_t = p_{t-1} - \mathrm{lr} \cdot m_t / \sqrt{m_t^2 + S_t}

    No entry moves by more than ``lr``, but for roundings, which are large where ``|m|`` is below 1e-19. Where a
    denominator is 0 the parameter stays.

    State: as of :class:`MSVAG`.

    Sources: [BH] Balles and Hennig, arXiv 1705.07774, Alg. 4 and App. C.3; [BH0] its anonymous draft for ICLR 2018,
    Alg. 5.
    """

    RULE = RuleChoice(_adam_star_rule)
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": ONE_BETA,
        "momentum": FLAG,
        "bias_correct_variance": FLAG,
        "variance": Choice(VARIANCES),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.9,
        momentum: bool = True,
        bias_correct_variance: bool = True,
        variance: str = "ema",
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
            "momentum": momentum,
            "bias_correct_variance": bias_correct_variance,
            "variance": variance,
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


def svag(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta: float = 0.9,
    bias_correct_variance: bool = True,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`SVAG`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs: fp32, of the parameters' shapes and strides; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, beta, bias_correct_variance: as in :class:`SVAG`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> exp_avg_sqs = [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> svag(params, grads, exp_avgs, exp_avg_sqs, state_steps, lr=0.5)
        >>> params
        [tensor([-0.5000,  1.0000,  0.0000])]
    """
    step_lists(
        SVAG,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs},
        state_steps=state_steps,
        lr=lr,
        beta=beta,
        bias_correct_variance=bias_correct_variance,
        **hyperparameters,
    )


def msvag(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor] | None = None,
    grad_variances: Sequence[Tensor | None] | None = None,
    *,
    lr: float | Tensor,
    beta: float = 0.9,
    bias_correct_variance: bool = True,
    variance: str = "ema",
    **hyperparameters: Any,
) -> None:
    """One step of :class:`MSVAG`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs: fp32, of the parameters' shapes and strides; zeros at first. With "minibatch"
            these are the ``momentum_buffers`` and the ``exp_avg_vars``.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up; "ema" needs them.
        grad_variances: the variances of the gradients, for "minibatch".
        lr, beta, bias_correct_variance, variance: as in :class:`MSVAG`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> exp_avg_sqs = [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> msvag(params, grads, exp_avgs, exp_avg_sqs, state_steps, lr=0.5)
        >>> params
        [tensor([-0.5000,  1.0000,  0.0000])]
    """
    step_lists(
        MSVAG,
        params,
        grads,
        _moments(exp_avgs, exp_avg_sqs),
        state_steps=state_steps,
        grad_variances=grad_variances,
        lr=lr,
        beta=beta,
        bias_correct_variance=bias_correct_variance,
        variance=variance,
        **hyperparameters,
    )


def adam_star(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor] | None = None,
    grad_variances: Sequence[Tensor | None] | None = None,
    *,
    lr: float | Tensor,
    beta: float = 0.9,
    momentum: bool = True,
    bias_correct_variance: bool = True,
    variance: str = "ema",
    **hyperparameters: Any,
) -> None:
    """One step of :class:`AdamStar`, in place on ``params`` and the state lists.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, state_steps, grad_variances: as of :func:`msvag`.
        lr, beta, momentum, bias_correct_variance, variance: as in :class:`AdamStar`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> exp_avg_sqs = [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> adam_star(params, grads, exp_avgs, exp_avg_sqs, state_steps, lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        AdamStar,
        params,
        grads,
        _moments(exp_avgs, exp_avg_sqs),
        state_steps=state_steps,
        grad_variances=grad_variances,
        lr=lr,
        beta=beta,
        momentum=momentum,
        bias_correct_variance=bias_correct_variance,
        variance=variance,
        **hyperparameters,
    )


def _moments(first: Sequence[Tensor], second: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    """Both moments by the names of either ``variance``; the rule picks its own."""
    return {"exp_avg": first, "momentum_buffer": first, "exp_avg_sq": second, "exp_avg_var": second}

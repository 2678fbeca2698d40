"""AdEMAMix: Adam with a second, slow momentum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, THREE_BETAS, Checks, Number, Optional
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars, decays
from ..core.symbols import at_least, exponential, is_nonzero, logarithm, number, power, square_root
from .base import Params, SignOptimizer
from .step_lists import step_lists

#: Added to a beta before its logarithm is taken, by the authors: the half-life of 0 is not 0.
_BETA_EPS = 1e-8


def _warmup(t: Any, steps: Any) -> tuple[Any, Any, Any]:
    """Of a warm-up of so many steps: how much is over, how much is left, and 1 as long as that is more than 0."""
    share = t / number(steps)
    rest = at_least(1 - share, 0.0)
    return share, rest, is_nonzero(rest)


def _forgotten(beta: Any) -> Any:
    """How fast a momentum forgets: a gradient is down to ``e ** -this`` after a step."""
    return logarithm(1 / (number(beta) + _BETA_EPS))


def _alpha(group: Group, t: int) -> Any:
    alpha = number(group["alpha"])
    if group["t_alpha"] is None:
        return alpha
    share, _, grows = _warmup(t, group["t_alpha"])
    return alpha * (grows * share + (1 - grows))


def _beta3(group: Group, t: int) -> Any:
    """The slow decay at step ``t``: its half-life grows in equal steps, from that of the fast one."""
    fast, _, slow = group["betas"]
    if group["t_beta3"] is None:
        return number(slow)
    share, rest, grows = _warmup(t, group["t_beta3"])
    half_life = rest / _forgotten(fast) + share / _forgotten(slow)  # in units of it / log(2)
    return grows * exponential(-1 / half_life) + (1 - grows) * number(slow)


def _scalars(group: Group, t: int) -> Scalars:
    beta1, beta2, _ = group["betas"]
    lr, beta3 = number(group["lr"]), _beta3(group, t)
    return {
        "lr": lr / (1 - power(beta1, t)),
        **decays(group, 3),
        "beta3": beta3,
        "one_minus_beta3": 1 - beta3,
        "mix": lr * _alpha(group, t),
        "bias_correction": square_root(1 - power(beta2, t)),
        "eps": number(group["eps"]),
    }


RULE = Rule("ademamix", moments=("exp_avg", "exp_avg_sq", "exp_avg_slow"), scalars=_scalars, uses_step=True)

_STEPS = Optional(Number(0.0, open_low=True))


class AdEMAMix(SignOptimizer):
    r"""Adam with a second, slow momentum: AdEMAMix.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 1e-3.
        betas: decay of the momentum, of the second moment and of the slow momentum, each in [0, 1). Default: (0.9,
            0.999, 0.9999).
        alpha: weight of the slow momentum in the step, at least 0. Default: 2.0.
        eps: added to the root of the second moment, at least 0. Default: 1e-8.
        t_alpha: over how many steps ``alpha`` grows from 0; the authors take the whole training. Default: None, it
            begins at its value.
        t_beta3: over how many steps the half-life of the slow momentum grows from that of the other, likewise. Default:
            None, it begins at its value.
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
        >>> optimizer = AdEMAMix(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    AdEMAMix [PA, Alg. 1]. A momentum that remembers thousands of steps helps, if another answers at once:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        x_t = \beta_{3,t}\, x_{t-1} + (1 - \beta_{3,t}) g_t \\
        p_t &= (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \mathrm{lr}\,
        \frac{m_t / (1 - \beta_1^t) + \alpha_t x_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon} \\
        \alpha_t &= \alpha \min(t / T_\alpha, 1), \qquad
        \beta_{3,t} = f^{-1}\left((1 - t/T_{\beta_3}) f(\beta_1) + (t/T_{\beta_3}) f(\beta_3)\right),\quad
        f(\beta) = \frac{\ln 0.5}{\ln(\beta + 10^{-8})} - 1

    Lambda is ``weight_decay``. Both schedules are those of the authors' code, where they are called ``alpha_warmup``
    and ``beta3_warmup``; the slow momentum is not corrected for its bias, there as here. Other packages have other
    defaults (``alpha=5``) and print :math:`\beta_{3,t}` in another form, which equals this one but for :math:`10^{-8}`.
    The first momentum is kept with ``betas[0] = 0``, too. With ``alpha=0`` this is :class:`AdamW`, with its bits.

    A slow momentum of bf16 is rounded stochastically, as all state is: rounded to nearest it would stand still, since
    ``1 - betas[2]`` is less than half of its last place.

    State: ``exp_avg`` (m), ``exp_avg_sq`` (v), ``exp_avg_slow`` (x) and ``step``.

    Source: [PA] Pagliardini, Ablin and Grangier, arXiv 2409.03137, Alg. 1 and App. A.
    """

    RULE = RULE
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": THREE_BETAS,
        "alpha": Number(),
        "eps": Number(),
        "t_alpha": _STEPS,
        "t_beta3": _STEPS,
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float | Tensor = 2.0,
        eps: float | Tensor = 1e-8,
        t_alpha: float | None = None,
        t_beta3: float | None = None,
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
            "alpha": alpha,
            "eps": eps,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
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
        for index in (0, 2):
            beta = group["betas"][index]
            if group["t_beta3"] is not None and isinstance(beta, float) and beta + _BETA_EPS >= 1:
                raise ValueError(
                    f"betas[{index}]={beta!r} with t_beta3: must be less than 1 - {_BETA_EPS:g}, or it has no half-life"
                )


def ademamix(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_slows: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 2.0,
    eps: float = 1e-8,
    t_alpha: float | None = None,
    t_beta3: float | None = None,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`AdEMAMix`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs, exp_avg_slows: fp32, of the parameters' shapes and strides; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, betas, alpha, eps, t_alpha, t_beta3: as in :class:`AdEMAMix`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> moments = [[torch.zeros(3)] for _ in range(3)]
        >>> ademamix(params, grads, *moments, [torch.tensor(0.0)], lr=0.5)
        >>> params
        [tensor([-0.5001,  0.5001,  0.0000])]
    """
    step_lists(
        AdEMAMix,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "exp_avg_slow": exp_avg_slows},
        state_steps=state_steps,
        lr=lr,
        betas=betas,
        alpha=alpha,
        eps=eps,
        t_alpha=t_alpha,
        t_beta3=t_beta3,
        **hyperparameters,
    )

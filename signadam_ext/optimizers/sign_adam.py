"""signADAM: Adam on the sign of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, TWO_BETAS, Checks, Choice, Number
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars, decays, rule_by
from ..core.symbols import number, power, square_root
from .base import Params, SignOptimizer
from .step_lists import step_lists


def _exact_scalars(group: Group, t: int) -> Scalars:
    return {**decays(group, 2), "eps": number(group["eps"])}


def _analytic_scalars(group: Group, t: int) -> Scalars:
    _, beta2 = group["betas"]
    return {**decays(group, 2), "denominator": square_root(1 - power(beta2, t)) + group["eps"]}


RULES = {
    "exact": Rule("sign_adam", moments=("exp_avg", "exp_avg_sq"), scalars=_exact_scalars, bound=1.0),
    "analytic": Rule("sign_adam_analytic", moments=("exp_avg",), scalars=_analytic_scalars, bound=1.0, uses_step=True),
}


class SignAdam(SignOptimizer):
    r"""Adam on the sign of the gradient: signADAM.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. The default is Adam's, and [SA]'s for
            MNIST; [SA] gives none for signADAM itself. Default: 1e-3.
        betas: decay of the two moments, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the root of the second moment, at least 0. Default: 1e-8.
        second_moment: "exact" keeps it in memory; "analytic" computes it, which is equal where no gradient is 0 and
            saves a moment. Default: "exact".
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
            by this step's share, which reads everything twice ("exact"), or the last step's ("delayed"). Default: None.
        foreach, fused, differentiable, capturable: for code written for torch.optim. The update is always fused; True
            for fused also takes the scale of a GradScaler in the step, and skips it without waiting for the device.
            differentiable may not be True.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = SignAdam(model.parameters(), lr=1e-3, second_moment="analytic")
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    signADAM [SA, Alg. 2] has Adam's moments on the sign of the gradient:

    .. math::
        s_t &= \mathrm{sign}(g_t) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) s_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) s_t^2 \\
        p_t &= p_{t-1} - \mathrm{lr} \cdot m_t / (\sqrt{v_t} + \epsilon)

    As long as no gradient entry is exactly 0, :math:`v_t = 1 - \beta_2^t`; ``second_moment="analytic"`` uses that
    scalar and saves a moment and 8 of 28 bytes of traffic [SA, Sec. 4]. :math:`|m_t| \le 1` always [SA, Lemma 1].

    There is no bias correction, as in the paper: while ``m`` is fed a constant sign, steps are 3.2, 4.2, 5.8, 6.5 times
    ``lr`` at t = 1, 2, 5, 10 with the default betas, at most 6.6 at t = 12, and 3.2 at t = 100. Warm up.

    State: ``exp_avg`` (m), if exact ``exp_avg_sq`` (v), and ``step``.

    Source: [SA] Wang et al., arXiv 1907.09008, Alg. 2 and Sec. 4. The paper prints the analytic moment with exponent
    t - 1, which is 0 at the first step and contradicts its Alg. 2: taken as a misprint.
    """

    RULE = rule_by("second_moment", RULES)
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": TWO_BETAS,
        "eps": Number(),
        "second_moment": Choice(tuple(RULES)),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        second_moment: str = "exact",
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
            "second_moment": second_moment,
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


def sign_adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    second_moment: str = "exact",
    **hyperparameters: Any,
) -> None:
    """One step of :class:`SignAdam`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs: fp32, of the parameters' shapes and strides; zeros at first. ``exp_avg_sqs`` is not read,
            and may be empty, when ``second_moment="analytic"``.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up; "analytic" needs them.
        lr, betas, eps, second_moment: as in :class:`SignAdam`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> exp_avg_sqs = [torch.zeros(3)]
        >>> sign_adam(params, grads, exp_avgs, exp_avg_sqs, lr=0.5)
        >>> params
        [tensor([-1.5811,  1.5811,  0.0000])]
    """
    step_lists(
        SignAdam,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs},
        state_steps=state_steps,
        lr=lr,
        betas=betas,
        eps=eps,
        second_moment=second_moment,
        **hyperparameters,
    )

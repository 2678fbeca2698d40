"""MARS: AdamW of gradients that are corrected by their difference to the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, TWO_BETAS, Checks, Number, Optional
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, RuleChoice, Scalars, decays
from ..core.symbols import number, power, square_root
from .base import Params, SignOptimizer
from .step_lists import step_lists


def _scalars(group: Group, t: int) -> Scalars:
    beta1, beta2 = group["betas"]
    correction = square_root(1 - power(beta2, t))
    return {
        **decays(group, 2),
        "correction": number(group["gamma"]) * number(beta1) / (1 - number(beta1)),
        "lr": number(group["lr"]) * correction / (1 - power(beta1, t)),
        "eps": number(group["eps"]) * correction,
        # Times the norm of a tensor's corrected gradient.
        "alpha": 0.0 if group["max_norm"] is None else 1.0 / number(group["max_norm"]),
    }


RULE = Rule("mars_adamw", moments=("exp_avg", "exp_avg_sq", "last_grad"), scalars=_scalars, uses_step=True)
CLIPPED_RULE = replace(RULE, threshold_pass="PASS_BEFORE", threshold_state="corrected_norm", update_scale="norm")


class MARSAdamW(SignOptimizer):
    r"""AdamW of variance-reduced gradients: MARS.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 3e-3.
        betas: decay of the two moments, each in [0, 1). Default: (0.95, 0.99).
        gamma: how much of the difference to the last gradient is added, at least 0; 0 is AdamW. Default: 0.025.
        eps: added to the root of the second moment, at least 0. Default: 1e-8.
        max_norm: the largest norm of each tensor's corrected gradient, above 0; a longer one is scaled to it. The norm
            is the whole tensor's, sharded or not, and takes a pass over the gradient and the last one before the
            update. None: as it is, in one pass. Default: 1.
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
            columns)`` of a matrix; "rms", its root mean square before the last step, refused unless ``max_norm=None``;
            or a function of its name (or None) and shape. A number in a group is left to schedulers that multiply with
            it. Default: 1.0.
        caution: entries of a step that do not go against the gradient are left out, and the others larger in exchange:
            by this step's share, which reads everything twice ("exact"), or the last step's ("delayed");
            refused unless ``max_norm=None``. Default: None.
        foreach, fused, differentiable, capturable: for code written for torch.optim. The update is always fused; True
            for fused also takes the scale of a GradScaler in the step, and skips it without waiting for the device.
            differentiable may not be True.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = MARSAdamW(model.parameters(), lr=3e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    MARS-AdamW [MA, Alg. 2], in the form without a second gradient of the same batch, as in the authors' code:

    .. math::
        c_t &= g_t + \gamma \frac{\beta_1}{1 - \beta_1} (g_t - g_{t-1}), \qquad
        \tilde c_t = c_t / \max(1, \lVert c_t \rVert / \mathrm{max\_norm}) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \tilde c_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) \tilde c_t^2 \\
        p_t &= (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} -
            \mathrm{lr} \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Lambda is ``weight_decay``, and :math:`g_0 = 0`, so that at first
    :math:`c_1 = (1 + \gamma \beta_1 / (1 - \beta_1)) g_1`. timm's MARS takes :math:`c_1 = g_1` instead, which is the
    same where both are longer than ``max_norm``. The last gradient is a copy of the effective one, after clipping by
    ``max_grad_norm`` and coupled decay: it is right while gradients are released, and after
    ``zero_grad(set_to_none=False)``, where the authors' code, which keeps a reference, finds zeros. A norm that is not
    finite changes nothing of the tensor's scale: that of the step before counts.

    The authors update tensors of one dimension by AdamW: give them a group of their own, with ``gamma=0``,
    ``max_norm=None``, ``betas=(0.9, 0.95)``. :class:`MARSLion` needs no last gradient.

    ``max_norm`` scales steps by a number of the tensor's, as caution does: "auto" takes triton first.

    State: ``exp_avg`` (m), ``exp_avg_sq`` (v), ``last_grad``, ``step``, and with ``max_norm`` ``corrected_norm``.

    Source: [MA] Yuan et al., arXiv 2411.10438, Alg. 2; AGI-Arena/MARS.
    """

    RULE = RuleChoice(lambda group: RULE if group["max_norm"] is None else CLIPPED_RULE)
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": TWO_BETAS,
        "gamma": Number(),
        "eps": Number(),
        "max_norm": Optional(Number(open_low=True)),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.99),
        gamma: float | Tensor = 0.025,
        eps: float | Tensor = 1e-8,
        max_norm: float | None = 1.0,
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
            "eps": eps,
            "max_norm": max_norm,
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


def mars_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    last_grads: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.95, 0.99),
    gamma: float = 0.025,
    eps: float = 1e-8,
    max_norm: float | None = 1.0,
    corrected_norms: Sequence[Tensor] | None = None,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`MARSAdamW`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs, last_grads: fp32, of the parameters' shapes and strides; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, betas, gamma, eps, max_norm: as in :class:`MARSAdamW`.
        corrected_norms: 0-dim float64 on the parameters' devices, zeros at first; with ``max_norm``.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs, exp_avg_sqs, last_grads = ([torch.zeros(3)] for _ in range(3))
        >>> state_steps = [torch.tensor(0.0)]
        >>> mars_adamw(params, grads, exp_avgs, exp_avg_sqs, last_grads, state_steps, lr=0.5, max_norm=None)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        MARSAdamW,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "last_grad": last_grads},
        threshold_states=corrected_norms,
        state_steps=state_steps,
        lr=lr,
        betas=betas,
        gamma=gamma,
        eps=eps,
        max_norm=max_norm,
        **hyperparameters,
    )

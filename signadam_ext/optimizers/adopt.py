"""ADOPT: Adam that normalizes a gradient by those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import FLAG, LEARNING_RATE, TWO_BETAS, Checks, Number
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars, decays
from ..core.symbols import at_least, is_nonzero, number, square_root
from .base import Params, SignOptimizer
from .step_lists import step_lists


def _scalars(group: Group, t: int) -> Scalars:
    before = t - 1
    # The first second moment is the first gradient's square.
    beta2 = number(group["betas"][1]) * is_nonzero(before)
    return {
        **decays(group, 2),
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        # Not 0 in fp32, so that entries without a gradient stay, as do those that fill up the last block of codes.
        "eps": at_least(number(group["eps"]), 2.0**-149),
        # Without clipping infinite in fp32; 0 at first.
        "upper": square_root(square_root(before)) if group["clip"] else before * 1e300,
    }


RULE = Rule("adopt", moments=("exp_avg", "exp_avg_sq"), scalars=_scalars, uses_step=True, moves_at_first=False)


class ADOPT(SignOptimizer):
    r"""Adam that normalizes each gradient by those before it: ADOPT.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 1e-3.
        betas: decay of the momentum and of the second moment, each in [0, 1). Default: (0.9, 0.9999).
        eps: what the root of the second moment is at least, at least 0. Default: 1e-6.
        clip: whether a normalized gradient is cut off at the fourth root of the number of steps before. Default: True.
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
        >>> optimizer = ADOPT(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    ADOPT [AD, Alg. 2]. Each gradient is normalized by the second moment of those before it, on which it does not
    depend; so the method converges with any second beta. The first step makes the second moment, and moves nothing:

    .. math::
        v_1 &= g_1^2; \quad \text{for}\ t > 1: \quad
        n_t = \mathrm{clip}\left(\frac{g_t}{\max(\sqrt{v_{t-1}}, \epsilon)}, \pm (t-1)^{1/4}\right), \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) n_t, \qquad
        p_t = (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \mathrm{lr} \cdot m_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2

    Lambda is ``weight_decay``, which the first step leaves out too; coupled decay enters its second moment. All as in
    the authors' code, which counts steps from 0: its second call clips at 1. There the limit is a function in the
    group, which no state dict can hold; here there is one limit, or ``clip=False``. A NaN gradient leaves p and v NaN,
    but the first one v alone. An ``eps`` of 0 counts as the smallest fp32, so that an entry without a gradient stays.

    State: ``exp_avg`` (m), ``exp_avg_sq`` (v) and ``step``.

    Source: [AD] Taniguchi et al., arXiv 2411.02853, Alg. 2.
    """

    RULE = RULE
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "betas": TWO_BETAS, "eps": Number(), "clip": FLAG}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float | Tensor = 1e-6,
        clip: bool = True,
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
            "clip": clip,
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


def adopt(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.9999),
    eps: float = 1e-6,
    clip: bool = True,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`ADOPT`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs: fp32, of the parameters' shapes and strides; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, betas, eps, clip: as in :class:`ADOPT`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> exp_avg_sqs = [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> adopt(params, grads, exp_avgs, exp_avg_sqs, state_steps, lr=0.5)
        >>> params
        [tensor([0., 0., 0.])]
        >>> exp_avg_sqs
        [tensor([1., 4., 0.])]
    """
    step_lists(
        ADOPT,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs},
        state_steps=state_steps,
        lr=lr,
        betas=betas,
        eps=eps,
        clip=clip,
        **hyperparameters,
    )

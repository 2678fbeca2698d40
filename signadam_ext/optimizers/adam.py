"""Adam, AdamW and AMSGrad: the baselines, fused as everything else here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import FLAG, LEARNING_RATE, TWO_BETAS, Checks, Number
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars, decays, rule_by
from ..core.symbols import number, power, square_root
from .base import Params, SignOptimizer
from .step_lists import step_lists


def _scalars(group: Group, t: int) -> Scalars:
    beta1, beta2 = group["betas"]
    return {
        "lr": number(group["lr"]) / (1 - power(beta1, t)),
        **decays(group, 2),
        "bias_correction": square_root(1 - power(beta2, t)),
        "eps": number(group["eps"]),
    }


RULES = {
    False: Rule("adam", moments=("exp_avg", "exp_avg_sq"), scalars=_scalars, uses_step=True),
    True: Rule(
        "adam_amsgrad",
        moments=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        scalars=_scalars,
        uses_step=True,
        keeps_largest=True,
    ),
}


class Adam(SignOptimizer):
    r"""Adam, with moments in fewer bits where asked for.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 1e-3.
        betas: decay of the two moments, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the root of the second moment, at least 0. Default: 1e-8.
        weight_decay: at least 0. Default: 0.
        amsgrad: divide by the root of the largest second moment so far. Default: False.
        decoupled_weight_decay: whether the weight shrinks by ``1 - lr * weight_decay`` before the update, or
            ``weight_decay * p`` is added to the gradient. Default: False.
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
        >>> optimizer = Adam(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    Adam [KB, Alg. 1], with ``amsgrad`` as ``torch.optim.Adam`` has it:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= p_{t-1} - \frac{\mathrm{lr}}{1 - \beta_1^t} \cdot
        \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Equal to ``torch.optim.Adam`` up to rounding, not bit for bit: torch's ``lerp`` and ``addcmul`` round once where
    this rounds each operation. A step's error is at most that of its some fifteen operations, each 2^-24 of its
    result; the tests carry that bound through training and hold ``torch.optim.Adam`` in float64 against it.

    Arguments may be given by position in the order of ``torch.optim.Adam``. As there, and unlike the other optimizers
    here, ``decoupled_weight_decay`` is False unless given. ``amsgrad`` refuses a ``state_dtype`` of few bits.

    State: ``exp_avg`` (m), ``exp_avg_sq`` (v), with amsgrad ``max_exp_avg_sq``, and ``step``.

    Sources: [KB] Kingma and Ba, arXiv 1412.6980, Alg. 1; Reddi et al., arXiv 1904.09237, for amsgrad.
    """

    RULE = rule_by("amsgrad", RULES)
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": TWO_BETAS,
        "eps": Number(),
        "amsgrad": FLAG,
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
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
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "param_storage": param_storage,
            "seed": seed,
            "backend": backend,
        }
        super().__init__(params, given, others)


class AdamW(Adam):
    r"""AdamW: :class:`Adam` with decoupled weight decay.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr, betas, eps, amsgrad: as of :class:`Adam`.
        weight_decay: at least 0. Default: 0.01.
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
        >>> optimizer = AdamW(model.parameters(), lr=1e-3, state_dtype="int8")
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    AdamW [LH], with a decay of 0.01 unless given, as ``torch.optim.AdamW``:

    .. math::
        p_t = (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \text{Adam's step}

    Lambda is ``weight_decay``. The decay is not rounded by itself, so that it acts on bf16 parameters as well.

    State: as of :class:`Adam`.

    Source: [LH] Loshchilov and Hutter, arXiv 1711.05101, Alg. 2.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = "fp32",
        param_storage: str = "nearest",
        seed: int = 0,
        backend: str = "auto",
        **others: Unpack[OtherOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            max_grad_norm=max_grad_norm,
            state_dtype=state_dtype,
            param_storage=param_storage,
            seed=seed,
            backend=backend,
            **others,
        )

    def adapt_loaded_group(self, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """The decay of a checkpoint of torch's Adam becomes decoupled, as in torch.optim.AdamW."""
        if "seed" not in saved:  # which ours have
            group["decoupled_weight_decay"] = True


def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = False,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`Adam`, in place on ``params`` and the state lists; of :class:`AdamW` with decoupled decay.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs: fp32, of the parameters' shapes and strides; zeros at first. The last
            only for ``amsgrad``.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr, betas, eps, amsgrad, decoupled_weight_decay: as in :class:`Adam`.
        hyperparameters: ``weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> exp_avg_sqs = [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> adam(params, grads, exp_avgs, exp_avg_sqs, state_steps, lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        Adam,
        params,
        grads,
        {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "max_exp_avg_sq": max_exp_avg_sqs},
        state_steps=state_steps,
        lr=lr,
        betas=betas,
        eps=eps,
        amsgrad=amsgrad,
        decoupled_weight_decay=decoupled_weight_decay,
        **hyperparameters,
    )

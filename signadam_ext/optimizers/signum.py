"""SIGNUM: the sign of the momentum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import FLAG, LEARNING_RATE, ONE_BETA, Checks
from ..core.options import OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars, decays, rule_by
from ..core.symbols import power
from .base import Params, SignOptimizer
from .step_lists import step_lists


def _nesterov_scalars(group: Group, t: int) -> Scalars:
    """Of Lion's rule, which blends the old momentum with the gradient: what is left of both in the new one's blend."""
    (beta,) = group["betas"]
    past = power(beta, t)
    ahead, now = beta / (1 - past * beta), (1 - beta) / (1 - past)
    return {
        "beta1": ahead * beta,
        "one_minus_beta1": ahead * (1 - beta) + now,
        "beta2": beta,
        "one_minus_beta2": 1 - beta,
    }


RULE = Rule("signum", moments=("exp_avg",), scalars=lambda group, t: decays(group, 1))
RULES = {False: RULE, True: Rule("lion", moments=("exp_avg",), scalars=_nesterov_scalars, uses_step=True)}


class Signum(SignOptimizer):
    r"""Sign of the momentum: every weight moves by ``lr``.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0; an entry moves by this much, or not at all where the sign is 0. A float or a CPU
            tensor of one element. 1e-4 is a common choice for large models; the default is [SA]'s for MNIST. Default:
            1e-3.
        beta: decay of the momentum, in [0, 1). Groups keep it as ``betas=(beta,)``, where schedulers look for it.
            Default: 0.9.
        nesterov: whether the sign is that of the momentum one step ahead. Default: False.
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
        >>> optimizer = Signum(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    SIGNUM [BW], called M-SSD in [BH]:

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) g_t, \qquad p_t = p_{t-1} - \mathrm{lr} \cdot \mathrm{sign}(m_t)

    With ``nesterov``, as NVIDIA's Emerging-Optimizers has it, with its bias correction, the step is the sign of

    .. math::
        u_t = \frac{\beta\, m_t}{1 - \beta^{t+1}} + \frac{(1 - \beta)\, g_t}{1 - \beta^t}

    computed as a blend of :math:`m_{t-1}` and :math:`g_t`, in one rounding less. Without ``nesterov`` a bias correction
    would change no sign.

    ``sign(0) = sign(NaN) = 0``. Two things to know: one NaN gradient makes its entry of ``m`` NaN, and that weight
    silently stops updating; and ``m`` hardly ever is exactly 0, so a row that gets no more gradient keeps moving
    by ``lr`` until it underflows.

    State: ``exp_avg`` (m) and ``step``.

    Sources: [BW] Bernstein et al., arXiv 1802.04434, Alg. 2; [BH] Balles and Hennig, arXiv 1705.07774, Alg. 2;
    [SA] Wang et al., arXiv 1907.09008, Sec. 6.
    """

    RULE = rule_by("nesterov", RULES)
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "betas": ONE_BETA, "nesterov": FLAG}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.9,
        nesterov: bool = False,
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
            "nesterov": nesterov,
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes pickles of versions without ``nesterov`` as well."""
        if "defaults" in state:
            state = {**state, "defaults": {"nesterov": False, **state["defaults"]}}
        super().__setstate__(state)


def signum(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    state_steps: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    beta: float = 0.9,
    nesterov: bool = False,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`Signum`, in place on ``params`` and ``exp_avgs``.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs: fp32, of the parameters' shapes and strides; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up; only ``nesterov`` needs them.
        lr, beta, nesterov: as in :class:`Signum`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> exp_avgs = [torch.zeros(3)]
        >>> signum(params, grads, exp_avgs, lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        Signum,
        params,
        grads,
        {"exp_avg": exp_avgs},
        state_steps=state_steps,
        lr=lr,
        beta=beta,
        nesterov=nesterov,
        **hyperparameters,
    )

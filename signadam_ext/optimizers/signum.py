"""SIGNUM: the sign of the momentum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import checks
from ..lists import step_lists
from ..optimizer import Params, SignOptimizer
from ..rule import Group, Rule, Scalars


def _scalars(group: Group, t: int) -> Scalars:
    (beta,) = group["betas"]
    return {"beta1": beta, "one_minus_beta1": 1 - beta}


RULE = Rule("signum", moments=("exp_avg",), scalars=_scalars)


class Signum(SignOptimizer):
    r"""SIGNUM [BW], called M-SSD in [BH].

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) g_t, \qquad p_t = p_{t-1} - \mathrm{lr} \cdot \mathrm{sign}(m_t)

    ``sign(0) = sign(NaN) = 0``. Two things to know: one NaN gradient makes its entry of ``m`` NaN, and that weight then
    stands still without a word; and ``m`` hardly ever is exactly 0, so a row that gets no more gradient keeps moving
    by ``lr`` until it underflows.

    Args:
        params: parameters, named parameters, or groups; fp32, bf16 or fp16, any shape.
        lr: learning rate, at least 0; every entry moves by exactly this much. A float or a CPU tensor of one element.
            1e-4 is a common choice for large models; the default is [SA]'s for MNIST.
        beta: decay of the momentum, in [0, 1). Groups keep it as ``betas=(beta,)``, where schedulers find it.
        weight_decay: at least 0.
        decoupled_weight_decay: ``p *= 1 - lr * weight_decay`` before the update (True), or
            ``g += weight_decay * p`` before everything else (False).
        maximize: ascend instead of descend.
        state_dtype: how the momentum is stored: "fp32", "bf16" (rounded stochastically), or "int8": codes with one
            power of two for each 32 elements in memory order, rounded stochastically. The power goes down to 2^-126,
            so however small a block is, it is right on average; nothing is flushed to zero as with 16-bit scales.
            Infinities saturate at 127 times the power, NaN stays NaN. This is the one form whose bits depend on where
            a tensor's memory begins.
        weights: how a bf16 or fp16 parameter keeps what its dtype cannot hold. "as_is": rounded to nearest, so that
            steps below half its last place are lost. "stochastic": rounded up or down at random, right on average.
            "split16", "split8" (bf16 only): the low 16 bits of fp32, which makes it exact fp32 training in 4 bytes,
            or the next 8 and the rest stochastically, are kept beside it. "master": an fp32 copy is. An fp32
            parameter is its own master under "stochastic" and "master". A parameter set from outside wins over its
            copy.
        seed: of the random bits, in [0, 2^64). They are a function of seed, parameter, step and element, so they are
            the same on every backend and in a resumed run; no global generator is touched.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
        foreach, fused, differentiable: accepted for torch.optim's sake; the update is always fused.

    State: ``exp_avg`` (m), fp32 or bf16 of the parameter's shape or packed codes, with ``exp_avg_kind`` beside them;
    ``step``; with split weights ``param_low``, with master weights ``master_param``.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.

    Sources: [BW] Bernstein et al., arXiv 1802.04434, Alg. 2; [BH] Balles and Hennig, arXiv 1705.07774, Alg. 2;
    [SA] Wang et al., arXiv 1907.09008, Sec. 6.
    """

    HYPERPARAMETERS = ("lr", "betas")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        state_dtype: str | tuple[str, ...] = "fp32",
        weights: str = "as_is",
        seed: int = 0,
        backend: str = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": (beta,),
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "weights": weights,
            "seed": seed,
            "backend": backend,
        }
        super().__init__(params, defaults, foreach=foreach, fused=fused, differentiable=differentiable)

    @classmethod
    def _rule(cls, group: dict[str, Any]) -> Rule:
        return RULE

    @classmethod
    def _check_group(cls, group: dict[str, Any]) -> None:
        super()._check_group(group)
        checks.betas(group["betas"], ("beta",))


def signum(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta: float = 0.9,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`Signum`, in place on ``params`` and ``exp_avgs``.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        exp_avgs: fp32, of the parameters' shapes and strides; zeros at first.
        lr, beta: as in :class:`Signum`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.
    """
    step_lists(Signum, params, grads, {"exp_avg": exp_avgs}, lr=lr, betas=(beta,), **hyperparameters)

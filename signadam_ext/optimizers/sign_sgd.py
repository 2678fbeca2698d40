"""SIGN-SGD with a confidence gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..core.hyperparameters import LEARNING_RATE, Checks, Number
from ..core.options import COMMON, OtherOptions
from ..core.rule import Rule
from ..core.symbols import number
from .base import Params, SignOptimizer
from .step_lists import step_lists

RULE = Rule("sign_sgd", follows_gradient=True, moments=(), scalars=lambda group, t: {"alpha": number(group["alpha"])})


class SignSGD(SignOptimizer):
    r"""Sign of the gradient: every weight moves by ``lr``, and there is no state.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0; an entry moves by this much, or not at all where the sign is 0. A float or a CPU
            tensor of one element. The default is [SA]'s for MNIST; [SA] uses 1e-4 on CIFAR. Default: 1e-3.
        alpha: threshold of the gate, at least 0, absolute, in units of the gradient. Default: 0.
        weight_decay: at least 0. Default: 0.
        decoupled_weight_decay: whether the weight shrinks by ``1 - lr * weight_decay`` before the update, or
            ``weight_decay * p`` is added to the gradient. Default: True.
        maximize: ascend instead of descend. Default: False.
        max_grad_norm: largest norm of all groups' gradients together. A longer gradient counts as if it were scaled to
            this norm, and a step whose norm is not finite is skipped; see ``last_grad_norm`` and ``skipped_steps``. The
            same in all groups; infinite: only the latter. Default: None, nobody looks at the norm.
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
        >>> optimizer = SignSGD(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    SIGN-SGD [BW], called stochastic sign descent in [BH], with the confidence gate of [SA]:

    .. math::
        p_t = p_{t-1} - \mathrm{lr} \cdot c(g_t), \qquad
        c(g) = \mathrm{sign}(g) \text{ if } |g| > \alpha \text{ else } 0

    With ``alpha=0`` this is plain sign descent. A zero or NaN gradient moves nothing. With ``alpha=5e-4`` it
    computes what the released code of [SA] computes, which updates its momentum but steps by the gated sign. There
    is no moment; the state holds ``step`` alone.

    Groups also carry an empty ``betas``, only so that OneCycleLR and CyclicLR accept the optimizer; what they write
    there is not used.

    Sources: [BW] Bernstein et al., arXiv 1802.04434, Alg. 1; [BH] Balles and Hennig, arXiv 1705.07774, Sec. 1.1; [SA]
    Wang et al., arXiv 1907.09008, Alg. 3.
    """

    RULE = RULE
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "alpha": Number()}
    COMMON: ClassVar[frozenset[str]] = COMMON - {"state_dtype"}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        alpha: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        param_storage: str = "nearest",
        seed: int = 0,
        backend: str = "auto",
        **others: Unpack[OtherOptions],
    ) -> None:
        given = {
            "lr": lr,
            "alpha": alpha,
            "betas": (),
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "max_grad_norm": max_grad_norm,
            "param_storage": param_storage,
            "seed": seed,
            "backend": backend,
        }
        super().__init__(params, given, others)


def sign_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    alpha: float = 0.0,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`SignSGD`, in place on ``params``.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        lr, alpha: as in :class:`SignSGD`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> sign_sgd(params, grads, lr=0.5)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(SignSGD, params, grads, {}, lr=lr, alpha=alpha, **hyperparameters)

"""signADAM++ whose workers vote."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..core.hyperparameters import ONE_BETA, Checks, Number
from ..optimizers.base import Params
from .base import DistributedOptimizer, given


class DistributedSignAdamPP(DistributedOptimizer):
    r"""signADAM++ whose workers vote on the sign of their momentum of gated signs.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, dense, on one device, the same on all
            workers.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 1e-3.
        beta: decay of the momentum, in [0, 1). Groups keep it as ``betas=(beta,)``. Default: 0.9.
        alpha: threshold of the gate on this worker's gradient, at least 0, absolute. Default: 0.
        weight_decay: at least 0; the weight shrinks by ``1 - lr * weight_decay`` before the update. Default: 0.
        vote: "majority" (the sign of the sum of the votes; a tie moves nothing) or "mean" (their mean). Default:
            "majority".
        nonfinite: "propagate" (an entry that is NaN or infinite on any worker does not move on any) or "abstain" (it
            has no vote). Default: "propagate".
        maximize: ascend instead of descend. Default: False.
        param_storage: how a bf16 or fp16 parameter is rounded: to nearest ("nearest"), so that steps below half its
            last place are lost, or at random ("stochastic"). Default: "nearest".
        seed: of stochastic rounding, in [0, 2^64), the same on all workers. Default: 0.
        process_group: the workers; None for all. Default: None.
        backend: "cpu", "cuda", "triton" or "reference"; "auto" takes cuda, then triton, for CUDA tensors. Default:
            "auto".

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use; at the first step, on all workers, what differs
            between them.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = DistributedSignAdamPP(model.parameters(), lr=1e-3)
        >>> # model(torch.randn(4, 10)).square().mean().backward()
        >>> # optimizer.step()

    signADAM++ [SA, Alg. 3] with the votes of [DL], for worker i of n:

    .. math::
        m^{(i)}_t &= \beta m^{(i)}_{t-1} + (1 - \beta)\, c(g^{(i)}_t), \qquad
        c(g) = \mathrm{sign}(g) \text{ if } |g| > \alpha \text{ else } 0 \\
        d_t &= \mathrm{sign}\Big(\sum_i \mathrm{sign}(m^{(i)}_t)\Big)
        \quad\text{or}\quad \frac1n \sum_i \mathrm{sign}(m^{(i)}_t) \\
        p_t &= (1 - \mathrm{lr} \cdot \lambda)\, p_{t-1} - \mathrm{lr} \cdot d_t

    The size of the momentum is not sent: with one worker this moves by ``lr * sign(m)``, and
    :class:`~signadam_ext.SignAdamPP` by ``lr * m``. Its learning rates are not this one's.

    State: ``exp_avg`` (this worker's m, fp32, within [-1, 1]) and ``step``.

    Sources: [SA] Wang et al., arXiv 1907.09008, Alg. 3; [DL] Liu et al., arXiv 2404.00438, Alg. 1.
    """

    MEMORY = "GATED_SIGNS"
    HYPERPARAMETERS: ClassVar[Checks] = {
        "betas": ONE_BETA,
        "alpha": Number(),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.9,
        alpha: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        vote: str = "majority",
        nonfinite: str = "propagate",
        maximize: bool = False,
        param_storage: str = "nearest",
        seed: int = 0,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        hyperparameters = given(lr, (beta,), weight_decay, vote, nonfinite, maximize, param_storage, seed, alpha=alpha)
        super().__init__(params, hyperparameters, process_group, backend)

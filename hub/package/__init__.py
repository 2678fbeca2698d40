"""Sign-based optimizers in one launch of a Triton kernel per step: the bits of the package ``signadam_ext``.

``SignSGD``, ``Signum``, ``SignAdam``, ``SignAdamPP``, ``Lion``, ``MSGD``, ``Adam`` and ``AdamW`` are
``torch.optim.Optimizer``s for parameters on a GPU; with ``TRITON_INTERPRET=1`` also for those on the CPU.
"""

from .optimizers import MSGD, Adam, AdamW, Lion, SignAdam, SignAdamPP, SignSGD, Signum

__all__ = ["MSGD", "Adam", "AdamW", "Lion", "SignAdam", "SignAdamPP", "SignSGD", "Signum"]

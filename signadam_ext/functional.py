"""The optimizers as functions over lists of tensors, in place: ``sign_adam_pp(params, grads, exp_avgs, lr=...)``."""

from .optimizers import sign_adam, sign_adam_pp, sign_sgd, signum

__all__ = ["sign_adam", "sign_adam_pp", "sign_sgd", "signum"]

"""The optimizers as functions over lists of tensors, in place: ``sign_adam_pp(params, grads, exp_avgs, lr=...)``."""

from .optimizers import adam, adam_star, lion, msgd, msvag, sign_adam, sign_adam_pp, sign_sgd, signum, svag

__all__ = [
    "adam",
    "adam_star",
    "lion",
    "msgd",
    "msvag",
    "sign_adam",
    "sign_adam_pp",
    "sign_sgd",
    "signum",
    "svag",
]

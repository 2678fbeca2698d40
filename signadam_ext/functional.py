"""The optimizers as functions.

In place over lists of tensors: ``sign_adam_pp(params, grads, exp_avgs, lr=...)``. Out of place, with a state that is
handed in and out: :class:`FunctionalOptimizer`.
"""

from .optimizers import (
    ada_bound,
    ada_momentum,
    adam,
    adam_s,
    adam_star,
    ademamix,
    adopt,
    ams_bound,
    ano,
    anolog,
    bcos,
    grams,
    laprop,
    lion,
    lion_k,
    mars_lion,
    msgd,
    msvag,
    sign_adam,
    sign_adam_pp,
    sign_sgd,
    signum,
    svag,
)
from .optimizers.out_of_place import FunctionalOptimizer

__all__ = [
    "FunctionalOptimizer",
    "ada_bound",
    "ada_momentum",
    "adam",
    "adam_s",
    "adam_star",
    "ademamix",
    "adopt",
    "ams_bound",
    "ano",
    "anolog",
    "bcos",
    "grams",
    "laprop",
    "lion",
    "lion_k",
    "mars_lion",
    "msgd",
    "msvag",
    "sign_adam",
    "sign_adam_pp",
    "sign_sgd",
    "signum",
    "svag",
]

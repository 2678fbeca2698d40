"""Sign-based optimizers for PyTorch, fused: mostly one memory pass and one launch per step.

The optimizers are ``torch.optim.Optimizer``s: :class:`SignSGD`, :class:`Signum`, :class:`SignAdam`,
:class:`SignAdamPP`; :class:`MSGD`, :class:`SVAG`, :class:`MSVAG`, :class:`AdamStar`; :class:`Adam`, :class:`AdamW`,
:class:`Lion`; of one moment, :class:`AdamS`, :class:`BCOS`, :class:`LionK`, :class:`MARSLion`; of two, :class:`Ano`,
:class:`Anolog`, :class:`Grams`, :class:`AdaMomentum`, :class:`LaProp`, :class:`ADOPT`, :class:`AdaBound`,
:class:`FOCUS`, :class:`ScheduleFreeAdamW`, with :class:`ScheduleFreeSign`; of three, :class:`AMSBound`,
:class:`AdEMAMix`, :class:`MARSAdamW`; as functions over lists of tensors they are in :mod:`signadam_ext.functional`.
:func:`from_optimizer` puts one in place of another, :func:`release_gradients` updates inside backward,
:func:`per_sample_variance` measures what the mini-batch forms of :class:`MSVAG` and :class:`AdamStar` read,
:func:`recipe` makes the optimizer and schedule that the experiments support for a model.
``python -m signadam_ext`` tells what was built and what is usable.
"""

from . import functional, memory
from ._version import __version__
from .optimizers import (
    ADOPT,
    BCOS,
    FOCUS,
    MSGD,
    MSVAG,
    SVAG,
    AdaBound,
    Adam,
    AdaMomentum,
    AdamS,
    AdamStar,
    AdamW,
    AdEMAMix,
    AMSBound,
    Ano,
    Anolog,
    Grams,
    LaProp,
    Lion,
    LionK,
    MARSAdamW,
    MARSLion,
    ScheduleFreeAdamW,
    ScheduleFreeSign,
    SignAdam,
    SignAdamPP,
    SignSGD,
    Signum,
)
from .training.freezing import GradES
from .training.gradient_release import GradientRelease, release_gradients
from .training.offload import Offload, offload
from .training.per_sample_variance import per_sample_variance
from .training.recipe import Recipe, recipe
from .training.replacement import from_optimizer

__all__ = [
    "ADOPT",
    "BCOS",
    "FOCUS",
    "MSGD",
    "MSVAG",
    "SVAG",
    "AMSBound",
    "AdEMAMix",
    "AdaBound",
    "AdaMomentum",
    "Adam",
    "AdamS",
    "AdamStar",
    "AdamW",
    "Ano",
    "Anolog",
    "GradES",
    "GradientRelease",
    "Grams",
    "LaProp",
    "Lion",
    "LionK",
    "MARSAdamW",
    "MARSLion",
    "Offload",
    "Recipe",
    "ScheduleFreeAdamW",
    "ScheduleFreeSign",
    "SignAdam",
    "SignAdamPP",
    "SignSGD",
    "Signum",
    "__version__",
    "from_optimizer",
    "functional",
    "memory",
    "offload",
    "per_sample_variance",
    "recipe",
    "release_gradients",
]

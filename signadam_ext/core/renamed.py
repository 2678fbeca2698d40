"""Names of earlier versions, which still work and warn; and warnings that point at the user's line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch

#: Hyperparameters by the name of an earlier version, each with today's.
NAMES = {"weights": "param_storage"}
#: The same of their values, by today's name of the hyperparameter.
VALUES = {"param_storage": {"as_is": "nearest"}}

_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep for path in (os.path.dirname(__file__), str(torch.__file__))
)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the innermost line that is neither of this package nor of torch, which calls it in places."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def value_today(name: str, value: Any, *, warns: bool = True) -> Any:
    """A hyperparameter's value, or what is said today instead of it."""
    known = VALUES.get(name, {})
    if not isinstance(value, str) or value not in known:
        return value
    if warns:
        warn_user(f"{name}={value!r} is now called {name}={known[value]!r}", DeprecationWarning)
    return known[value]


def names_today(given: Mapping[str, Any], *, warns: bool = True) -> dict[str, Any]:
    """Hyperparameters with today's names and values.

    Raises:
        TypeError: one is given under both names.
    """
    found = dict(given)
    for old, new in NAMES.items():
        if old in found:
            if new in found:
                raise TypeError(f"{old} and {new} are two names of the same hyperparameter: give {new} alone")
            found[new] = found.pop(old)
            if warns:
                warn_user(f"{old}= is now called {new}=", DeprecationWarning)
    return {name: value_today(name, value, warns=warns) for name, value in found.items()}

"""Plugins for trainers that choose an optimizer by its name: one file a library, a few lines each.

Nothing imports them but who has the library. Each says at its top what goes into the library's config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .. import optimizers
from ..core import checks
from ..optimizers.base import SignOptimizer

#: The versions that each plugin is tested with.
TESTED: dict[str, dict[str, str]] = {
    "axolotl": {"axolotl": "0.19.0"},
    "llamafactory": {"llamafactory": "0.9.5"},
    "megatron": {"megatron-core": "0.19.2", "emerging-optimizers": "0.3.0"},
    "timm": {"timm": "1.0.31"},
    "torchtitan": {"torchtitan": "0.3.0"},
}

#: The optimizers of this package by the names of their classes.
CLASSES: dict[str, type[SignOptimizer]] = {
    name: found for name in optimizers.__all__ if isinstance(found := getattr(optimizers, name), type)
}


def class_of(name: str) -> type[SignOptimizer]:
    """The optimizer of that name.

    Raises:
        ValueError: there is none.
    """
    return checks.look_up("optimizer", name, CLASSES)


@contextmanager
def library_of(plugin: str) -> Iterator[None]:
    """Imports of a plugin's library: what fails in it says which library, and which versions are known to do.

    Raises:
        ImportError: the library is not there, or has not what the plugin asks it for.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        versions = " and ".join(f"{name} {version}" for name, version in TESTED[plugin].items())
        raise ImportError(
            f"signadam_ext.integrations.{plugin} is tested with {versions}, and cannot be imported here: {error}"
        ) from error

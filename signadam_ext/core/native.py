"""The compiled module as ``compiled``, or an error that says what to do where there is none."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING


def _installed() -> Path | None:
    """The folder of the package in an environment, where it is another one than this."""
    here = Path(__file__).resolve().parents[1]
    found = (
        Path(str(distribution.locate_file("signadam_ext"))).resolve()
        for distribution in importlib.metadata.distributions(name="signadam_ext")
    )
    return next((path for path in found if path != here and any(path.glob("_C.*"))), None)


def _load() -> ModuleType:
    """``signadam_ext._C``.

    Raises:
        ImportError: when the module was not built, or built for another Python, naming the command that mends it.
    """
    try:
        return importlib.import_module("signadam_ext._C")
    except ModuleNotFoundError as error:
        if error.name != "signadam_ext._C":
            raise
        package = Path(__file__).resolve().parents[1]
        source_tree = (package.parent / "setup.py").exists()
        command = (
            f"`pip install -e {package.parent}`" if source_tree else "`pip install --force-reinstall signadam_ext`"
        )
        installed = _installed() if source_tree else None
        others = sorted(path.name for path in package.glob("_C.*.so"))
        here = f"Python {sys.version_info.major}.{sys.version_info.minor} ({sys.implementation.cache_tag})"
        if others:
            reason = f"its compiled module was built for another Python: found {', '.join(others)}, this is {here}"
        elif installed is not None:
            raise ImportError(
                f"signadam_ext cannot be imported: {package.parent} is its source tree, which Python looks into first, "
                f"and what is installed lies in {installed}. Start Python in another directory, or with -P; or run "
                f"{command}, after which the source tree itself is what is imported."
            ) from error
        elif source_tree:
            reason = "this is its source tree, and the compiled module has not been built"
        else:
            reason = "its compiled module is missing"
        raise ImportError(f"signadam_ext cannot be imported: {reason}. Run {command} with this Python.") from error


if TYPE_CHECKING:
    from .. import _C as compiled
else:
    compiled = _load()

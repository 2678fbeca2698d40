"""The compiled module as ``compiled``, or an error that says what to do where there is none."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING


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
        others = sorted(path.name for path in package.glob("_C.*.so"))
        here = f"Python {sys.version_info.major}.{sys.version_info.minor} ({sys.implementation.cache_tag})"
        if others:
            reason = f"its compiled module was built for another Python: found {', '.join(others)}, this is {here}"
        elif source_tree:
            reason = "this is its source tree, and the compiled module has not been built"
        else:
            reason = "its compiled module is missing"
        raise ImportError(f"signadam_ext cannot be imported: {reason}. Run {command} with this Python.") from error


if TYPE_CHECKING:
    from .. import _C as compiled
else:
    compiled = _load()

"""Assembles the Triton kernels, with optimizers in Python alone, as a repository of the Hugging Face kernel hub.

    python -m hub.assemble dist/hub

Nothing is compiled: what is in ``hub/package`` builds the tables that the compiled module builds elsewhere, and the
rest is taken from the package as it stands. Of ``core`` whole modules; of the optimizers the rules, which stand before
the classes; of the Triton backend how a kernel is compiled. Numbers that C++ declares go into a module of constants.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from signadam_ext.core.native import compiled

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "hub"
NAME = "signadam"
#: Of the package's interface. Below 1 the hub lists a kernel as one that may still change.
VERSION = 0
#: The one variant there is: kernels in Triton serve every device that torch and Triton do.
VARIANT = "torch-universal"

CORE = ("__init__", "checks", "formats", "memory_order", "modifiers", "random_bits", "rule", "shard_index", "symbols")
METHODS = ("adam", "lion", "msgd", "sign_adam", "sign_adam_pp", "sign_sgd", "signum")
KERNELS = ("formats", "random", "rules", "stored", "threshold", "update")
#: What modules above name besides Python's and torch's.
KNOWN = {"..core", "..core.rule", "..core.symbols"}

IMPORT = "from signadam_ext.core.native import compiled as _C"


def constants() -> str:
    """A module in place of :mod:`signadam_ext.core.native`."""
    names = ("RULES", "SCALARS", "FORMATS", "PARAM_STORAGES", "RUN", "LANES", "ROWS", "CHUNK_SIZE")
    passes = ("NONE", "SAME_PASS", "PASS_BEFORE")
    return "\n".join(
        [
            '"""The numbers that C++ declares, as kernels and tables share them."""',
            "",
            "from enum import Enum",
            "",
            "",
            "class ThresholdPass(Enum):",
            *(f"    {name} = {getattr(compiled.ThresholdPass, name).value}" for name in passes),
            "",
            "",
            "class compiled:",
            "    ThresholdPass = ThresholdPass",
            *(f"    {name} = {getattr(compiled, name)!r}" for name in names),
            "",
        ]
    )


def kernel(source: str) -> str:
    """A module of Triton kernels that imports the constants from beside it."""
    found = source.count(IMPORT)
    if found != source.count("signadam_ext") or found > 1:
        raise SystemExit(f"a kernel imports more than {IMPORT!r}")
    return source.replace(IMPORT, "from ..core.native import compiled as _C")


def rules(source: str) -> str:
    """What stands before a method's class, without imports of what is not there."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            return "\n".join(line for line in lines[: node.lineno - 1] if line is not None).rstrip() + "\n"
        module = f"{'.' * node.level}{node.module or ''}" if isinstance(node, ast.ImportFrom) else ""
        if module == "typing_extensions" or (module.startswith(".") and module not in KNOWN):
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    raise SystemExit("a method has no class")


def functions(source: str, names: Iterable[str]) -> str:
    """Functions of a module, in its order."""
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name in names]
    return "\n\n\n".join(ast.get_source_segment(source, node) or "" for node in found) + "\n"


LAUNCH = '''"""How kernels are compiled."""

from __future__ import annotations

from typing import Any

from .core.formats import PARAM_STORAGES
from .core.native import compiled as _C


'''

#: The place where versions of `kernels` before 0.11 look for a package.
OLD_PLACE = '''"""The package beside this folder, for older versions of ``kernels``, which look for it here."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
_package = sys.modules.setdefault("{id}", importlib.util.module_from_spec(_spec))
if not hasattr(_package, "__all__"):
    _spec.loader.exec_module(_package)
globals().update({{name: getattr(_package, name) for name in _package.__all__}})
__all__ = _package.__all__
'''


def package() -> dict[str, str]:
    """The sources of the package by their paths."""
    own = ROOT / "signadam_ext"
    text = lambda path: path.read_text("utf-8")  # noqa: E731
    made = {path.name: text(path) for path in sorted((HUB / "package").glob("*.py"))}
    made |= {f"core/{name}.py": text(own / "core" / f"{name}.py") for name in CORE}
    made["core/native.py"] = constants()
    made["methods/__init__.py"] = '"""The rules of the optimizers: names, state, and scalars."""\n'
    made |= {f"methods/{name}.py": rules(text(own / "optimizers" / f"{name}.py")) for name in METHODS}
    made["triton_kernels/__init__.py"] = '"""The kernels in Triton."""\n'
    made |= {f"triton_kernels/{name}.py": kernel(text(ROOT / "triton_kernels" / f"{name}.py")) for name in KERNELS}
    launch = functions(text(own / "backends" / "triton.py"), ("launch_options", "_registers"))
    made["launch.py"] = LAUNCH + launch
    return made


def digest(files: dict[str, str]) -> dict[str, object]:
    """What `kernels verify` compares with."""
    hashes = {name: hashlib.sha256(text.encode()).digest() for name, text in sorted(files.items())}
    return {"algorithm": "sha256", "files": {name: base64.b64encode(sha).decode() for name, sha in hashes.items()}}


def assemble(out: Path) -> Path:
    """Writes the repository into ``out``, which is emptied; returns the folder of the variant."""
    shutil.rmtree(out, ignore_errors=True)
    files = package()
    # Two versions of a kernel may be loaded in one process: names of modules tell their contents.
    contents = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:10]
    name = f"_{NAME}_{contents}"
    files[f"{NAME}/__init__.py"] = OLD_PLACE.format(id=name)
    metadata = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": digest(files),
    }
    variant = out / "build" / VARIANT
    for path, text in {**files, "metadata.json": json.dumps(metadata, indent=2) + "\n"}.items():
        (variant / path).parent.mkdir(parents=True, exist_ok=True)
        (variant / path).write_text(text, "utf-8")
    card = (HUB / "CARD.md").read_text("utf-8")
    (out / "README.md").write_text(card.replace("{version}", compiled.build_info()["version"]), "utf-8")
    shutil.copy2(ROOT / "LICENSE", out)
    (out / "tests").mkdir()
    shutil.copy2(HUB / "tests" / "test_signadam.py", out / "tests")
    return variant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the repository, which is emptied")
    print(assemble(parser.parse_args().out))
    return 0


if __name__ == "__main__":
    sys.exit(main())

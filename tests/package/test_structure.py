"""Every arrow points downward, in the package and in csrc: see CONTRIBUTING.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Of csrc, what each folder may include beside itself.
INCLUDES: dict[str, set[str]] = {
    "core": set(),
    "block": {"core"},
    "cpu": {"core", "block"},
    "cuda": {"core", "block"},
    "python": {"core", "block", "cpu", "cuda"},
}


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_imports_point_downward():
    done = lint(ROOT)
    assert done.returncode == 0 and "2 kept, 0 broken" in done.stdout, done.stdout + done.stderr


def included(path: Path) -> set[Path]:
    return {(path.parent / name).resolve() for name in re.findall(r'#include "([^"]+)"', path.read_text())}


def test_includes_point_downward():
    csrc = ROOT / "csrc"
    files = {path for path in csrc.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".inl")}
    assert {path.parent.name for path in files} == INCLUDES.keys()
    for path in files:
        for other in included(path):
            assert other in files, f"{path} includes {other}, which is not there"
            folder = path.parent.name
            assert other.parent.name in {folder, *INCLUDES[folder]}, f"{path} includes {other}"


def test_includes_have_no_circle():
    seen: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, f"a circle: {[x.name for x in (*above, path)]}"
        if path not in seen:
            for other in included(path):
                visit(other, (*above, path))
            seen.add(path)

    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".inl"):
            visit(path, ())
    assert seen

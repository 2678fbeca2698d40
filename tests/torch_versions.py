"""Runs the suite with one wheel of this package beside several versions of torch.

    python tests/torch_versions.py dist/signadam_ext-*-manylinux*.whl 2.6.0 2.13.0 2.14.1
    python tests/torch_versions.py --page

Each version of torch goes with what the tests need into an environment of its own, which is removed when its run has
ended unless ``--environments`` keeps it: from PyPI torch for Linux comes with CUDA, 5 to 8 GB of it. The tests run on a
copy of this tree from which the package's own sources are left out, so that they import what the wheel holds.
:data:`SUITE` is what runs; the rest needs sources, a CUDA toolkit, a browser or packages that fix their version of
torch.

What came of it goes into ``tests/results``: ``torch_versions.txt``, as pytest said it, and ``torch_versions.json``, of
which ``--page`` makes the table in docs/building.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results" / "torch_versions.json"
LOG = RESULTS.with_suffix(".txt")
PAGE = ROOT / "docs" / "building.md"

#: The tests that run, in one process.
SUITE = (
    "tests/core",
    "tests/optimizers",
    "tests/state",
    "tests/engine",
    "tests/training",
    "tests/distributed",
    "tests/backends/test_parity.py",
    "tests/backends/test_parity_processes.py",
    "tests/backends/test_triton_device_step.py",
    "tests/backends/test_triton_forms.py",
    "tests/backends/test_votes.py",
)
#: What they need beside torch.
PACKAGES = ("pytest>=8", "hypothesis>=6.100", "numpy", "scipy", "setuptools>=77", "pybind11>=2.12", "triton>=3.2")
#: What the interpreters of older versions of Triton need, which come with older versions of torch.
OLDER_NUMPY = "numpy<2.4"
#: Of the tree, what the tests read.
COPIED = ("tests", "reporting", "examples", "csrc", "pyproject.toml", "setup.py")

_FACTS = """
import importlib.metadata, json, platform
import numpy, torch, signadam_ext
from signadam_ext.core.native import compiled

def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "triton": version("triton"), "numpy": numpy.__version__,
    "python": platform.python_version(), "signadam_ext": signadam_ext.__version__, "from": signadam_ext.__file__,
    "commit": compiled.build_info()["commit"],
}))
"""

_INTERPRETS = "import sys; from signadam_ext.backends.triton import interpreter_fault; sys.exit(interpreter_fault())"


def copy_tree(to: Path) -> None:
    """What git tracks of :data:`COPIED`."""
    listed = subprocess.run(["git", "ls-files", "-z", *COPIED], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith("tests/results/"):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run_version(
    version: str, wheel: Path, folder: Path, environments: Path | None, arguments: Sequence[str]
) -> dict[str, Any]:
    """What came of the suite beside that version of torch, on a copy of the tree in ``folder``."""
    tree, xml = folder / "tree", folder / "junit.xml"
    environment = (folder if environments is None else environments) / f"torch-{version}"
    tree.mkdir()
    copy_tree(tree)
    if not environment.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--no-cache-dir", "--disable-pip-version-check"]
    subprocess.run([*pip, f"torch=={version}", *PACKAGES], check=True)
    subprocess.run([*pip, "--force-reinstall", "--no-deps", str(wheel)], check=True)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if subprocess.run([python, "-c", _INTERPRETS], cwd=tree, env=env).returncode != 0:
        subprocess.run([*pip, OLDER_NUMPY], check=True)
    told = subprocess.run([python, "-c", _FACTS], cwd=tree, env=env, check=True, capture_output=True, text=True)
    facts: dict[str, Any] = json.loads(told.stdout)
    assert Path(facts.pop("from")).is_relative_to(environment), "the tests would not import the wheel"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}", *SUITE, *arguments]
    begun = time.monotonic()
    done = subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = round(time.monotonic() - begun)
    with LOG.open("a") as log:
        log.write(f"## torch {facts['torch']}\n\n{shown(done.stdout, folder)}\n")
    if not xml.exists():
        raise SystemExit(f"pytest ended with {done.returncode} beside torch {version}:\n{done.stdout}")
    return {**facts, **counted(xml, folder), "seconds": seconds}


def shown(text: str, folder: Path) -> str:
    """Text without the names of temporary folders and trailing spaces."""
    text = re.sub(r"/tmp/pytest-of-[^/\s]+/pytest-\d+", "/tmp", text.replace(str(folder), ""))
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def counted(xml: Path, folder: Path) -> dict[str, Any]:
    """How many tests ended in each way, which failed, and why others were skipped."""
    outcomes: Counter[str] = Counter()
    failures, skips = [], Counter[str]()
    for case in ElementTree.parse(xml).iter("testcase"):
        ends = {child.tag: child for child in case if child.tag in ("failure", "error", "skipped")}
        if "failure" in ends or "error" in ends:
            outcomes["failed"] += 1
            failures.append(f"{case.get('classname')}.{case.get('name')}")
        elif "skipped" in ends and ends["skipped"].get("type") == "pytest.xfail":
            outcomes["expected to fail"] += 1
        elif "skipped" in ends:
            outcomes["skipped"] += 1
            skips[shown(ends["skipped"].get("message") or "", folder).strip()] += 1
        else:
            outcomes["passed"] += 1
    return {"outcomes": dict(outcomes), "failures": failures, "skips": dict(skips.most_common())}


def table(results: dict[str, Any]) -> str:
    """The runs as a table in Markdown."""
    lines = ["| torch | for | Triton | NumPy | passed | failed | skipped |", "|---|---|---|---|--:|--:|--:|"]
    for run in results["runs"]:
        outcomes = run["outcomes"]
        cells = [
            run["torch"].partition("+")[0],
            f"CUDA {run['cuda']}" if run["cuda"] else "CPUs",
            run["triton"],
            run["numpy"],
            *(str(outcomes.get(name, 0)) for name in ("passed", "failed", "skipped")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = results["runs"][0]
    said = (
        f"`{results['wheel']}` (commit {first['commit'][:12]}), Python {first['python']}, no GPU; "
        f"{', '.join(f'`{name}`' for name in results['suite'])}."
    )
    return "\n".join([*lines, "", said])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?")
    parser.add_argument("versions", nargs="*")
    parser.add_argument("--page", action="store_true", help="write the table of the last run into docs/building.md")
    parser.add_argument("--add", action="store_true", help="keep what other versions have in the results")
    parser.add_argument("--environments", type=Path, help="a folder where they stay, and serve the next run")
    parser.add_argument("--pytest", action="append", default=[], help="an argument of pytest, such as --pytest=-x")
    given = parser.parse_args()
    if given.page:
        sys.path.insert(0, str(ROOT))
        from reporting.pages import replaced

        PAGE.write_text(replaced(PAGE.read_text("utf-8"), "torch", table(json.loads(RESULTS.read_text()))), "utf-8")
        return 0
    if not given.versions:
        parser.error("a wheel and versions of torch are needed")
    wheel = given.wheel.resolve(strict=True)
    sha = hashlib.sha256(wheel.read_bytes()).hexdigest()
    results: dict[str, Any] = {"wheel": wheel.name, "sha256": sha, "suite": list(SUITE), "runs": []}
    if given.add:
        before = json.loads(RESULTS.read_text())
        if before["sha256"] != sha:
            parser.error("the results that are there are of another wheel")
        results["runs"] = before["runs"]
    else:
        LOG.write_text(f"{wheel.name}, sha256 {sha}\n\n")
    for version in given.versions:
        with tempfile.TemporaryDirectory() as folder:
            run = run_version(version, wheel, Path(folder), given.environments, given.pytest)
        results["runs"].append(run)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(run["torch"], run["outcomes"], f"after {run['seconds']} s", *run["failures"], sep="\n  ", flush=True)
    return 1 if any(run["failures"] for run in results["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())

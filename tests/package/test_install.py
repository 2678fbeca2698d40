"""What an installation promises: what it links, what it imports, what it says of itself, how a build fails."""

from __future__ import annotations

import ast
import doctest
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paper_formulas import TABLE

import signadam_ext
import signadam_ext._C as _C
import signadam_ext.memory
from signadam_ext import distributed
from signadam_ext.backends.reference import rules
from signadam_ext.core.rule import rule_of

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads an ELF file")
def test_module_links_neither_torch_nor_cuda() -> None:
    listing = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].split("]")[0] for line in listing.splitlines() if "NEEDED" in line]
    assert needed and not [name for name in needed if "torch" in name or "cuda" in name or "gomp" in name]


def test_import_is_light() -> None:
    """No Triton, no plotting, no CUDA context: nothing but torch and the compiled module."""
    code = (
        "import torch; before = set(__import__('sys').modules)\n"
        "import signadam_ext, sys\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'triton', 'matplotlib', 'tqdm', 'hypothesis'}), torch.cuda.is_initialized())"
    )
    result = python("-c", code)
    assert result.stdout.strip() == "[] False", result.stderr


def test_report_tells_what_is_built() -> None:
    result = python("-m", "signadam_ext")
    assert result.returncode == 0, result.stderr
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if len(line.split()) > 1)
    assert facts["signadam_ext"] == signadam_ext.__version__ == _C.build_info()["version"]
    assert facts["torch"].startswith(torch.__version__)
    assert facts["module"] == _C.__file__
    assert facts["cpu"] == "usable"
    built = _C.build_info()["cuda"]
    assert facts["CUDA"].startswith(built if built else "not built")


def test_the_version_is_that_of_the_changelog() -> None:
    """A tag's, or a preview of what the top heading prepares; it may lie behind a release whose heading is the last."""
    headings = re.findall(
        r"^## (\d+\.\d+\.\d+) - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    (version, date), *others = headings
    assert all(date != "unreleased" for _, date in others)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    release = signadam_ext.__version__.partition("+")[0]
    preview = re.fullmatch(r"(\d+\.\d+\.\d+)\.dev\d+", release)
    assert release == version or (preview is not None and (preview[1] == version or date != "unreleased"))


def git(folder: Path, *arguments: str) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_version_comes_from_a_tag(tmp_path: Path) -> None:
    """Without one, or without git, it is what the changelog prepares; with a build's own number, that one."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 3.1.0 - unreleased\n\n## 3.0.0 - 2026-01-01\n")

    def version(**environment: str) -> str:
        env = {**os.environ, **environment}
        command = [sys.executable, "setup.py", "--version"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    assert version() == "3.1.0.dev0"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert version() == "3.1.0.dev1"
    git(tmp_path, "tag", "-a", "-m", "3.0.0", "v3.0.0")
    assert version() == "3.0.0"
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "second")
    git(tmp_path, "tag", "no-version")
    assert version() == "3.1.0.dev1"
    git(tmp_path, "tag", "-a", "-m", "3.1.0", "v3.1.0")
    assert version() == "3.1.0"
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "third")
    assert version() == "3.1.1.dev1"
    assert version(SETUPTOOLS_SCM_PRETEND_VERSION_FOR_SIGNADAM_EXT="3.1.0+cu130") == "3.1.0+cu130"


def test_the_command_works_from_anywhere() -> None:
    """In the source tree too, where ``python -m signadam_ext`` finds the sources in place of what was installed."""
    command = shutil.which("signadam", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("the package is on the path, but not installed")
    for folder in (ROOT, Path("/")):
        done = subprocess.run([command, "info"], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[:2] == ["signadam_ext", signadam_ext.__version__]
    memory = subprocess.run([command, "memory", "--params=7e9"], capture_output=True, text=True)
    assert memory.returncode == 0 and "bytes" in memory.stdout, memory.stderr
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nobody_reads:
        unread = subprocess.run([command, "info"], stdout=nobody_reads, stderr=subprocess.PIPE, text=True)
    assert (unread.returncode, unread.stderr) == (0, "")
    wrong = subprocess.run([command, "remember"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "usage: signadam" in wrong.stderr


def test_kernels_have_one_name_each() -> None:
    """Functor, reference and Triton twin of each rule go by one name, and each has a row in the table."""
    assert all(callable(getattr(rules, name)) for name in _C.RULES)
    code = f"import signadam_ext.triton_kernels.rules as r; print(all(hasattr(r, n) for n in {_C.RULES!r}))"
    assert python("-c", code).stdout.strip() == "True"
    used = set()
    for row in TABLE:
        optimizer = row.optimizer([torch.nn.Parameter(torch.zeros(1))], **row.hyperparameters)
        used.add(rule_of(type(optimizer), optimizer.param_groups[0]).name)
    assert used == set(_C.RULES)


def test_a_rule_is_five_places() -> None:
    """What is Grams' own lies in its functor, twin, reference, class and row; beside them only lines that export it."""
    own = {
        "csrc/core/rules.h",
        "triton_kernels/rules.py",
        "signadam_ext/backends/reference/rules.py",
        "tests/support/paper_formulas.py",
    }
    own.add("signadam_ext/optimizers/grams.py")
    exports = {"signadam_ext/__init__.py", "signadam_ext/functional.py", "signadam_ext/optimizers/__init__.py"}
    sources = [path for folder in ("csrc", "triton_kernels", "signadam_ext") for path in (ROOT / folder).rglob("*.*")]
    # Votes on the update are a method of their own, which no rule computes.
    sources = [path for path in sources if path.parent.name != "distributed"]
    # Nor are these part of a rule: they list those with kernels of their own, and those with searched learning rates.
    lists = {"csrc/cuda/instances.h", "signadam_ext/training/replacement.py"}
    sources = [path for path in sources if path.relative_to(ROOT).as_posix() not in lists]
    found = {
        path.relative_to(ROOT).as_posix()
        for path in [*sources, ROOT / "tests" / "support" / "paper_formulas.py"]
        if path.suffix in (".h", ".inl", ".cpp", ".cu", ".py")
        and re.search(r"\bgrams\b", path.read_text(), re.IGNORECASE)
    }
    assert found == own | exports
    for path in exports:
        named = [line for line in (ROOT / path).read_text().splitlines() if re.search(r"\bGrams\b|\bgrams\b", line)]
        assert len(named) <= 4, (path, named)


CLASSES = [name for name in signadam_ext.optimizers.__all__ if isinstance(getattr(signadam_ext, name, None), type)]


@pytest.mark.parametrize("name", CLASSES)
def test_documentation_is_complete(name: str) -> None:
    """One line says what it is; every argument is described, in its order, with its default; then an example."""
    found = getattr(signadam_ext, name)
    summary, nothing, *_ = found.__doc__.splitlines()
    assert summary.endswith(".") and nothing == "" and "[" not in summary
    arguments = found.__doc__.split("Args:\n")[1].split("\n\n")[0]
    described = {}
    for entry in re.split(r"\n {8}(?! )", "\n" + arguments)[1:]:
        names, text = entry.split(":", 1)
        described |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    parameters = inspect.signature(found).parameters
    # One line of AdamW describes what it has of Adam.
    assert list(described) == list(parameters) or (name == "AdamW" and set(described) == set(parameters))
    for argument, text in described.items():
        default = parameters[argument].default
        if default not in (None, inspect.Parameter.empty) and "as of :class:" not in text:
            shown = re.search(r"Default: (.+)\.$", text)
            assert shown is not None and ast.literal_eval(shown[1]) == default, (argument, text)


def test_shared_arguments_are_described_alike() -> None:
    """Each class has them in full, for editors; what is said of one name is the same in all, but for its default."""
    said: dict[str, set[str]] = {}
    for name in CLASSES:
        if name.startswith("ScheduleFree") or name == "FOCUS":  # whose beta or decay is something else
            continue
        arguments = getattr(signadam_ext, name).__doc__.split("Args:\n")[1].split("\n\n")[0]
        for entry in re.split(r"\n {8}(?! )", "\n" + arguments)[1:]:
            argument, text = entry.split(":", 1)
            said.setdefault(argument, set()).add(re.sub(r" Default: .*$", "", " ".join(text.split())))
    shared = (
        "params",
        "beta",
        "weight_decay",
        "decoupled_weight_decay",
        "maximize",
        "max_grad_norm",
        "param_storage",
        "seed",
        "backend",
    )
    assert {argument: len(said[argument]) for argument in shared} == dict.fromkeys(shared, 1)
    # Of a momentum that cannot exceed 1, of one that has a bound for small betas, and of any other.
    assert len(said["state_dtype"]) == 3
    assert len(said["foreach, fused, differentiable, capturable"]) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_class_refuses_is_in_its_documentation(name: str) -> None:
    """Caution, and a scale by the root mean square, as its constructor takes them with its own defaults."""
    found = getattr(signadam_ext, name)
    arguments = found.__doc__.split("Args:\n")[1].split("\n\n")[0]
    said = dict(entry.split(":", 1) for entry in re.split(r"\n {8}(?! )", "\n" + arguments)[1:])
    for argument, value in (("caution", "delayed"), ("caution", "exact"), ("lr_scale", "rms")):
        try:
            found([torch.nn.Parameter(torch.zeros(3))], lr=0.1, **{argument: value})
            taken = True
        except ValueError:
            taken = False
        # Beside or without something else is not with the defaults.
        offered = f'"{value}"' in said[argument] and not re.search("refused(?! beside| without)", said[argument])
        assert offered == taken, (argument, value)


def runnable() -> dict[str, doctest.DocTest]:
    """Examples of everything that is exported."""
    finder = doctest.DocTestFinder(recurse=False)
    functions = {name: getattr(signadam_ext.functional, name) for name in signadam_ext.functional.__all__}
    own = {name: getattr(signadam_ext, name) for name in signadam_ext.__all__}
    memory = {f"memory.{name}": getattr(signadam_ext.memory, name) for name in ("estimate", "bytes_per_parameter")}
    voting = {name: getattr(distributed, name) for name in distributed.__all__}
    names = {**vars(signadam_ext), **functions, **vars(signadam_ext.memory), **voting}
    found = {}
    for name, object in {**own, **functions, **memory, **voting}.items():
        if callable(object):
            (found[name],) = finder.find(object, name, globs=names)
    return found


EXAMPLES = runnable()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings_run(name: str) -> None:
    assert EXAMPLES[name].examples, "has no example"
    shown: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(EXAMPLES[name], out=shown.append).failed == 0, "".join(shown)


def test_unknown_argument_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"Signum\(\) got an unexpected keyword argument 'param_storge'; did you mean 'param_storage'"
    ):
        signadam_ext.Signum([torch.nn.Parameter(torch.zeros(1))], param_storge="nearest")
    with pytest.raises(TypeError, match="unexpected keyword argument 'state_dtype'"):
        signadam_ext.SignSGD([torch.nn.Parameter(torch.zeros(1))], state_dtype="fp32")


def test_triton_kernels_under_their_one_name_only() -> None:
    result = python("-c", "import triton_kernels")
    assert "import these kernels as signadam_ext.triton_kernels" in result.stderr


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` far enough to decide about CUDA; nothing is compiled, as every case here is refused."""
    arguments = ("setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    return python(*arguments, **environment)


def test_build_refuses_unknown_setting(tmp_path: Path) -> None:
    result = build(tmp_path, SIGNADAM_CUDA="yes")
    assert result.returncode != 0
    assert "SIGNADAM_CUDA='yes': use 1 (demand CUDA), 0 (leave it out)" in result.stderr


def test_build_demands_nvcc() -> None:
    """With no nvcc anywhere: no file counts as executable."""
    code = (
        "import os, runpy, sys; os.access = lambda *_: False\n"
        "sys.argv = ['setup.py', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    )
    result = python("-c", code, SIGNADAM_CUDA="1")
    assert result.returncode != 0
    assert "SIGNADAM_CUDA=1, but there is no nvcc: install the CUDA toolkit" in result.stderr


@pytest.mark.skipif(_C.build_info()["cuda"] is None, reason="no nvcc")
@pytest.mark.parametrize(
    "archs, message", [("ninety", "give compute capabilities"), ("12", "does not compile for [12]")]
)
def test_build_refuses_architectures(tmp_path: Path, archs: str, message: str) -> None:
    result = build(tmp_path, SIGNADAM_CUDA="1", SIGNADAM_CUDA_ARCHS=archs)
    assert result.returncode != 0
    assert message in result.stderr

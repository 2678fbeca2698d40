"""Puts faults back into a copy of the package, and says whether the fuzzer finds them.

    python tests/fuzzer_mutations.py [--actions 2000] [--json out.json] [names]

Each fault is a few edits of the sources. The fuzzer gets the copy and a seed, nothing else; found means that it reports
a fault, or dies, within so many actions. Faults in C++ are compiled anew, about a minute each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FUZZER = Path(__file__).with_name("fuzzer.py")


@dataclass(frozen=True)
class Mutation:
    """A fault, as edits: (file, text that is there once, text in its place)."""

    name: str
    kind: int
    edits: tuple[tuple[str, str, str], ...]

    @property
    def native(self) -> bool:
        """Whether it needs compiling."""
        return any(file.startswith("csrc/") for file, _, _ in self.edits)


PLAN, STATE = "signadam_ext/engine/plan.py", "signadam_ext/state/schema.py"
TENSORS, VALUES = "signadam_ext/core/tensors.py", "signadam_ext/core/checks.py"
STEPPING, LOADING = "signadam_ext/optimizers/stepping.py", "signadam_ext/optimizers/checkpoints.py"
CHECKPOINT = "signadam_ext/state/checkpoint.py"
ARCHIVE, PARTICIPANTS = "signadam_ext/state/archive.py", "signadam_ext/engine/participants.py"
LOCK, RELEASE = "signadam_ext/engine/step_lock.py", "signadam_ext/training/gradient_release.py"
BACKENDS, REFERENCE = "signadam_ext/backends/__init__.py", "signadam_ext/backends/reference/backend.py"
READER, TABLE, OBJECTS = "csrc/python/gradient_reader.cpp", "csrc/python/host_table.cpp", "csrc/python/torch_objects.h"

#: What a text that no longer fits where it is put leads to: that finds nothing.
BROKEN = re.compile(r"\b(NameError|UnboundLocalError|AttributeError|ImportError|ModuleNotFoundError|SyntaxError)\b")

COMMIT = "backends.commit(operations, tables, states, self._written())"
#: The parameters that a step writes.
WRITTEN = "[self._reader.held(e.index)[0] for e in self.entries if self._reader.addresses()[e.index]]"

#: By the kinds of the issue that this package's memory safety and whole steps are about.
MUTATIONS: tuple[Mutation, ...] = (
    # 1: tensors without memory of their own
    Mutation(
        "gradients that are zero tensors are read where they lie",
        1,
        ((PLAN, "tensors.memory_fault(grad) is not None or grad.is_neg() or not", "grad.is_neg() or not"),),
    ),
    Mutation(
        "state that is a zero tensor is taken as it is",
        1,
        (
            (
                CHECKPOINT,
                "        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)\n",
                "        return value\n",
            ),
            (
                TENSORS,
                "    if nbytes < needed:",
                "    if tensor._is_zerotensor():\n        return None\n    if nbytes < needed:",
            ),
            (STATE, "            and not (step._is_zerotensor() or step.is_neg() or step.is_inference())\n", ""),
        ),
    ),
    Mutation("a storage's size is not looked at", 1, ((TENSORS, "    if nbytes < needed:", "    if False:"),)),
    Mutation(
        "parameters without a gradient must be in order",
        1,
        ((PARTICIPANTS, "    except (TypeError, ValueError, RuntimeError):\n", "    except ZeroDivisionError:\n"),),
    ),
    # 2: what a plan watches
    Mutation(
        "of the state only the number of steps is watched",
        2,
        (
            (
                READER,
                "    if (!same(value, entries_[e].tensor, *trace)) return false;",
                "    if (entries_[e].tensor.dim == 0 && !same(value, entries_[e].tensor, *trace)) return false;",
            ),
        ),
    ),
    Mutation(
        "of a tensor only its storage shows in a trace",
        2,
        ((OBJECTS, "ObjectHash::of(object + storage_at_, tensor_bytes_)", "word_at<uint64_t>(object, storage_at_)"),),
    ),
    Mutation(
        "the number of steps is not watched",
        2,
        (
            (
                READER,
                "    if (!same(value, entries_[e].tensor, *trace)) return false;",
                "    if (entries_[e].tensor.dim != 0 && !same(value, entries_[e].tensor, *trace)) return false;",
            ),
        ),
    ),
    Mutation(
        "gradients are trusted to cover what they say",
        2,
        (
            (READER, "  if (extent == 0) return true;", "  if (extent >= 0) return true;"),
            (TENSORS, "    if not is_computable(grad):\n", "    if False:\n"),
            (PLAN, "tensors.memory_fault(grad) is not None or grad.is_neg() or not", "grad.is_neg() or not"),
        ),
    ),
    Mutation(
        "shapes of state and parameters are not watched",
        2,
        (
            (
                READER,
                "now.dim == noted.dim && same_sizes(now, layouts_.data() + noted.layout) &&\n"
                "                       same_strides(now, layouts_.data() + noted.layout + noted.dim) &&",
                "true &&",
            ),
        ),
    ),
    # 3: who owns what
    Mutation(
        "a plan keeps what it has read",
        3,
        ((PLAN, "        self._holds_all = False\n        self._reader.release()", "        self._holds_all = False"),),
    ),
    Mutation(
        "a plan keeps the state that it was made with",
        3,
        (
            (
                PLAN,
                "        self._pending = []\n        self.is_first = False\n",
                "        self._kept, self._pending = self._pending, []\n        self.is_first = False\n",
            ),
            (PLAN, '        "is_first",\n', '        "is_first",\n        "_kept",\n'),
        ),
    ),
    Mutation(
        "a plan has weak references to its parameters",
        3,
        (
            (
                PLAN,
                "        self.labels = [item.label for item in items]",
                "        import weakref\n\n"
                "        self._weak = [weakref.ref(item.param) for item in items]\n"
                "        self.labels = [item.label for item in items]",
            ),
            (PLAN, '        "_variances",\n', '        "_variances",\n        "_weak",\n'),
        ),
    ),
    Mutation(
        "a release has weak references to its parameters",
        3,
        (
            (
                RELEASE,
                "        progress = self._progress[id(param)] = _Progress(param._cdata)\n",
                "        progress = self._progress[id(param)] = _Progress(param._cdata)\n"
                "        vars(self).setdefault('weak', []).append(weakref.ref(param))\n",
            ),
        ),
    ),
    Mutation(
        "gradients are let go before the kernels run",
        3,
        (
            (
                PLAN,
                COMMIT,
                f"params = {WRITTEN}\n        self._reader.release()\n"
                "        backends.commit(operations, tables, states, params)",
            ),
        ),
    ),
    Mutation(
        "nothing locks a step",
        3,
        (
            (
                STEPPING,
                "        with runtime.lock.held:\n            groups = _read_groups(optimizer)",
                "        if True:\n            groups = _read_groups(optimizer)",
            ),
        ),
    ),
    Mutation(
        "a step may begin inside a step",
        3,
        ((LOCK, "        if self.held._is_owned():", "        if False and self.held._is_owned():"),),
    ),
    # 4: all or nothing
    Mutation(
        "steps are counted before they are taken",
        4,
        (
            (
                PLAN,
                COMMIT,
                "for table in tables:\n            table.commit()\n"
                "        backends.commit(operations, [], states, self._written())",
            ),
        ),
    ),
    Mutation(
        "steps are counted after a launch, by another call",
        4,
        (
            (
                PLAN,
                COMMIT,
                "backends.commit(operations, [], states, self._written())\n        backends.commit([], tables, [], [])",
            ),
        ),
    ),
    Mutation(
        "versions move by another call",
        4,
        (
            (
                PLAN,
                COMMIT,
                "backends.commit(operations, tables, states, [])\n"
                f"        own = [p for p in {WRITTEN} if not p.is_inference()]\n"
                "        torch.autograd.graph.increment_version(own)",
            ),
        ),
    ),
    Mutation(
        "state is put in place while a plan is made",
        4,
        (
            (
                PLAN,
                "        for found in chosen:\n            self._enter(found)\n",
                "        for optimizer_state, param, _, added, _ in self._pending:\n"
                "            optimizer_state[param].update(added)\n"
                "        for found in chosen:\n            self._enter(found)\n",
            ),
        ),
    ),
    Mutation(
        "the reference writes one tensor at a time",
        4,
        (
            (
                REFERENCE,
                "        return [(torch._foreach_copy_, targets, results)] if targets else []",
                "        for target, result in zip(targets, results, strict=True):\n"
                "            target.copy_(result)\n        return []",
            ),
        ),
    ),
    Mutation(
        "load_state_dict puts one parameter's state in place after another",
        4,
        (
            (
                LOADING,
                "    state, changes = _adopted(groups, numbered, entries, others)",
                "    state, changes = _adopted(groups, numbered, entries, optimizer.state)",
            ),
            (LOADING, "state: defaultdict[Any, Any] = defaultdict(dict, others)", "state: Any = others"),
        ),
    ),
    # 5 and 6: hyperparameters, step counts
    Mutation(
        "hyperparameters are not checked at a step",
        5,
        (
            (
                "signadam_ext/core/hyperparameters.py",
                "given[name], found[name] = value, value if stays(name, value) else check(name, value)",
                "given[name], found[name] = value, value if isinstance(value, (tuple, list)) else checks.plain(value)",
            ),
        ),
    ),
    Mutation(
        "steps are counted in fp32", 6, ((CHECKPOINT, "STEP_DTYPE = torch.float64", "STEP_DTYPE = torch.float32"),)
    ),
    Mutation(
        "no step is counted beyond 2^24",
        6,
        (
            (
                "csrc/python/host_table.h",
                "      *static_cast<double*>(address) += 1;",
                "      *static_cast<double*>(address) = static_cast<float>(value()) + 1.0f;",
            ),
        ),
    ),
    Mutation(
        "random bits are drawn from 24 bits of the count",
        6,
        ((TABLE, "static_cast<uint64_t>(t));", "static_cast<uint64_t>(t) & 0xffffff);"),),
    ),
    Mutation(
        "any number of steps is taken",
        6,
        (
            (VALUES, "    if not 0 <= value < MOST_STEPS or value != int(value):", "    if not math.isfinite(value):"),
            (TABLE, "    if (!(count >= 0", "    if (false && !(count >= 0"),
        ),
    ),
    # 7: defaults, memory formats
    Mutation(
        "step counts are made on the default device",
        7,
        ((CHECKPOINT, 'float(t), dtype=STEP_DTYPE, device="cpu")', "float(t), dtype=STEP_DTYPE)"),),
    ),
    Mutation(
        "the order in which codes lie is not looked at",
        7,
        ((STATE, "        if order != memory_order.order_of(param.shape, self.strides):", "        if order < 0:"),),
    ),
    Mutation(
        "state made in inference mode stays of that mode",
        7,
        (
            (
                "signadam_ext/core/formats.py",
                "torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()",
                "contextlib.nullcontext()",
            ),
        ),
    ),
    # 8: checkpoints
    Mutation(
        "a moment may be missing",
        8,
        ((CHECKPOINT, "        if name not in saved and not OPTIMIZERS_OWN.isdisjoint(saved):", "        if False:"),),
    ),
    Mutation(
        "low bits and a master copy may come together",
        8,
        ((CHECKPOINT, "    if RESIDUAL_DTYPES.keys() <= state.keys():", "    if False:"),),
    ),
    Mutation(
        "another method's checkpoint is taken",
        8,
        (
            (
                LOADING,
                '    ours, method = method_of(type(optimizer)), saved.get("method")\n',
                '    return\n    ours, method = method_of(type(optimizer)), saved.get("method")\n',
            ),
            (CHECKPOINT, "        if name not in saved and not OPTIMIZERS_OWN.isdisjoint(saved):", "        if False:"),
        ),
    ),
    Mutation(
        "a file may have members that its head does not list",
        8,
        (
            (
                ARCHIVE,
                "    if sorted(expected) != sorted(present):",
                "    members = [each for each in members if each.member in infos]\n    if False:",
            ),
        ),
    ),
)


def sources_of(mutation: Mutation) -> tuple[str, ...]:
    python = ("signadam_ext", "triton_kernels")
    return (*python, "csrc", "setup.py", "pyproject.toml", "README.md", "CHANGELOG.md") if mutation.native else python


def copied(names: tuple[str, ...], folder: Path) -> None:
    """Brings these files and folders of the package there. What is there already keeps its time."""
    for name in names:
        source = ROOT / name
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            target = folder / file.relative_to(ROOT)
            if file.is_dir() or "__pycache__" in file.parts:
                continue
            if not target.exists() or target.read_bytes() != file.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def applied(mutation: Mutation, folder: Path) -> None:
    """Makes the folder one with a package that has the fault.

    Raises:
        ValueError: a text that is not there, or there more than once: the package has changed since.
    """
    copied(sources_of(mutation), folder)
    for file, old, new in mutation.edits:
        path = folder / file
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{mutation.name}: {file} has {text.count(old)} places like {old!r}, not one")
        path.write_text(text.replace(old, new))
    if mutation.native:
        environment = {**os.environ, "SIGNADAM_CUDA": "0"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)


def found(mutation: Mutation, actions: int, seed: int, native: Path) -> dict[str, Any]:
    """Whether the fuzzer finds it, after how many actions, and by what.

    Args:
        mutation: the fault.
        actions: how many at the most.
        seed: of the fuzzer.
        native: a folder for faults in C++, where what one has compiled is there for the next.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = native if mutation.native else Path(name)
        applied(mutation, folder)
        out, trace = Path(name) / "fuzz.json", Path(name) / "trace"
        command = [sys.executable, str(FUZZER), f"--package={folder}", f"--actions={actions}", f"--seed={seed}"]
        command += ["--stop", f"--json={out}", f"--trace={trace}"]
        ran = subprocess.run(command, capture_output=True, text=True)
        result: dict[str, Any] = {"fault": mutation.name, "kind": mutation.kind, "found": ran.returncode != 0}
        told = json.loads(out.read_text()) if out.exists() else {"over": False}
        if told["over"]:
            result["actions"] = told["actions"]
            result["by"] = [f"{x['action']}: {x['fault']}" for x in told["faults"]]
        else:
            last = trace.read_text().strip() if trace.exists() else ran.stderr[-300:]
            result["by"] = [f"died with status {ran.returncode} in {last}"]
            done = re.findall(r":(\d+) action (\d+)", last)
            result["actions"] = int(done[0][0]) * 100 + int(done[0][1]) if done else None
    if BROKEN.search(" ".join(result["by"])):
        result["found"] = False
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="faults; all unless given")
    parser.add_argument("--actions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--native", type=Path, help="folder in which faults in C++ are compiled, and kept")
    options = parser.parse_args()
    results = []
    native = options.native or Path(tempfile.mkdtemp())
    for mutation in MUTATIONS:
        if options.names and mutation.name not in options.names:
            continue
        result = found(mutation, options.actions, options.seed, native)
        results.append(result)
        how = f"after {result['actions']} actions, by {result['by'][0][:150]}" if result["found"] else "NOT FOUND"
        print(f"{mutation.name} (kind {mutation.kind}): {how} ({result['seconds']} s)", flush=True)
    if options.native is None:
        shutil.rmtree(native)
    missed = sum(not result["found"] for result in results)
    print(f"{len(results) - missed} of {len(results)} found")
    if options.json:
        record = {"seed": options.seed, "actions": options.actions, "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())

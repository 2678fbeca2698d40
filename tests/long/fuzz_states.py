"""Fuzzes the loading of states with atheris (`pip install atheris`), for so many minutes in all, however often stopped.

    python tests/long/fuzz_states.py --minutes 60 --folder runs/states
    python tests/long/fuzz_states.py --folder runs/states --results tests/results     write log and corpus
    python tests/long/fuzz_states.py --input FILE                                     one input alone

state_inputs.py says what an input is, and what must come of it. A finding is written to the folder with its traceback,
and the run goes on; a crash, a hang or a lack of memory ends the process, and the next one goes on. Exit status 1 says
that something was found.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE)]

#: The inputs that are kept, each under its SHA-1.
CORPUS = HERE / "states.zip"

#: A loading that takes longer hangs. The slowest takes some hundredths of a second; a busy machine is slower.
HANGS_AFTER = 30
#: What one loading may need beside what the process had, in bytes: inputs are smaller by far.
MEMORY = 64 << 20
#: The process may not reserve more than this beside what it has at its start, so that nothing gets what it claims.
ADDRESSES = 1 << 30
LONGEST = 16384
#: At most so long is one process: what torch keeps of its many tensors is given back.
SPELL = 3600


def resident(key: str = "VmRSS") -> int:
    """Bytes, by a line of Linux's status file."""
    found = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


class Watched:
    """The target, with its memory watched and its findings written down, each kind once."""

    def __init__(self, folder: Path) -> None:
        from state_inputs import Target

        self.folder = folder
        self.target = Target(Path(tempfile.mkdtemp()), self._loading)
        self.inputs = 0
        self._grown = 0

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
        before = resident()
        try:
            yield
        finally:
            self._grown = resident("VmHWM") - before

    def __call__(self, data: bytes) -> None:
        self.inputs += 1
        self._grown = 0
        try:
            self.target(data)
        except Exception as error:
            self._note(data, error)
        if self._grown > MEMORY:
            self._note(data, MemoryError(f"{self._grown >> 20} MiB for an input of {len(data)} bytes"))

    def _note(self, data: bytes, error: Exception) -> None:
        cause = error.__cause__ or error
        frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if "torch" not in frame.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        kind = hashlib.sha256(f"{type(cause).__name__} {where}".encode()).hexdigest()[:12]
        path = self.folder / f"finding-{kind}"
        if not path.exists():
            path.write_bytes(data)
            path.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))

    def summary(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "outcomes": dict(self.target.outcomes)}


def fuzz(folder: Path, seconds: int) -> None:
    """The process that does it."""
    import atheris

    with atheris.instrument_imports(include=["zipfile"]):
        del sys.modules["zipfile"]
        importlib.import_module("zipfile")
    import torch
    from torch._weights_only_unpickler import Unpickler

    # All of torch would take minutes.
    Unpickler.load = atheris.instrument_func(Unpickler.load)
    with atheris.instrument_imports(include=["signadam_ext"]):
        import signadam_ext  # noqa: F401
    from state_inputs import EDITED_DICT, EDITED_FILE

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    watched = Watched(folder)
    for how in (EDITED_DICT, EDITED_FILE):  # what loading imports and makes once
        watched.target(bytes((0, 255, how, 0, 0, 5)))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
    began = time.time()
    head = json.loads((folder / "spell.json").read_text())["commit"]

    def one(data: bytes) -> None:
        watched(data)
        if watched.inputs % 1000 == 0 or time.time() - began > seconds - 2:
            summary = {"commit": head, "seconds": round(time.time() - began, 1), **watched.summary()}
            (folder / "spell.json").write_text(json.dumps(summary))

    options = [f"-max_total_time={seconds}", f"-timeout={HANGS_AFTER}", "-rss_limit_mb=0", f"-max_len={LONGEST}"]
    options += [f"-artifact_prefix={folder}/caught-", "-print_final_stats=1", "-reload=0", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], one)
    atheris.Fuzz()


def run(folder: Path, minutes: float) -> dict[str, Any]:
    """Process after process until the minutes are over; what was done before counts."""
    from reporting.machine import commit

    log_file, spell_file = folder / "log.json", folder / "spell.json"
    log: dict[str, Any] = json.loads(log_file.read_text()) if log_file.exists() else {"spells": []}
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    if not any((folder / "corpus").iterdir()):
        write_seeds(folder / "corpus")

    def note(status: int | str) -> None:
        """Adds what the last process has said of itself to the log."""
        said = (folder / f"output-{len(log['spells'])}.txt").read_text(errors="replace")
        covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)/", said)
        edges, features, inputs = map(int, covered[-1]) if covered else (0, 0, 0)
        spell = {"seconds": 0.0, **(json.loads(spell_file.read_text()) if spell_file.exists() else {})}
        spell |= {"status": status, "coverage": {"edges": edges, "features": features, "inputs": inputs}}
        spell_file.unlink(missing_ok=True)
        log["spells"].append(spell)
        log["found"] = sorted(path.name for path in folder.glob("[cf]*-*") if path.suffix != ".txt")
        log_file.write_text(json.dumps(log, indent=1) + "\n")
        print(spell, flush=True)

    if spell_file.exists():
        note("stopped")
    while (left := minutes * 60 - sum(spell["seconds"] for spell in log["spells"])) > 1:
        began = time.time()
        spell_file.write_text(json.dumps({"commit": commit()}))
        with (folder / f"output-{len(log['spells'])}.txt").open("w") as output:
            command = [sys.executable, __file__, "--folder", str(folder), "--spell", str(int(min(left, SPELL)) or 1)]
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        note(status)
        if status != 0 and time.time() - began < 5:
            raise SystemExit(f"the process does not run: see its output in {folder}")
    return log


def write_seeds(folder: Path) -> None:
    from state_inputs import Target, seeds

    if CORPUS.exists():
        with zipfile.ZipFile(CORPUS) as archive:
            for name in archive.namelist():
                (folder / name).write_bytes(archive.read(name))
    with tempfile.TemporaryDirectory() as temporary:
        for _, data in seeds(Target(Path(temporary))):
            (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)


def covered(target: Any, data: bytes) -> set[tuple[str, int, int]]:
    """Which line of the package followed which while an input was loaded."""
    found: set[tuple[str, int, int]] = set()

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if "signadam_ext" not in name:
            return None
        before = 0

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            found.add((name, before, frame.f_lineno))
            before = frame.f_lineno
            return on_line

        return on_line

    sys.settrace(on_call)
    try:
        target(data)
    finally:
        sys.settrace(None)
    return found


def smallest(inputs: Iterable[bytes]) -> list[bytes]:
    """Inputs that reach together what all of them reach, the short ones first."""
    from state_inputs import Target

    kept, reached = [], set()
    with tempfile.TemporaryDirectory() as temporary:
        target = Target(Path(temporary))
        for data in sorted(inputs, key=len):
            new = covered(target, data) - reached
            if new:
                kept.append(data)
                reached |= new
    return kept


def write_results(folder: Path, log: dict[str, Any], results: Path) -> None:
    """The log, and the smallest corpus, as they are kept in the repository."""
    from reporting.machine import facts

    made_by = facts()  # before the corpus is another
    kept = smallest(path.read_bytes() for path in (folder / "corpus").iterdir())
    with zipfile.ZipFile(CORPUS, "w", zipfile.ZIP_DEFLATED) as archive:
        for data in kept:
            archive.writestr(zipfile.ZipInfo(hashlib.sha1(data).hexdigest()), data, zipfile.ZIP_DEFLATED)
    spells = log["spells"]
    whole = {
        "minutes": round(sum(spell["seconds"] for spell in spells) / 60, 1),
        "inputs": sum(spell.get("inputs", 0) for spell in spells),
        "corpus": len(kept),
    }
    found = json.dumps({**made_by, **whole, **log}, indent=1) + "\n"
    (results / "states.json").write_text(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0, help="in all, with those of earlier calls")
    parser.add_argument("--folder", type=Path, help="where the corpus grows, and findings are written")
    parser.add_argument(
        "--results",
        type=Path,
        help="write states.json there, and the smallest corpus of the same coverage to states.zip",
    )
    parser.add_argument("--input", type=Path, help="load that input alone")
    parser.add_argument("--spell", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.input:
        from state_inputs import Target

        with tempfile.TemporaryDirectory() as temporary:
            print(Target(Path(temporary))(options.input.read_bytes()))
        return 0
    if options.spell:
        fuzz(options.folder, options.spell)
        return 0
    log = run(options.folder.resolve(), options.minutes)
    if options.results:
        write_results(options.folder, log, options.results)
    return int(bool(log.get("found")))


if __name__ == "__main__":
    sys.exit(main())

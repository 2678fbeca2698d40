"""Kills a training with SIGKILL at random moments, resumes it, and compares it with one that nobody disturbed.

    python tests/long/kills.py --folder runs/kills --results tests/results/kills.json

Two trainings of the examples' GPT, in turns: `examples/train_gpt.py --preset tiny` itself, which saves weights, state
and schedule with torch.save, and a loop that saves the optimizer's state with `save_state` after every other step.
After each kill, every file under its final name must be a whole checkpoint with the bits that the undisturbed run had
at its step; at the end weights, state and losses must be that run's, bit for bit. Half of the kills fall anywhere in a
run, half while something is being saved, which the temporary file that they leave behind shows.

Training happens in forks of one process that has imported everything, so that no kill falls into importing torch. What
is done is in the folder's log.json, and the next call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent), str(ROOT / "examples")]
# Forks may have no threads of their parent's.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import torch  # noqa: E402
import train_gpt  # noqa: E402
from gpt import GPT  # noqa: E402
from torch import Tensor  # noqa: E402

import signadam_ext  # noqa: E402

EXAMPLE = ("SignAdamPP", "Signum", "Lion", "SignAdam", "SignSGD")
#: Class, hyperparameters, dtype of the weights.
SAVED_BY_US: dict[str, tuple[Any, dict[str, Any], torch.dtype]] = {
    "SignAdamPP int8": (signadam_ext.SignAdamPP, {"state_dtype": "int8", "confidence": "adaptive"}, torch.float32),
    "SignAdamPP int2 split8": (
        signadam_ext.SignAdamPP,
        {"state_dtype": "int2", "param_storage": "split8", "beta": 0.5},
        torch.bfloat16,
    ),
    "AdamW block8 stochastic": (
        signadam_ext.AdamW,
        {"state_dtype": "int8", "param_storage": "stochastic"},
        torch.bfloat16,
    ),
    "Lion master": (signadam_ext.Lion, {"state_dtype": "bf16", "param_storage": "master"}, torch.bfloat16),
}


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints, or entries of them, have the same bits."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and torch.equal(*(x.detach().reshape(-1).view(torch.uint8) for x in (a, b)))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@dataclass(frozen=True)
class Training:
    """A training that can be killed.

    Attributes:
        name: of its kind and its optimizer.
        train: trains in a folder from where it stands to the end; told where to keep a copy of each checkpoint, or not.
        checkpoints: (name, step, content) of the whole checkpoints in a folder.
        temporary: pattern of names of files that are being written.
    """

    name: str
    train: Callable[[Path, Path | None], None]
    checkpoints: Callable[[Path], Iterator[tuple[str, int, Any]]]
    temporary: str


# The example


def _example(optimizer: str, steps: int, text: Path) -> Training:
    def train(folder: Path, copies: Path | None) -> None:
        save = train_gpt.Run.save

        def saved(run: Any, path: Path) -> None:
            save(run, path)
            if copies is not None:
                shutil.copy(path, copies / f"{path.stem}-{run.step}")

        # In this fork alone. What comes after the last checkpoint takes longer than the training.
        train_gpt.Run.save = saved  # type: ignore[method-assign]
        train_gpt.GPT.generate = lambda *_, **__: b""  # type: ignore[assignment, method-assign]
        train_gpt.plot = lambda *_: None
        command = ["--preset", "tiny", "--optim", optimizer, "--steps", str(steps), "--data", str(text)]
        command = ["--resume"] if (folder / "results.json").exists() else [*command, "--device", "cpu", "--seed", "5"]
        sys.argv = ["train_gpt.py", *command, "--out", str(folder)]
        train_gpt.main()

    def checkpoints(folder: Path) -> Iterator[tuple[str, int, Any]]:
        for path in sorted(folder.glob("*.pt")):
            content = torch.load(path, weights_only=True)
            del content["seconds"]  # of the clock
            yield path.stem, content["step"], content

    return Training(f"train_gpt.py {optimizer}", train, checkpoints, "*.partial")


# With save_state


def _saved_by_us(name: str, steps: int) -> Training:
    cls, options, dtype = SAVED_BY_US[name]

    def made() -> tuple[GPT, Any]:
        torch.manual_seed(3)
        model = GPT(train_gpt.PRESETS["tiny"].model).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model, cls(model.parameters(), lr=1e-3, seed=11, **options)

    def train(folder: Path, copies: Path | None) -> None:
        model, optimizer = made()
        step = 0
        for _, step, (weights, _) in checkpoints(folder):
            model.load_state_dict(weights)
            optimizer.load_state(folder / f"state-{step}")
        while step < steps:
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(256, (2, 17), generator=generator)
            loss = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 2 and step < steps:
                continue
            torch.save(model.state_dict(), folder / "weights.tmp")
            os.replace(folder / "weights.tmp", folder / f"weights-{step}")
            optimizer.save_state(folder / f"state-{step}")
            if copies is not None:
                shutil.copy(folder / f"weights-{step}", copies)
                shutil.copy(folder / f"state-{step}", copies)
            for path in (*folder.glob("weights-*"), *folder.glob("state-*")):
                if int(path.name.split("-")[1]) < step:
                    path.unlink()

    def checkpoints(folder: Path) -> Iterator[tuple[str, int, Any]]:
        steps_there = sorted(int(path.name.split("-")[1]) for path in folder.glob("state-*"))
        for step in steps_there:
            if (folder / f"weights-{step}").exists():
                _, optimizer = made()
                optimizer.load_state(folder / f"state-{step}")
                weights = torch.load(folder / f"weights-{step}", weights_only=True)
                yield "save_state", step, (weights, optimizer.state_dict())

    return Training(f"save_state {name}", train, checkpoints, "*.tmp")


def trainings(folder: Path, steps: int) -> list[Training]:
    text = folder / "text.txt"
    text.write_bytes(Path(train_gpt.__file__).read_bytes() * 2)
    ours = [_saved_by_us(name, steps) for name in SAVED_BY_US]
    return [x for pair in zip((_example(name, steps, text) for name in EXAMPLE), ours, strict=False) for x in pair]


# Killing


def forked(training: Training, folder: Path, copies: Path | None = None) -> int:
    """The process that trains."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        with (folder / "output.txt").open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            training.train(folder, copies)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def is_over(pid: int) -> bool:
    """Whether the process has ended by itself."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and status:
        raise SystemExit(f"a training failed by itself, with {status}")
    return bool(done)


def saving(folder: Path, pattern: str) -> bool:
    return any(folder.glob(pattern))


@dataclass
class Kills:
    """The trainings, their undisturbed ends, and what has been done so far."""

    folder: Path
    trainings: list[Training]
    log: dict[str, Any]

    def undisturbed(self, training: Training) -> tuple[dict[tuple[str, int], Any], float]:
        """Every checkpoint of a run to the end, by its name and step, and the run's seconds."""
        folder, copies = (self.folder / f"{kind} {training.name}" for kind in ("whole", "copies"))
        done = folder / "seconds"
        if not done.exists():
            for each in (folder, copies):
                shutil.rmtree(each, ignore_errors=True)
                each.mkdir()
            began = time.perf_counter()
            pid = forked(training, folder, copies)
            _, status = os.waitpid(pid, 0)
            if status:
                raise SystemExit((folder / "output.txt").read_text()[-2000:])
            done.write_text(str(time.perf_counter() - began))
        found = {}
        if training.name.startswith("save_state"):
            found = {(name, step): content for name, step, content in training.checkpoints(copies)}
        else:
            for path in copies.iterdir():
                content = torch.load(path, weights_only=True)
                del content["seconds"]
                found[path.name.rsplit("-", 1)[0], content["step"]] = content
        return found, float(done.read_text())

    def go_on(self, kills: int) -> None:
        references = {training.name: self.undisturbed(training) for training in self.trainings}
        while len(self.log["kills"]) < kills:
            training = self.trainings[self.log["runs"] % len(self.trainings)]
            self._run(training, *references[training.name], kills)
            (self.folder / "log.json").write_text(json.dumps(self.log, indent=1) + "\n")

    def _run(self, training: Training, reference: dict[tuple[str, int], Any], seconds: float, kills: int) -> None:
        """A training, killed until it comes to its end or has been killed often enough; then it may end."""
        folder = self.folder / "disturbed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        killed: list[dict[str, Any]] = []
        while True:
            draw = random.Random(f"{self.log['seed']} {self.log['runs']} {len(killed)}")
            pid = forked(training, folder)
            kill = self._kill(training, folder, pid, draw, seconds, len(self.log["kills"]) + len(killed) < kills)
            found = {(name, step): content for name, step, content in training.checkpoints(folder)}
            for (name, step), content in found.items():
                if not same(content, reference[name, step]):
                    raise SystemExit(f"{training.name}: the checkpoint {name} of step {step} has other bits")
            if kill is None:
                break
            killed.append({"training": training.name, **kill, "steps": dict(found.keys())})
        last = {name: max(step for other, step in reference if other == name) for name, _ in reference}
        if dict(found.keys()) != last:
            raise SystemExit(f"{training.name} has ended at {list(found)}, and not at {last}")
        self.log["kills"] += killed
        self.log["runs"] += 1
        print(f"{training.name}: the same bits after {len(killed)} kills; {len(self.log['kills'])} in all", flush=True)

    def _kill(
        self, training: Training, folder: Path, pid: int, draw: random.Random, seconds: float, wanted: bool
    ) -> dict[str, Any] | None:
        """Kills the process, or sees it end: then None."""
        began = time.perf_counter()
        if not wanted:
            _, status = os.waitpid(pid, 0)
            if status:
                raise SystemExit((folder / "output.txt").read_text()[-2000:])
            return None
        in_saving = draw.random() < 0.5
        moment = began + draw.random() * seconds * (0.5 if in_saving else 1.0)
        within = draw.random() * 0.003
        while time.perf_counter() < moment:
            if is_over(pid):
                return None
            time.sleep(0.001)
        if in_saving:
            while not saving(folder, training.temporary):
                if is_over(pid):
                    return None
            time.sleep(within)
        if is_over(pid):
            return None
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        after = round(time.perf_counter() - began, 4)
        left = list(folder.glob(training.temporary))
        for path in left:
            path.unlink()  # those of save_state have a new name every time
        return {"after": after, "aimed_at_saving": in_saving, "in_saving": bool(left)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=80, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--trainings", type=int, help="only so many of them")
    parser.add_argument("--folder", type=Path, required=True, help="where trainings run, and what is done is kept")
    parser.add_argument("--results", type=Path, help="write what was done there, with commit, versions and machine")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "log.json"
    log = json.loads(log_file.read_text()) if log_file.exists() else {"seed": options.seed, "runs": 0, "kills": []}
    kills = Kills(folder, trainings(folder, options.steps)[: options.trainings], log)
    kills.go_on(options.kills)
    in_saving = sum(kill["in_saving"] for kill in log["kills"])
    print(f"{len(log['kills'])} kills in {log['runs']} runs, {in_saving} of them while something was being saved")
    if options.results:
        from reporting.machine import facts

        options.results.write_text(json.dumps({**facts(), "in_saving": in_saving, **log}, indent=1) + "\n")


if __name__ == "__main__":
    main()

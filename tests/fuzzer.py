"""A stateful fuzzer of the optimizers: small trainings, and everything that may happen to them between two steps.

    python tests/fuzzer.py --actions 100000 --seed 7 --json out.json
    python tests/fuzzer.py --replay 7:12          all of world 12, action by action

Each world is held three times, see fuzzer_world.py, and lives for some hundred actions, or until a fault. A fault is
printed with the line that replays it. Exit status 1 says that there was one.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import platform
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--json", type=Path, help="write seed, actions by kind, faults, minutes and commit there")
    parser.add_argument("--replay", metavar="SEED:WORLD", help="run that world alone and say each action")
    parser.add_argument("--stop", action="store_true", help="stop at the first fault")
    parser.add_argument("--only", default="", help="actions by name, divided by commas; 'step' is always among them")
    parser.add_argument("--skip", default="", help="actions to leave out")
    parser.add_argument("--package", type=Path, default=ROOT, help="folder that holds signadam_ext")
    parser.add_argument("--trace", type=Path, help="write there what is being done, to be read after a crash")
    parser.add_argument("--hang", type=float, default=300, help="seconds after which a world is one that hangs")
    parser.add_argument("--world", type=int, default=100, help="actions in a world")
    return parser.parse_args()


class Fuzzer:
    def __init__(self, options: argparse.Namespace) -> None:
        import fuzzer_actions

        self.options = options
        self.seed = options.seed
        self.actions = dict(fuzzer_actions.ACTIONS)
        only, skip = ([x.strip() for x in text.split(",") if x.strip()] for text in (options.only, options.skip))
        for name in (*only, *skip):
            if name not in self.actions:
                raise SystemExit(f"{name!r}: no action; there are {', '.join(sorted(self.actions))}")
        if only:
            self.actions = {name: x for name, x in self.actions.items() if name in (*only, "step")}
        self.actions = {name: x for name, x in self.actions.items() if name not in skip}
        self.counts: Counter[str] = Counter()
        self.faults: list[dict[str, Any]] = []
        self.done = 0
        self.began = time.perf_counter()
        self.trace = os.open(options.trace, os.O_CREAT | os.O_TRUNC | os.O_WRONLY) if options.trace else None
        self.loud = False

    def over(self) -> bool:
        minutes = (time.perf_counter() - self.began) / 60
        late = self.options.minutes is not None and minutes > self.options.minutes
        return late or self.done >= self.options.actions or bool(self.options.stop and self.faults)

    def run(self) -> None:
        world = known = 0
        while not self.over():
            self.run_world(world)
            world += 1
            self.write(over=self.over())
            if len(sys.modules) != known:  # collecting what a world leaves need not look at modules
                known = len(sys.modules)
                gc.collect()
                gc.freeze()

    def run_world(self, number: int) -> None:
        import torch
        from fuzzer_world import Fault, Skip, World

        faulthandler.dump_traceback_later(self.options.hang, exit=True)
        name = f"{self.seed}:{number}"
        world: Any = None
        history: list[str] = []
        kind = "world"
        try:
            torch.set_num_threads(random.Random(name).choice((1, 1, 1, 1, 1, 1, 1, 2)))
            world = World(name)
            if self.loud:
                print(world.describe(), flush=True)
            names = list(self.actions)
            weights = [1.0 if self.options.only else x.weight for x in self.actions.values()]
            k = 0
            while k < self.options.world and not self.over():
                k += 1
                seed = f"{name}:{k}"
                kind = random.Random(f"{seed} kind").choices(names, weights)[0]  # not with the action's own numbers
                self.say(f"{name} action {k}: {kind}")
                details, skips = [], 0
                for side in world.sides:
                    self.say(f"{name} action {k}: {kind} on {side.name}")
                    try:
                        details.append(self.actions[kind].act(side, random.Random(seed)))
                    except Skip:
                        skips += 1
                if not skips:
                    text = kind if details[0] is None else f"{kind}: {details[0]}"
                    history.append(text)
                    self.counts[text] += 1
                    self.done += 1
                elif details:
                    raise AssertionError(f"the fuzzer skips {kind} on some sides only")
                world.check()
            kind = "end of a world"
            world.end()
        except Fault as fault:
            self.note(name, kind, str(fault), history, world)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            inner = [x for x in traceback.extract_tb(error.__traceback__) if "fuzzer" in x.filename][-1]
            text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno}, line {inner.lineno})"
            if self.loud:
                traceback.print_exc()
            self.note(name, kind, " ".join(text.split())[:400], history, world)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def say(self, text: str) -> None:
        if self.loud:
            print(text, flush=True)
        if self.trace is not None:
            os.pwrite(self.trace, f"{text:120}\n".encode(), 0)

    def note(self, name: str, kind: str, text: str, history: list[str], world: Any) -> None:
        self.done += 1
        self.counts[kind] += 1
        print(f"fault in {kind!r}: {text}", flush=True)
        print(
            f"  replay: python tests/fuzzer.py --replay {name}" + self.filters() + f"; before: {history[-5:]}",
            flush=True,
        )
        if world is not None:
            print(f"  world: {world.describe()[:600]}", flush=True)
        self.faults.append({"replay": name, "action": kind, "fault": text, "before": history[-5:]})

    def filters(self) -> str:
        return "".join(
            f" --{name} {getattr(self.options, name)!r}" for name in ("only", "skip") if getattr(self.options, name)
        )

    def write(self, over: bool) -> None:
        """What is known so far, for whoever reads it after a crash, and whether that is all."""
        if self.options.json:
            self.options.json.write_text(json.dumps({**self.result(), "over": over}, indent=1) + "\n")

    def result(self) -> dict[str, Any]:
        import torch

        import signadam_ext._C as _C

        return {
            "seed": self.seed,
            "actions": self.done,
            "actions_by_kind": dict(sorted(self.counts.items())),
            "faults": self.faults,
            "minutes": round((time.perf_counter() - self.began) / 60, 2),
            "module": _C.build_info(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        }


def main() -> int:
    options = arguments()
    sys.path.insert(1, str(options.package))
    faulthandler.enable()
    warnings.simplefilter("ignore")
    import signadam_ext

    if Path(signadam_ext.__file__).resolve().parents[1] != options.package.resolve():
        raise SystemExit(f"signadam_ext is imported from {signadam_ext.__file__}, not from {options.package}")
    if options.replay:
        seed, world = options.replay.split(":")
        options.seed = int(seed)
        fuzzer = Fuzzer(options)
        fuzzer.loud = True
        gc.freeze()
        fuzzer.run_world(int(world))
    else:
        fuzzer = Fuzzer(options)
        gc.freeze()  # collecting what a world leaves need not look at torch
        fuzzer.run()
    result = fuzzer.result()
    fuzzer.write(over=True)
    print(
        f"{result['actions']} actions of {len(result['actions_by_kind'])} kinds, seed {fuzzer.seed}: "
        f"{len(fuzzer.faults)} faults in {result['minutes']} minutes",
        flush=True,
    )
    return int(bool(fuzzer.faults))


if __name__ == "__main__":
    sys.exit(main())

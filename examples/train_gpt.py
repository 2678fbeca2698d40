"""Train a small GPT on Python's own source code with a sign-based optimizer, and with AdamW to compare.

python examples/train_gpt.py                                   about two minutes on two CPU cores
python examples/train_gpt.py --optim signum --steps 2000       another optimizer, a longer run
python examples/train_gpt.py --data book.txt --out runs/book   another text
python examples/train_gpt.py --preset medium --device cuda     a larger model, for a GPU
python examples/train_gpt.py --resume                          continue after Ctrl-C, bit for bit

torchrun --nproc-per-node 2 examples/train_gpt.py --parallel ddp --vote majority
                                                               workers vote on each gradient's sign, in 2 bits
torchrun --nproc-per-node 2 examples/train_gpt.py --parallel fsdp2
                                                               parameters and state are sharded over workers
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import io
import json
import math
import os
import shlex
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# OpenMP threads that wait for each other spin, and on a busy machine they spin away the time of the one they
# wait for: a fiftieth of the speed was measured. A short spin costs next to nothing on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Without this, cuBLAS cannot promise the same bits twice.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

try:
    import matplotlib
    import torch
    from gpt import GPT, GPTConfig
    from parallel import CHOICES, VOTES, Workers, local, local_device, started_by_torchrun
    from torch import Tensor
    from tqdm import tqdm

    import signadam_ext
    from signadam_ext.core.native import compiled
except ImportError as error:
    sys.exit(f'{error}\nIn the root of the repository, run: pip install ".[examples]"')


@dataclass(frozen=True)
class Preset:
    model: GPTConfig
    batch_size: int
    steps: int
    lr_scale: float = 1.0  # wider layers want smaller steps: about 1 / width


PRESETS = {
    "tiny": Preset(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32), batch_size=4, steps=40),
    "small": Preset(GPTConfig(n_layer=3, n_head=4, n_embd=128, block_size=128), batch_size=8, steps=800),
    "medium": Preset(
        GPTConfig(n_layer=8, n_head=8, n_embd=512, block_size=512), batch_size=32, steps=3000, lr_scale=0.25
    ),
}

# As in the runs of experiments/convergence, whose rates these are.
CLIP = 1.0  # bounds the gradient's global norm
WEIGHT_DECAY = 0.1
SCALE = 288 / 128  # that GPT is 288 wide, the preset "small" 128
# Learning rates for the preset "small". The first four: the search of the runs goes on here. It tries the best rate
# at 1,200 steps, times SCALE (AdamW 1e-3, SignAdamPP 6e-4, Signum and Lion 2e-4), and the neighbours of the best,
# 1, 2, 3 or 6 times a power of ten, with `--seed 1000`. AdamW keeps its rate. Of the others a higher neighbour ended
# lower: 1.633 instead of 1.671 for SignAdamPP. The last three come from a search by hand, without clipping.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3 * SCALE, "betas": (0.9, 0.95), "fused": True}),
    "SignAdamPP": (signadam_ext.SignAdamPP, {"lr": 1e-3 * SCALE}),
    "Signum": (signadam_ext.Signum, {"lr": 3e-4 * SCALE}),
    "Lion": (signadam_ext.Lion, {"lr": 3e-4 * SCALE}),
    "SignAdam": (signadam_ext.SignAdam, {"lr": 1e-3}),
    "SignSGD": (signadam_ext.SignSGD, {"lr": 2e-3}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "fused": True}),
}
BASELINE = "AdamW"

# Directories left out of the corpus: what is not the library's own hand-written code.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
EVALUATIONS = 10  # per run; each also saves a checkpoint
EVALUATION_BATCHES = 32
LOG_EVERY = 10


# Data


def read_corpus(file: Path | None) -> bytes:
    """The text of `file`, or every module of the standard library, joined in the order of their paths."""
    if file is not None:
        return file.read_bytes()
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return b"\n".join((root / name).read_bytes() for name in names if not SKIPPED & set(name.split("/")))


def windows(data: Tensor, starts: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (len(starts), block_size) each; a target is the byte after its input."""
    index = starts[:, None] + torch.arange(block_size + 1)
    window = data[index.to(data.device)].long()
    return window[:, :-1], window[:, 1:]


def training_batch(data: Tensor, preset: Preset, seed: int, step: int) -> tuple[Tensor, Tensor]:
    # A function of the seed and the step alone, so every optimizer sees the same batches, and a checkpoint
    # needs no state of a random generator.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    block_size = preset.model.block_size
    starts = torch.randint(len(data) - block_size, (preset.batch_size,), generator=generator)
    return windows(data, starts, block_size)


@torch.no_grad()
def evaluate(model: GPT, data: Tensor, preset: Preset) -> float:
    """The mean loss over windows spread evenly across `data`."""
    block_size = preset.model.block_size
    count = min(EVALUATION_BATCHES * preset.batch_size, len(data) - block_size)
    starts = torch.arange(count) * (len(data) - block_size) // count
    losses = [model(*windows(data, part, block_size)) * len(part) for part in starts.split(preset.batch_size)]
    return torch.stack(losses).sum().item() / count


# One training run


class Run:
    """One model under one optimizer: everything a checkpoint holds."""

    def __init__(self, name: str, config: dict[str, Any], device: torch.device, workers: Workers) -> None:
        self.name, self.config, self.workers = name, config, workers
        self.preset = PRESETS[config["preset"]]
        self.steps: int = config["steps"]
        torch.manual_seed(config["seed"])  # the same initial weights for every optimizer
        self.model = GPT(self.preset.model).to(device)
        optimizer_class, options = OPTIMIZERS[name]
        self.lr = options["lr"] * self.preset.lr_scale
        if name == config["optim"] and config["lr"] is not None:
            self.lr = config["lr"]
        # The baseline has the mean of gradients.
        self.trained = workers.wrap(self.model, votes=name == config["optim"])
        options = {"weight_decay": WEIGHT_DECAY, **options, "lr": self.lr}
        self.optimizer = optimizer_class(self.model.parameters(), **options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.step = 0
        self.seconds = 0.0  # of training, evaluations and checkpoints left out
        self.losses = torch.full((self.steps,), math.nan, device=device)
        self.shared = 0  # losses up to here are means over workers
        self.val_losses: list[tuple[int, float]] = []

    def _lr_factor(self, step: int) -> float:
        """Linear warm-up over the first tenth, then a cosine down to 0."""
        warmup = max(1, self.steps // 10)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def tokens_per_second(self) -> float:
        return self.step * self.preset.batch_size * self.preset.model.block_size / max(self.seconds, 1e-9)

    @property
    def state_bytes(self) -> int:
        """On this worker."""
        held = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(local(value).nbytes for value in held if isinstance(value, Tensor))

    def train_step(self, data: Tensor) -> None:
        x, y = map(self.workers.part, training_batch(data, self.preset, self.config["seed"], self.step))
        with torch.autocast(data.device.type, torch.bfloat16, enabled=data.device.type == "cuda"):
            loss = self.trained(x, y)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.scheduler.step()
        self.losses[self.step] = loss.detach()
        self.step += 1

    def share_losses(self) -> None:
        """Makes means over workers of the losses since the last call."""
        self.losses[self.shared : self.step] = self.workers.mean(self.losses[self.shared : self.step].clone())
        self.shared = self.step

    def save(self, path: Path) -> None:
        self.share_losses()
        model, optimizer = self.workers.state(self.model, self.optimizer)
        if not self.workers.is_first:
            self.workers.wait()
            return
        checkpoint = {
            "config": self.config,
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "val_losses": self.val_losses,
        }
        partial = path.with_suffix(".partial")
        torch.save(checkpoint, partial)
        os.replace(partial, path)  # atomic: whenever the power fails, one whole checkpoint is there
        self.workers.wait()

    def load(self, path: Path) -> bool:
        """Continue from `path`; False if there is no checkpoint of this very run."""
        if not path.exists():
            return False
        checkpoint = torch.load(path, map_location=self.losses.device, weights_only=True)
        if {"parallel": "off", "vote": "off", **checkpoint["config"]} != self.config:
            return False
        self.workers.load_state(self.model, self.optimizer, (checkpoint["model"], checkpoint["optimizer"]))
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.step = self.shared = checkpoint["step"]
        self.seconds = checkpoint["seconds"]
        self.losses, self.val_losses = checkpoint["losses"], checkpoint["val_losses"]
        return True


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within, Ctrl-C sets the event, so that no step is cut in half; a second one interrupts at once."""
    interrupted = threading.Event()

    def handler(signum: int, frame: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def train(run: Run, train_data: Tensor, val_data: Tensor, path: Path, stop_at: int) -> bool:
    """Train up to step `stop_at`, then True, or to a Ctrl-C, then False; `path` holds a checkpoint of it."""
    evaluate_every = max(1, run.steps // EVALUATIONS)
    bar = tqdm(
        total=run.steps,
        initial=run.step,
        desc=f"{run.name:<10}",
        bar_format="{desc} {percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file needs no animation
        disable=not run.workers.is_first,
    )
    with bar, interruptible() as interrupted:
        start = time.perf_counter()
        stopping = False
        while run.step < stop_at and not stopping:
            run.train_step(train_data)
            # Workers stop after the same step.
            stopping = interrupted.is_set()
            if run.workers.count > 1:
                stopping = run.step % LOG_EVERY in (0, stop_at % LOG_EVERY) and run.workers.any(stopping)
            evaluating = run.step % evaluate_every == 0 or run.step == run.steps
            if run.step % LOG_EVERY == 0 or evaluating:
                # Only here does the CPU wait for the device, and only then is the clock right.
                run.share_losses()
                loss = run.losses[max(0, run.step - LOG_EVERY) : run.step].mean().item()
                now = time.perf_counter()
                run.seconds += now - start
                start = now
                bar.set_postfix_str(f"loss {loss:.3f}, {run.tokens_per_second:,.0f} tok/s", refresh=False)
            bar.update()
            if evaluating:
                run.val_losses.append((run.step, evaluate(run.model, val_data, run.preset)))
                run.save(path)
                start = time.perf_counter()
        run.seconds += time.perf_counter() - start
        run.save(path)
        return not stopping


# Results


def summary(run: Run) -> dict[str, Any]:
    val_loss = run.val_losses[-1][1]
    return {
        "lr": run.lr,
        "val_loss": val_loss,
        "bits_per_byte": val_loss / math.log(2),
        "tokens_per_second": run.tokens_per_second,
        "seconds": run.seconds,
        "state_bytes": run.state_bytes,
        "state_bytes_per_parameter": run.state_bytes / run.parameters,
    }


def print_table(summaries: dict[str, dict[str, Any]]) -> None:
    header = ("optimizer", "lr", "val loss", "bits/byte", "tokens/s", "seconds", "state MB", "state B/param")
    print("{:<12}{:>8}{:>10}{:>11}{:>11}{:>10}{:>10}{:>15}".format(*header))
    for name, s in summaries.items():
        print(
            f"{name:<12}{s['lr']:>8g}{s['val_loss']:>10.3f}{s['bits_per_byte']:>11.3f}"
            f"{s['tokens_per_second']:>11,.0f}{s['seconds']:>10.1f}"
            f"{s['state_bytes'] / 1e6:>10.2f}{s['state_bytes_per_parameter']:>15.2f}"
        )


def notes(config: dict[str, Any]) -> str:
    """What the table's columns are, and what its rates were searched for."""
    if config["lr"] is not None:
        rates = f"{config['optim']}'s was given, {BASELINE}'s searched for the preset small"
    elif config["vote"] == "off" and (config["preset"], config["steps"], config["data"]) == (
        "small",
        PRESETS["small"].steps,
        None,
    ):
        rates = "each searched for this run"
    else:
        rates = "searched for the preset small with its own steps and text and without votes, not for this run"
    return (
        "val loss: nats per byte on the last tenth of the text, lower is better; of one seed, so little differences\n"
        "          mean nothing. A token is a byte.\n"
        "state:    what the optimizer keeps beside weights and gradients.\n"
        f"lr:       {rates} (OPTIMIZERS in {Path(__file__).name} says how)."
    )


def plot(runs: list[Run], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # here, since it takes a second to import

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for run, color in zip(runs, ("tab:red", "tab:blue"), strict=False):
        width = max(1, run.steps // 50)
        smooth = run.losses.cpu().unfold(0, width, 1).mean(1)
        axes.plot(range(width, run.steps + 1), smooth, color=color, alpha=0.35, label=f"{run.name}, training")
        label = f"{run.name}, validation: {run.val_losses[-1][1]:.3f} at the end (lr {run.lr:g})"
        axes.plot(*zip(*run.val_losses, strict=True), "o-", color=color, markersize=4, label=label)
    # The first fall from log 256 is left out of the picture, so that the ends can be told apart.
    top = max(loss for run in runs for _, loss in run.val_losses)
    bottom, _ = axes.get_ylim()
    axes.set(xlabel="step", ylabel="loss, nats per byte; lower is better", xlim=(0, None), ylim=(bottom, top + 0.2))
    size, seed = f"{runs[0].parameters / 1e6:.2f}M parameters", runs[0].config["seed"]
    axes.set_title(f"A byte-level GPT of {size} on {corpus_name(runs[0].config)}, seed {seed}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def corpus_name(config: dict[str, Any]) -> str:
    return Path(config["data"]).name if config["data"] else "Python's standard library"


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


# Command line


def optimizer_name(text: str) -> str:
    names = {name.lower(): name for name in OPTIMIZERS}
    if text.lower() in names:
        return names[text.lower()]
    close = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0)
    raise argparse.ArgumentTypeError(
        f"unknown optimizer {text!r}: did you mean {names[close[0]]}? There are {', '.join(OPTIMIZERS)}"
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, not {text!r}")
    return int(text)


def text_file(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return str(Path(text).resolve())


def usable_device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use device {text!r}: {reason}") from None


def argument_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--optim", type=optimizer_name, metavar="NAME", help=f"{', '.join(OPTIMIZERS)}, in any case")
    add("--lr", type=float, help="learning rate of --optim (default: one that suits it)")
    add("--preset", choices=PRESETS, help="model, batch size and number of steps (default: small)")
    add("--steps", type=positive, metavar="N", help="training steps (default: the preset's)")
    add("--seed", type=int, help="of the weights, the batches and the sample (default: 0)")
    add("--data", type=text_file, metavar="FILE", help="text to learn (default: Python's standard library)")
    add("--device", type=usable_device, help="cpu, cuda, ... (default: cuda if there is one, else cpu)")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="where results go (default: runs/)")
    add("--parallel", choices=CHOICES, help="how torchrun's processes train one model (default: off)")
    add("--vote", choices=VOTES, help="what workers exchange with --parallel: votes, or mean gradients (default: off)")
    add("--resume", action="store_true", help="continue the run in --out, with its own options; workers may be others")
    add("--stop-at", type=positive, metavar="N", help="stop each training run at step N, to be resumed")
    return parser


def settle_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """All that decides the weights at the end: from the command line, or from the run to be resumed."""
    given = {key: getattr(args, key) for key in ("optim", "lr", "preset", "steps", "seed", "data", "parallel", "vote")}
    if args.resume:
        try:
            saved = json.loads((args.out / "results.json").read_text(encoding="utf-8"))["config"]
            config = {"parallel": "off", "vote": "off", **saved}  # as runs of earlier versions have it
        except FileNotFoundError:
            parser.error(f"there is no run to resume in {args.out}")
        for key, value in given.items():
            if value is not None and value != config[key]:
                began = config[key] or "the default"
                parser.error(f"--{key} {value}: the run to resume in {args.out} began with {began}")
        return config
    defaults = {"optim": "SignAdamPP", "preset": "small", "seed": 0, "parallel": "off", "vote": "off"}
    config = {key: defaults.get(key) if value is None else value for key, value in given.items()}
    config["steps"] = config["steps"] or PRESETS[config["preset"]].steps
    return config


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a model writes is not always what a terminal can show; and lines stay in order with the bar.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    torch.set_num_threads(min(torch.get_num_threads(), 4))  # a model this small gains nothing from more
    device = local_device(args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a help in debugging, and it takes time

    config = settle_config(parser, args)
    if (config["parallel"] != "off") != started_by_torchrun():
        parser.error("--parallel ddp or fsdp2 goes with torchrun, and torchrun with one of them")
    if config["vote"] != "off" and config["parallel"] == "off":
        parser.error("--vote is between workers: give --parallel ddp or fsdp2, under torchrun")
    corpus = read_corpus(Path(config["data"]) if config["data"] else None)
    digest = hashlib.sha256(corpus).hexdigest()
    if config.setdefault("data_sha256", digest) != digest:
        parser.error(f"{corpus_name(config)} has changed since the run in {args.out}: start anew")
    preset, name = PRESETS[config["preset"]], config["optim"]
    data = torch.frombuffer(bytearray(corpus), dtype=torch.uint8).to(device)
    train_data, val_data = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    if len(val_data) <= preset.model.block_size:
        parser.error(f"too little text: {len(corpus)} bytes, needed are over {10 * preset.model.block_size}")

    workers = Workers(config["parallel"], config["vote"], device)
    if preset.batch_size % workers.count:
        parser.error(f"{workers.count} workers cannot share batches of {preset.batch_size} evenly")
    tell = print if workers.is_first else (lambda *_: None)
    args.out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "signadam_ext": compiled.build_info()}
    results: dict[str, Any] = {"config": config, "versions": versions, "device": device.type, "workers": workers.count}
    if workers.is_first:
        write_json(args.out / "results.json", results)
    runs = [Run(each, config, device, workers) for each in dict.fromkeys((name, BASELINE))]
    sharing = f", {workers.count} workers with {config['parallel']}" if workers.count > 1 else ""
    voting = f"\nWorkers vote ({config['vote']}) on the gradients of {name}." if config["vote"] != "off" else ""
    tell(
        f"A byte-level GPT of {runs[0].parameters / 1e6:.2f}M parameters learns {corpus_name(config)} "
        f"({len(corpus) / 1e6:.1f} MB)\nin {config['steps']} steps of {preset.batch_size} x "
        f"{preset.model.block_size} bytes, seed {config['seed']}, on {device.type}{sharing}, torch {torch.__version__}."
        f"{voting}\n"
    )

    stop_at = min(args.stop_at or config["steps"], config["steps"])
    for run in runs:
        path = args.out / f"{run.name.lower()}.pt"
        if args.resume and run.load(path):
            tell(f"{run.name} continues after step {run.step}.")
        undisturbed = train(run, train_data, val_data, path, stop_at)
        if not undisturbed:
            break
    if any(run.step < run.steps for run in runs):
        torchrun = ["torchrun", "--nproc-per-node", str(workers.count)]
        command = [*(["python"] if config["parallel"] == "off" else torchrun), sys.argv[0], "--resume"]
        command += ["--out", str(args.out)] if args.out != Path("runs") else []
        tell(f"\nStopped, and saved in {args.out}. To continue: {shlex.join(command)}")
        workers.end()
        sys.exit(0 if undisturbed else 130)

    prompt = b"\n" if config["data"] else b"def "
    sample = prompt + runs[0].model.generate(prompt, 400, seed=config["seed"])
    results["sample"] = sample.decode(errors="replace")
    summaries = {run.name: summary(run) for run in runs}
    workers.end()
    if not workers.is_first:
        return
    print(f"\nA sample by the model that {name} trained:\n\n{results['sample'].strip()}\n")

    print_table(summaries)
    print(f"\n{notes(config)}")
    curves = {run.name: {"train_losses": run.losses.tolist(), "val_losses": run.val_losses} for run in runs}
    results["runs"] = {name: summaries[name] | curves[name] for name in summaries}
    write_json(args.out / "results.json", results)
    plot(runs, args.out / "curves.png")
    checkpoints = ", ".join(f"{run.name.lower()}.pt" for run in runs)
    print(f"\nIn {args.out}: curves.png, results.json, {checkpoints}")


if __name__ == "__main__":
    main()

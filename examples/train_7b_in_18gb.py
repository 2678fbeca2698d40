"""Train every parameter of a GPT with 7 billion of them, on a machine with 24 GiB of memory, in less than 18 GB.

python examples/train_7b_in_18gb.py                         30 steps of 128 bytes of Python's standard library
python examples/train_7b_in_18gb.py --resume --steps 60     go on, after Ctrl-C too, bit for bit
python examples/train_7b_in_18gb.py --device cuda           the same on a GPU, in its memory
python examples/train_7b_in_18gb.py --size 100m             a narrower model of the same depth, in minutes

Each parameter costs 2 bytes of bf16 weight and a quarter of a byte of 2-bit momentum. Nothing else grows with
their number: a gradient lives from its product to its update, inside the backward pass, and activations are
computed again where they are needed. The script adds up what that takes, trains, and fails (exit status 1)
when the process has at any time been larger.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import statistics
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

# OpenMP threads that wait for each other spin, and on a busy machine they spin away the time of the one they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Pages of 2 MB for large tensors: a third off the time of a weight gradient, which is new memory each time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

try:
    import torch
    from gpt import GPT, GPTConfig, rotary_table
    from torch import Tensor, nn
    from torch.utils.checkpoint import checkpoint
    from train_gpt import positive, read_corpus, usable_device, windows

    import signadam_ext
except ImportError as error:
    sys.exit(f'{error}\nIn the root of the repository, run: pip install ".[examples]"')

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last, so that an installed signadam_ext stays the one that is used
from reporting import machine  # noqa: E402

# The same depth at every width but the smallest, so that a small size says what learning rate suits a large one.
SIZES = {
    "tiny": GPTConfig(n_layer=4, n_head=2, n_embd=64, block_size=0),
    "100m": GPTConfig(n_layer=35, n_head=8, n_embd=512, block_size=0),
    "1b": GPTConfig(n_layer=35, n_head=25, n_embd=1600, block_size=0),
    "7b": GPTConfig(n_layer=35, n_head=32, n_embd=4096, block_size=0),
}
LIMIT = {"7b": 18_000_000_000}  # bytes; what the name of this file promises

# A step moves each weight of a matrix by up to lr, and so an output by up to lr times the number of inputs: divided by
# that number, what suits a small width suits a large one, if the logits begin small, at 1 / sqrt(width). The embedding
# and the scales of norms are not summed up. Chosen by a small search at width 256 and this depth.
LR = 0.01
LR_HEAD, LR_VECTORS = 50, 0.1  # times as large
EMBEDDING_STD = 1.0
BETA = 0.9
CHUNK = 1 << 20  # elements drawn or converted at a time: what they need beside the weights is not worth counting


# The model


def n_parameters(config: GPTConfig) -> int:
    n = config.n_embd
    return config.n_layer * (12 * n * n + 2 * n) + (2 * config.vocab_size + 1) * n


def initial_values(name: str, parameter: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of a contiguous parameter, each with the values that it begins with: functions of name, shape and seed."""
    # Not the built-in hash, which differs from one process to the next.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "big"))
    for part in parameter.detach().view(-1).split(CHUNK):
        if parameter.ndim == 1:
            values = torch.ones_like(part)  # scales of layer norms
        elif name.endswith("proj.weight"):
            # Every block begins as the identity, so the residual stream keeps its scale at any depth.
            values = torch.zeros_like(part)
        else:
            inputs = parameter.shape[1]
            std = {"embedding.weight": EMBEDDING_STD, "head.weight": 1 / inputs}.get(name, inputs**-0.5)
            bound = math.sqrt(3) * std  # uniform: quicker to draw than normal
            values = torch.empty(part.shape, device=part.device).uniform_(-bound, bound, generator=generator)
        yield part, values.to(part.dtype)


class CastProduct(torch.autograd.Function):
    """`x @ weight.T` in fp32 for a weight in bf16, some rows at a time: they stay in the cache for their product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = max(1, CHUNK // weight.shape[1])
        wide = x.float()
        return torch.cat([(wide @ part.float().T).to(x.dtype) for part in weight.split(rows)], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = max(1, CHUNK // weight.shape[1])
        wide = x.float().flatten(0, -2)
        grad_x, grad_weight = torch.zeros_like(wide), torch.empty_like(weight)
        parts = zip(grad.flatten(0, -2).split(rows, 1), weight.split(rows), grad_weight.split(rows), strict=True)
        for grad_part, part, grad_weight_part in parts:
            wide_grad = grad_part.float()
            grad_x.addmm_(wide_grad, part.float())
            grad_weight_part.copy_(wide_grad.T @ wide)
        return grad_x.view_as(x).to(x.dtype), grad_weight


def return_freed_memory() -> None:
    """Has glibc give back what is freed, instead of keeping it for later: 0.1 GB less at a billion parameters."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD: larger tensors are mapped, and unmapped, one by one


def native_products(device: torch.device) -> bool:
    """Whether products of bf16 matrices are fast here. On processors without instructions for them they are not."""
    if device.type != "cpu":
        return True
    x, weight = torch.ones(128, 1024, dtype=torch.bfloat16), torch.ones(4096, 1024, dtype=torch.bfloat16)
    seconds = {}
    for native, product in ((True, nn.functional.linear), (False, CastProduct.apply)):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            product(x, weight)
            times.append(time.perf_counter() - start)
        seconds[native] = min(times)
    return seconds[True] < seconds[False]


def build(config: GPTConfig, device: torch.device, seed: int, native: bool) -> GPT:
    """The model in bf16, of which there never is a copy in fp32."""
    with torch.device("meta"):
        model = GPT(config).to(torch.bfloat16)
    model.to_empty(device=device)
    model.cos, model.sin = (
        table.to(device) for table in rotary_table(config.block_size, config.n_embd // config.n_head)
    )
    for name, parameter in model.named_parameters():
        for part, values in initial_values(name, parameter, seed):
            part.copy_(values)
    for block in model.blocks:
        # There is no dropout, so there is no state of a random generator to keep.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if not native:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.forward = functools.partial(lambda linear, x: CastProduct.apply(x, linear.weight), module)
    return model


def moved(model: GPT, seed: int) -> dict[str, Any]:
    """The share of weights that are no longer what they began as: of all, and of each kind of tensor."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        count = counts.setdefault(re.sub(r"\d+", "*", name), [0, 0])
        for part, values in initial_values(name, parameter, seed):
            count[0] += int(torch.count_nonzero(part != values))
            count[1] += part.numel()
    shares = {name: changed / total for name, (changed, total) in counts.items()}
    return {"all": sum(c for c, _ in counts.values()) / sum(t for _, t in counts.values())} | shares


# Memory


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process ever had resident; on a GPU, in tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if match := re.search(r"VmHWM:\s*(\d+) kB", read_text("/proc/self/status")):
        return int(match[1]) * 1024
    # Not the first choice: on Linux this begins with the size of the process that started this one.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    match = re.search(r"MemAvailable:\s*(\d+) kB", read_text("/proc/meminfo"))
    return int(match[1]) * 1024 if match else None


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


def memory_needed(config: GPTConfig, fixed: int) -> dict[str, int]:
    """What training takes, in bytes, by what it is for; `fixed` is what the process takes without this model."""
    parameters, vector = n_parameters(config), 2 * config.block_size * config.n_embd
    largest = 2 * 4 * config.n_embd**2
    return {
        "fixed": fixed,
        "weights": 2 * parameters,
        "momentum": parameters // 4,
        # One that is computed, and once more for what the product needs beside it.
        "gradients": 2 * largest,
        # The input of every block, and all that one block, computed again, holds for its backward pass.
        "activations": vector * (config.n_layer + 48),
        # What is freed in small pieces is kept for later.
        "allocator": 64 << 20,
    }


# Training


class Run:
    """A model in training: everything that a checkpoint holds."""

    def __init__(self, options: dict[str, Any], data: Tensor) -> None:
        self.options, self.data = options, data
        self.config = replace(SIZES[options["size"]], block_size=options["tokens"])
        self.model = build(self.config, data.device, options["seed"], options["native_products"])
        groups = []
        for name, parameter in self.model.named_parameters():
            lr = options["lr"]
            if parameter.ndim == 1 or name == "embedding.weight":
                lr *= LR_VECTORS
            else:
                lr *= (LR_HEAD if name == "head.weight" else 1) / parameter.shape[1]
            groups.append({"params": [parameter], "lr": lr})
        self.optimizer = signadam_ext.SignAdamPP(
            groups,
            beta=BETA,
            state_dtype="int2",
            param_storage="stochastic",
            seed=options["seed"],
        )
        # From here on the backward pass is the step: each gradient is used, and freed, as soon as it is complete.
        signadam_ext.release_gradients(self.model, self.optimizer)
        self.step = 0

    def train_step(self) -> float:
        # The text is a function of the seed and the step alone, so a checkpoint needs no state of a random generator.
        generator = torch.Generator().manual_seed(self.options["seed"] * 1_000_003 + self.step)
        start = torch.randint(len(self.data) - self.config.block_size, (1,), generator=generator)
        loss = self.model(*windows(self.data, start, self.config.block_size))
        loss.backward()
        self.step += 1
        return loss.item()

    def save(self, folder: Path) -> None:
        """One tensor at a time, into a new folder that takes its name when it is complete."""
        complete, partial = folder / f"checkpoint-{self.step:06d}", folder / "checkpoint.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_weights(self.model, partial / "weights.safetensors")
        self.optimizer.save_state(partial / "optimizer")
        (partial / "run.json").write_text(json.dumps({"step": self.step, "options": self.options}), encoding="utf-8")
        previous = checkpoints(folder)
        if complete in previous:
            shutil.rmtree(complete)
        os.replace(partial, complete)
        for path in previous:
            if path != complete:
                shutil.rmtree(path)

    def load(self, path: Path) -> None:
        load_weights(self.model, path / "weights.safetensors")
        self.optimizer.load_state(path / "optimizer")
        self.step = read_run(path)["step"]


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-??????"))


def read_run(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text(encoding="utf-8"))


def bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def save_weights(model: nn.Module, path: Path) -> None:
    """In the format of safetensors: the length of a header, the header, the tensors one after another."""
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + parameter.nbytes
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for parameter in model.parameters():
            content = bytes_of(parameter.cpu())
            while content:  # the system writes 2 GB at a time at most
                content = content[file.write(content) :]
        os.fsync(file.fileno())


def load_weights(model: nn.Module, path: Path) -> None:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, parameter in model.named_parameters():
            assert header[name]["shape"] == list(parameter.shape), name
            file.seek(8 + length + header[name]["data_offsets"][0])
            # In place where it can be: a mapped file would count as resident memory.
            buffer = parameter.detach() if parameter.is_cpu else torch.empty_like(parameter, device="cpu")
            if file.readinto(bytes_of(buffer)) != parameter.nbytes:
                raise EOFError(f"{path} ends within {name}")
            parameter.detach().copy_(buffer)


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Within, Ctrl-C and SIGTERM set the event, so that no step is cut in half; a second Ctrl-C interrupts at once."""
    stopped = threading.Event()

    def handler(signum: int, frame: object) -> None:
        if stopped.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()
        print("Stopping after this step.")

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


# Results


def append(log: Path, record: dict[str, Any]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_log(log: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of starts, and of steps in order. A step that was repeated after a resumption counts once."""
    starts, steps = [], {}
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "step" in record:
            steps[record["step"]] = record
        elif "needed" in record:
            starts.append(record)
    return starts, [steps[step] for step in sorted(steps)]


def summary(log: Path, bound: int) -> dict[str, Any]:
    _, steps = read_log(log)
    losses = [record["loss"] for record in steps]
    return {
        "steps": len(steps),
        "loss_first_five": sum(losses[:5]) / len(losses[:5]),
        "loss_last_five": sum(losses[-5:]) / len(losses[-5:]),
        "seconds_median": statistics.median(record["seconds"] for record in steps),
        "seconds_min": min(record["seconds"] for record in steps),
        "cpu_seconds_median": statistics.median(record["cpu_seconds"] for record in steps),
        "peak_bytes": max(record["peak_bytes"] for record in steps),
        "bound_bytes": bound,
    }


def plot(log: Path, bound: int, path: Path) -> None:
    import matplotlib  # here, since it is memory that training does not need

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    starts, steps = read_log(log)
    needed, options = starts[-1]["needed"], starts[-1]["options"]
    x = [record["step"] for record in steps]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    left.plot(x, [record["loss"] for record in steps], "o-", color="tab:red", markersize=3)
    left.set(xlabel="step", ylabel="loss, nats per byte", title=f"{options['tokens']} bytes of text a step")
    shares = [[value / 1e9] * len(x) for value in needed.values()]
    right.stackplot(x, shares, labels=list(needed), alpha=0.45)
    right.plot(x, [record["peak_bytes"] / 1e9 for record in steps], "k", linewidth=2, label="measured peak")
    right.axhline(bound / 1e9, color="tab:red", linestyle="--", label=f"bound: {bound / 1e9:.3g} GB")
    right.set(xlabel="step", ylabel="GB", ylim=(0, None), title="Memory: what was counted on, and the peak")
    right.legend(loc="lower right", ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.margins(x=0.02)
    figure.suptitle(f"Every one of {starts[-1]['parameters'] / 1e9:.3g} billion parameters in training")
    figure.savefig(path, dpi=150)


# Command line


def learning_rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return value


def argument_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    sizes = ", ".join(f"{name} ({n_parameters(config):,})" for name, config in SIZES.items())
    add("--size", choices=SIZES, help=f"parameters: {sizes}; default: 7b")
    add("--steps", type=positive, metavar="N", help="training steps in all (default: 30)")
    add("--tokens", type=positive, metavar="N", help="bytes of text in each step (default: 128)")
    add("--lr", type=learning_rate, help=f"learning rate of a block's matrices, times their inputs (default: {LR})")
    add("--seed", type=int, help="of the weights, the text and the rounding (default: 0)")
    add("--products", choices=("native", "fp32"), help="of bf16 matrices on the CPU (default: what is faster)")
    add("--device", type=usable_device, default=torch.device("cpu"), help="cpu (default), cuda, ...")
    add("--out", type=Path, default=Path("runs/7b"), metavar="DIR", help="where checkpoints go (default: runs/7b)")
    add("--log", type=Path, metavar="FILE", help="one line of JSON a step, a picture beside it (default: in --out)")
    add("--save-every", type=positive, default=10, metavar="N", help="steps between checkpoints (default: 10)")
    add("--resume", action="store_true", help="continue the run in --out, with its own options")
    return parser


def settle_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """All that decides a weight: from the command line, or from the run to be resumed. Further steps are no change."""
    given = {key: getattr(args, key) for key in ("size", "tokens", "lr", "seed")}
    given["native_products"] = None if args.products is None else args.products == "native"
    saved = checkpoints(args.out)
    if args.resume:
        if not saved:
            parser.error(f"there is no checkpoint to resume in {args.out}")
        options = read_run(saved[-1])["options"]
        for key, value in given.items():
            if value is not None and value != options[key]:
                parser.error(f"{key} {value}: the run to resume in {args.out} began with {options[key]}")
        return options
    if saved:
        parser.error(f"there is a run in {args.out}: continue it with --resume, or choose another --out")
    defaults = {"size": "7b", "tokens": 128, "lr": LR, "seed": 0}
    options = {key: defaults.get(key) if value is None else value for key, value in given.items()}
    if options["native_products"] is None:
        options["native_products"] = native_products(args.device)
    return options


def train(run: Run, log: Path, args: argparse.Namespace) -> bool:
    """Up to the last step, then True, or to a signal, then False. There is a checkpoint then."""
    with stopped_by_signals() as stopped:
        while run.step < args.steps and not stopped.is_set():
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = run.train_step()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            peak = peak_memory(run.data.device)
            # Processor time, of all threads together, says what a step takes where other programs run as well.
            times = {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)}
            append(log, {"step": run.step, "loss": loss} | times | {"peak_bytes": peak})
            print(f"step {run.step:4d}   loss {loss:.3f}   {seconds:7.2f} s   peak {peak / 1e9:.3f} GB")
            if run.step % args.save_every == 0 or run.step == args.steps or stopped.is_set():
                run.save(args.out)
        return not stopped.is_set()


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    if args.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    options = settle_options(parser, args)
    args.steps = args.steps or 30
    corpus = read_corpus(None)
    digest = hashlib.sha256(corpus).hexdigest()
    if options.setdefault("data_sha256", digest) != digest:
        parser.error(f"Python's standard library has changed since the run in {args.out}: start anew")
    data = torch.frombuffer(bytearray(corpus), dtype=torch.uint8).to(args.device)
    del corpus

    # What the libraries take, with their threads and the code that they make at run time: all that does not
    # depend on the size. Measured, after the same steps with a model that is negligible beside it.
    facts = machine.facts()
    return_freed_memory()
    Run(options | {"size": "tiny"}, data).train_step()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    fixed = peak_memory(args.device)

    config = replace(SIZES[options["size"]], block_size=options["tokens"])
    needed = memory_needed(config, fixed)
    bound = min(sum(needed.values()), LIMIT.get(options["size"], sys.maxsize))
    free = available_memory(args.device)
    if free is not None and sum(needed.values()) - fixed > free:
        sys.exit(f"{(sum(needed.values()) - fixed) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.")

    log = args.log or args.out / "log.jsonl"
    for folder in (args.out, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        log.unlink(missing_ok=True)
    parameters = n_parameters(config)
    start: dict[str, Any] = {"parameters": parameters, "options": options, "device": str(args.device)}
    append(log, start | {"needed": needed, "bound_bytes": bound} | facts)
    print(
        f"{parameters:,} parameters ({config.n_layer} layers of width {config.n_embd}) on {args.device}, "
        f"{'native' if options['native_products'] else 'fp32'} products, lr {options['lr']:.3g}\n"
        f"Memory, in GB: {', '.join(f'{name} {value / 1e9:.3f}' for name, value in needed.items())}; "
        f"bound {bound / 1e9:.3f}"
    )

    run = Run(options, data)
    assert sum(p.numel() for p in run.model.parameters()) == parameters
    if args.resume:
        run.load(checkpoints(args.out)[-1])
        print(f"Continues after step {run.step}.")
    undisturbed = train(run, log, args)
    if not undisturbed:
        command = ["python", sys.argv[0], "--resume", "--steps", str(args.steps), "--out", str(args.out)]
        command += ["--log", str(args.log)] if args.log else []
        print(f"\nStopped and saved. To continue: {shlex.join(command)}")
        sys.exit(130)

    result = summary(log, bound) | {"moved": moved(run.model, options["seed"])}
    result["peak_bytes"] = max(result["peak_bytes"], peak_memory(args.device))
    append(log, {"result": result})
    plot(log, bound, log.with_suffix(".png"))
    print(
        f"\nloss: {result['loss_first_five']:.3f} (first five steps), {result['loss_last_five']:.3f} (last five)\n"
        f"seconds a step: {result['seconds_median']:.2f} (median)\n"
        f"weights that have moved: {result['moved']['all']:.1%}\n"
        f"peak memory: {result['peak_bytes'] / 1e9:.3f} GB, bound {bound / 1e9:.3f} GB\n"
        f"In {log.parent}: {log.name}, {log.with_suffix('.png').name}"
    )
    if result["peak_bytes"] > bound:
        sys.exit(f"The peak of {result['peak_bytes']:,} bytes exceeds the bound of {bound:,} bytes.")


if __name__ == "__main__":
    main()

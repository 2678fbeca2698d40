"""The command ``signadam``, or ``python -m signadam_ext``.

``signadam info`` tells what was built and what can be used here, ``signadam memory`` the bytes that training keeps.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

import torch

from . import backends, memory
from ._version import __version__
from .core.native import compiled as _C
from .core.options import BACKENDS
from .engine import gradients


def report() -> str:
    """The report as text, one fact a line."""
    build = _C.build_info()
    lines: list[tuple[str, str]] = [("signadam_ext", __version__)]
    if build["version"] != __version__:
        lines.append(
            ("", f"the compiled module is of version {build['version']}: build it again with `pip install -e .`")
        )
    cuda = (
        f"{build['cuda']} for {build['cuda_architectures'].replace('+', ', ')}"
        if build["cuda"]
        else "not built (no nvcc, or SIGNADAM_CUDA=0)"
    )
    lines += [
        ("commit", build["commit"]),
        ("module", str(_C.__file__)),
        ("compiler", f"{build['compiler']}; built for Python {build['python']}"),
        ("CUDA", cuda),
        (
            "CPU",
            f"{platform.machine()}, {_C.cpu_capability()} kernels, {torch.get_num_threads()} threads",
        ),
        ("Python", sys.version.split()[0]),
        ("torch", f"{torch.__version__} ({_torch_device_support()})"),
        ("triton", _version_of("triton")),
        ("reader", gradients.kind()),
    ]
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        label = "cpu" if device.type == "cpu" else f"{device}: {torch.cuda.get_device_name(device)}"
        lines.append(("device", label))
        for name in BACKENDS:
            reason = backends.get(name).unusable(device)
            lines.append((f"  {name}", "usable" if reason is None else f"not usable: {reason}"))
    if len(devices) == 1:
        reason = backends.get("cuda").unusable(None) or _C.cuda_unusable_reason(0) or "the module could use one"
        lines.append(("device", f"no CUDA device: torch sees none; {reason}"))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)


def _torch_device_support() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"


def _version_of(package: str) -> str:
    try:
        return str(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="signadam", description="Sign-based optimizers for PyTorch.")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("info", help="what was built, and what can be used here (without a command, too)")
    about = "bytes per parameter, GB and GiB that a model and its optimizer keep in memory, beside AdamW's"
    calculator = commands.add_parser("memory", help=about, description=about)
    memory.add_arguments(calculator)
    options = parser.parse_args(arguments)
    if options.command in (None, "info"):
        text = report()
    else:
        try:
            text = memory.table(options)
        except (TypeError, ValueError) as error:
            calculator.error(str(error))
    try:
        print(text, flush=True)
    except BrokenPipeError:  # of `signadam info | head`; Python writes what is left once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()

"""What bench and tests read from machine code alike: which tool lists it, and what a kernel's symbol says."""

import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

#: The enum classes of csrc/block/block.h, in order: a symbol has their numbers.
THRESHOLD_PASSES = ("none", "same_pass", "pass_before")
#: Tensors of a table: fp32 moments and parameters rounded to nearest, or any storage form; or that, with statistics().
STORAGES = ("plain", "any", "with_statistics")


class KernelName(NamedTuple):
    """Which of the kernels in csrc/cuda/step.cu: the functor of its rule, by its name in csrc/core/rules.h."""

    functor: str
    threshold_pass: str
    storage: str


def kernel_name(symbol: str) -> KernelName | None:
    """What the mangled name of a kernel says, or None where it is no kernel of csrc/cuda/step.cu."""
    found = re.search(r"6kernelINS_\d+(\w+?)ELNS_13ThresholdPassE(\d)ELNS_7StorageE(\d)E", symbol)
    return None if found is None else KernelName(found[1], THRESHOLD_PASSES[int(found[2])], STORAGES[int(found[3])])


class VoteKernelName(NamedTuple):
    """Which of the kernels in csrc/cuda/vote.cu: its pass, and what its template is given, in order, as numbers."""

    vote_pass: str  # "cast", "count" or "read"
    arguments: tuple[int, ...]


def vote_kernel_name(symbol: str) -> VoteKernelName | None:
    """What the mangled name of a kernel says, or None where it is no kernel of csrc/cuda/vote.cu."""
    argument = r"L(?:NS_\d+\w+?E|[bi])(\d+)E"
    found = re.search(rf"1[12](cast|count|read)_kernelI((?:{argument})+)E", symbol)
    return found and VoteKernelName(found[1], tuple(map(int, re.findall(argument, found[2]))))


def find_cuobjdump() -> str | None:
    """The lister of machine code: of the CUDA toolkit, or the one in Triton's wheel for Linux on x86-64."""
    candidates = [shutil.which("cuobjdump")]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates += [str(Path(home, "bin", "cuobjdump")) for home in homes]
    # Asked for without importing triton, which would fix whether its interpreter is used.
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((path for path in candidates if path is not None and os.access(path, os.X_OK)), None)

"""What bench and tests read from machine code alike: which tool lists it, and what a kernel's symbol says."""

import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from signadam_ext.core.native import compiled as _C

#: The enum classes of csrc/block/forms.h, in order: a symbol has their numbers.
THRESHOLD_PASSES = ("none", "same_pass", "pass_before")
#: Tensors of a table: fp32 moments and parameters rounded to nearest, or any storage form; or that, with statistics().
STORAGES = ("plain", "any", "with_statistics")


class Forms(NamedTuple):
    """Which dtypes and storage forms a kernel is compiled for, by their names."""

    param: str
    grad: str
    exp_avg: str
    exp_avg_sq: str
    param_storage: str


class KernelName(NamedTuple):
    """Which of the kernels in csrc/cuda/kernel.h: its rule by the functor in csrc/core/rules.h, or AnyRule.

    ``forms`` are those of a kernel for just these, from csrc/cuda/instances.h, and None of one for any. ``is_scaled``:
    of such a kernel, whether its steps are multiplied by a number of the tensor's.
    """

    functor: str
    threshold_pass: str
    storage: str
    forms: Forms | None = None
    is_scaled: bool = False

    @property
    def rule(self) -> str:
        """As the module names it."""
        return f"Scaled<{self.functor}>" if self.is_scaled else self.functor


def kernel_name(symbol: str) -> KernelName | None:
    """What the mangled name of a kernel says, or None where it is no kernel of csrc/cuda/kernel.h."""
    rule = r"(6ScaledINS_)?\d+(\w+?)(?:E|EEE)"
    found = re.search(rf"6kernelINS_{rule}LNS_13ThresholdPassE(\d)ELNS_7StorageE(\d)ENS_(\w+)", symbol)
    if found is None:
        return None
    number = r"LS\w*?_(\d)E"  # of an enum that is named before it
    fixed = rf"10FixedFormsILNS_6FormatE(\d)E{3 * number}LNS_12ParamStorageE(\d)E"
    forms = re.match(fixed, found[5])
    return KernelName(
        *(found[2], THRESHOLD_PASSES[int(found[3])], STORAGES[int(found[4])]),
        None if forms is None else forms_of(tuple(map(int, forms.groups()))),
        found[1] is not None,
    )


def kernel_label(kernel: KernelName) -> str:
    """In words, with what goes without saying left out."""
    words = [kernel.rule, *(word for word in kernel[1:3] if word not in ("none", "plain", "any"))]
    if kernel.forms is not None:
        param, _, *others = kernel.forms
        words += [param, *(word for word in others if word not in ("fp32", "nearest"))]
    return "-".join(words + ([] if kernel.forms else ["any"] * (kernel.storage != "plain")))


def forms_of(numbers: tuple[int, ...]) -> Forms:
    """By the numbers that csrc/core/formats.h gives them."""
    formats, storages = tuple(_C.FORMATS), tuple(_C.PARAM_STORAGES)
    return Forms(*(formats[number] for number in numbers[:-1]), storages[numbers[-1]])


class VoteKernelName(NamedTuple):
    """Which of the kernels in csrc/cuda/vote.cu: its pass, and what its template is given, in order, as numbers."""

    vote_pass: str  # "cast", "count" or "read"
    arguments: tuple[int, ...]


def vote_kernel_name(symbol: str) -> VoteKernelName | None:
    """What the mangled name of a kernel says, or None where it is no kernel of csrc/cuda/vote.cu."""
    argument = r"L(?:NS_\d+\w+?E|[bi])(\d+)E"
    found = re.search(rf"1[12](cast|count|read)_kernelI((?:{argument})+)E", symbol)
    return found and VoteKernelName(found[1], tuple(map(int, re.findall(argument, found[2]))))


class BeginKernelName(NamedTuple):
    """Which of the kernels in csrc/cuda/device_step.cu, which begin a step on the device."""

    part: str  # "norm" or "begin"


def begin_kernel_name(symbol: str) -> BeginKernelName | None:
    """What the mangled name of a kernel says, or None where it is no kernel of csrc/cuda/device_step.cu."""
    found = re.search(r"1[12](norm|begin)_kernelE", symbol)
    return found and BeginKernelName(found[1])


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

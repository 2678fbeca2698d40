"""The compiled module, see csrc/python/bindings.cpp. Addresses are of this process or of a device, as Python integers.

Import it through :mod:`signadam_ext.core.native`, which says what to do where there is none.
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import Tensor

#: Names of the rules, of their scalars, and of what statistics gather of a chunk, in the order of kernels.
RULES: tuple[str, ...]
SCALARS: tuple[str, ...]
CHUNK_STATISTICS: tuple[str, ...]
#: Operations of a program that makes scalars, in the order of their numbers, and the registers of one.
OPERATIONS: tuple[str, ...]
PROGRAM_REGISTERS: int
#: (number in tables and kernels, bits of an element) of each format.
FORMATS: dict[str, tuple[int, int]]
#: Number in kernels of each way to store a parameter.
PARAM_STORAGES: dict[str, int]
#: Elements of a run of codes; lanes and rows of a chunk; elements of a chunk.
RUN: int
LANES: int
ROWS: int
CHUNK_SIZE: int
LEAST_SCALE: float

#: What holds for one tensor of a vote; entries of a chunk of a vote; codes of a word.
VOTE_SCALARS: tuple[str, ...]
VOTE_CHUNK: int
CODES_PER_WORD: int

class ThresholdPass:
    NONE: ThresholdPass
    SAME_PASS: ThresholdPass
    PASS_BEFORE: ThresholdPass
    def __init__(self, value: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Scaling:
    NONE: Scaling
    NORM: Scaling
    STEPS: Scaling
    def __init__(self, value: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

def build_info() -> dict[str, Any]: ...
def cpu_capability() -> str: ...
def advise_huge_pages(address: int, size: int) -> None: ...
def step_layout(tensors: int, scalar_sets: int) -> list[int]: ...

class TorchShim:
    """torch's C interface, and where its objects keep what a step compares.

    Raises:
        RuntimeError: this torch has not what is needed.
    """

    def __init__(self, library: str, tensor_type: type, samples: list[Tensor]) -> None: ...
    @property
    def recognises(self) -> bool: ...
    @property
    def counts_versions(self) -> bool: ...
    @property
    def knows_negation(self) -> bool: ...

class GradientReader:
    """See :class:`signadam_ext.engine.gradients.GradientReader`."""

    def __init__(self, shim: TorchShim, /) -> None: ...
    def watch(
        self,
        group: int,
        param: Tensor | None,
        grad_strides: tuple[int, ...],
        grad_like: Tensor,
        state: tuple[tuple[str, Tensor], ...],
        spec: Any,
        counts_there: bool,
    ) -> None: ...
    def read(self, param_groups: Sequence[Any], state: Any) -> list[int] | None: ...
    def unchanged(self) -> bool: ...
    def replace(self, index: int, address: int) -> None: ...
    def held(self, index: int) -> tuple[Any, ...]: ...
    def addresses(self) -> list[int]: ...
    def release(self) -> None: ...

def ordered_sum(x: Sequence[float]) -> float: ...

class CpuLaunch:
    """A step of a table on the CPU, as an operation of :func:`commit`."""

class Table:
    """The tensors of one launch, and each step's gradients, step counts and random bits."""

    def __init__(self, scalars_by_step: bool) -> None: ...
    def __len__(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    def add(
        self,
        *,
        param: int,
        residual: int,
        exp_avg: int,
        exp_avg_sq: int,
        aux: int,
        threshold_state: int,
        step: int,
        step_is_double: bool,
        numel: int,
        shard_offset: int,
        param_format: int,
        grad_format: int,
        exp_avg_format: int,
        exp_avg_sq_format: int,
        aux_format: int,
        param_storage: int,
        group: int,
        index: int,
        seed: int,
        param_id: int,
        shard_runs: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> None: ...
    def finish(self, sums: bool) -> None: ...
    @overload
    def begin(self, reader: GradientReader, /) -> list[tuple[int, int]]: ...
    @overload
    def begin(self, addresses: Sequence[int], /) -> list[tuple[int, int]]: ...
    def commit(self) -> None: ...
    def grads(self) -> list[bool]: ...
    def scalar_indices(self) -> list[int]: ...
    def squares(self, threads: int) -> list[float]: ...
    def chunk_bytes(self) -> bytes: ...
    def device_bytes(self) -> bytes: ...
    def write_step(self, scalars: Sequence[Sequence[float]], address: int) -> None: ...
    def cpu_launch(
        self,
        rule: int,
        threshold_pass: ThresholdPass,
        scalars: Sequence[Sequence[float]],
        threads: int,
        chunk_statistics: int,
    ) -> CpuLaunch: ...
    # Of a module that was built with CUDA:
    def cuda_step_bytes(self, scalar_sets: int) -> int: ...
    def cuda_inline_capacity(
        self, rule: int, threshold_pass: ThresholdPass, scaling: Scaling, with_statistics: bool
    ) -> int: ...
    def write_cuda_step(self, scalars: Sequence[Sequence[float]], address: int) -> None: ...
    def launch_cuda(
        self,
        rule: int,
        threshold_pass: ThresholdPass,
        scaling: Scaling,
        scalars: Sequence[Sequence[float]] | None,
        *,
        device_table: int,
        sums: int,
        arrivals: int,
        chunk_statistics: int,
        device_step: int,
        device: int,
        stream: int,
    ) -> None: ...
    def cuda_device_step_bytes(self) -> int: ...
    def launch_cuda_norm(
        self,
        *,
        device_table: int,
        grads: int,
        sums: int,
        arrivals: int,
        totals: int,
        places: int,
        device: int,
        stream: int,
    ) -> None: ...
    def launch_cuda_begin(
        self,
        *,
        entries: int,
        programs: int,
        results: int,
        values: int,
        control: int,
        grads: int,
        step: int,
        program_length: int,
        row_length: int,
        device: int,
        stream: int,
    ) -> None: ...

def commit(
    operations: list[Any],
    tables: list[Table],
    states: list[tuple[Any, ...]],
    written: GradientReader | list[Tensor],
    increment_version: Callable[..., Any],
    guards: list[Any],
) -> None: ...

# Of a module that was built with CUDA:
def cuda_runtime_version() -> int: ...
def cuda_unusable_reason(device: int) -> str: ...
def cuda_kernel_info(device: int, /) -> list[dict[str, Any]]: ...

class VoteMemory:
    NONE: VoteMemory
    GRADIENTS: VoteMemory
    GATED_SIGNS: VoteMemory
    def __init__(self, value: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class VoteUse:
    WRITE: VoteUse
    STEP: VoteUse
    STEP_STOCHASTIC: VoteUse
    def __init__(self, value: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

def cast_votes(
    *,
    entries: int,
    entry_of_chunk: int,
    chunks: int,
    scalars: int,
    memory: VoteMemory,
    residual: bool,
    maximize: bool,
    abstains: bool,
    format: int,
    codes: int,
    threads: int,
) -> None: ...
def count_votes(
    *, codes: int, workers: int, words: int, bits: int, majority: bool, result: int, threads: int
) -> None: ...
def read_votes(
    *,
    entries: int,
    entry_of_chunk: int,
    chunks: int,
    scalars: int,
    keys: int,
    use: VoteUse,
    format: int,
    bits: int,
    divisor: float,
    result: int,
    threads: int,
) -> None: ...

# Of a module that was built with CUDA:
def cuda_cast_votes(
    *,
    entries: int,
    entry_of_chunk: int,
    chunks: int,
    scalars: int,
    memory: VoteMemory,
    residual: bool,
    maximize: bool,
    abstains: bool,
    format: int,
    codes: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_count_votes(
    *, codes: int, workers: int, words: int, bits: int, majority: bool, result: int, device: int, stream: int
) -> None: ...
def cuda_read_votes(
    *,
    entries: int,
    entry_of_chunk: int,
    chunks: int,
    scalars: int,
    keys: int,
    use: VoteUse,
    format: int,
    bits: int,
    divisor: float,
    result: int,
    device: int,
    stream: int,
) -> None: ...

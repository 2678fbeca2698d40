"""The host side of the CUDA launch over a runtime that is not there: contexts, errors, where step data goes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.toolchain import QUICK, ROOT, cuda_launch_library

NOT_READY = 600
INVALID = 1


@pytest.fixture(scope="module")
def library(built_once: Callable[..., Path], thorough: bool) -> ctypes.CDLL:
    return cuda_launch_library(built_once, *(() if thorough else QUICK))


def launch(library: ctypes.CDLL, device: int, step: bytes = b"step", device_step: int = 0) -> str:
    """What went wrong, or nothing."""
    message = ctypes.create_string_buffer(200)
    failed = library.launch_step(
        *(step, ctypes.c_int64(len(step)), ctypes.c_void_p(device_step), device, message, ctypes.c_int64(200))
    )
    return message.value.decode() if failed else ""


def test_no_context_where_nobody_works(library: ctypes.CDLL) -> None:
    # A process of one of eight ranks: its tensors lie on device 1, the current one is 0, which it never uses.
    library.begin(0b10, -1, 0, 0)
    for _ in range(3):
        assert launch(library, 1) == ""
        assert library.launched_on() == 1
        assert (library.contexts(), library.context()) == (0b10, -1)


def test_usable_asks_one_device(library: ctypes.CDLL) -> None:
    library.begin(0, -1, 0, 0)
    assert library.is_usable(1)
    assert (library.contexts(), library.context()) == (0b10, -1)


@pytest.mark.parametrize("current", [0, 1])
def test_current_context_stays(library: ctypes.CDLL, current: int) -> None:
    library.begin(0b11, current, 0, 0)
    for device in (0, 1):
        assert launch(library, device) == ""
        assert library.launched_on() == device
        assert library.context() == current


def test_nothing_is_selected_that_is_current(library: ctypes.CDLL) -> None:
    library.begin(0b11, 1, 0, 0)
    assert launch(library, 1) == ""
    assert library.selections() == 0


def test_stale_error_is_not_this_launch(library: ctypes.CDLL) -> None:
    library.begin(0b1, 0, NOT_READY, 0)
    assert launch(library, 0) == ""
    assert library.launches() == 1


def test_failed_launch_is_reported_once(library: ctypes.CDLL) -> None:
    library.begin(0b1, 0, 0, INVALID)
    assert launch(library, 0) == "CUDA failed to launch the update: invalid argument"
    assert (library.launches(), library.last_error()) == (0, 0)


def test_unknown_device_leaves_no_error(library: ctypes.CDLL) -> None:
    library.begin(0b1, 0, 0, 0)
    message = ctypes.create_string_buffer(200)
    assert library.read_kernel_info(7, message, ctypes.c_int64(200))
    assert message.value == b"CUDA failed to select the device: invalid device ordinal"
    assert (library.last_error(), library.context(), library.contexts()) == (0, 0, 0b1)
    assert launch(library, 7) != ""
    assert launch(library, 0) == ""


def test_step_data_travels_inline_where_it_fits(library: ctypes.CDLL) -> None:
    library.begin(0b1, 0, 0, 0)
    full = bytes(i % 251 for i in range(library.capacity()))
    for step in (full[:1], full[:4000], full):
        assert launch(library, 0, step) == ""
        assert library.launched_step() is None
        assert ctypes.string_at(library.launched_bytes(), len(step)) == step
    assert "does not fit" in launch(library, 0, full + b"x")
    assert launch(library, 0, full + b"x", device_step=0x7000) == ""
    assert library.launched_step() == 0x7000


def test_torch_makes_the_copies() -> None:
    """A copy of its own would be unknown to torch's allocator of pinned memory, which gives that memory away then."""
    for source in (ROOT / "csrc").rglob("*"):
        if source.is_file():
            assert not re.search(r"cuda(Memcpy|Malloc|HostAlloc|Free)", Path(source).read_text()), source

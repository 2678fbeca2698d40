"""Ways to make a call fail at a chosen place: an exception of a signal handler, or an allocation that is refused."""

from __future__ import annotations

import dis
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Interrupted(BaseException):
    """What the signal handlers raise, beside KeyboardInterrupt."""


# Python looks for signals after calls into C, at the start of functions and where loops go back.
_LOOKS = {
    code
    for name, code in dis.opmap.items()
    if name.startswith(("CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD")) or name == "RESUME"
}


class AtPoint:
    """Raises :class:`Interrupted` at the n-th place at which Python looks for signals; the same one in every run."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.points = 0
        self.where = ""
        self._codes: dict[CodeType, bytes] = {}
        self._entered: set[int] = set()

    def __enter__(self) -> AtPoint:
        # What the garbage collector calls is no part of the call, and may be the test runner's.
        self._collects = gc.isenabled()
        gc.disable()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)
        if self._collects:
            gc.enable()

    def _point(self, frame: FrameType) -> None:
        self.points += 1
        self.left -= 1
        if self.left == 0:
            self.where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
            raise Interrupted(self.where)

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code.co_filename.endswith("fuzzer_failures.py"):
            return None
        if code not in self._codes:
            self._codes[code] = code.co_code
        bytecode, previous = self._codes[code], -1
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        # A call from Python to Python is none into C: its return is no place.
        self._entered.add(id(frame.f_back))

        def on_opcode(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal previous
            if event == "opcode":
                if previous in _LOOKS and id(frame) not in self._entered:
                    self._point(frame)
                self._entered.discard(id(frame))
                previous = bytecode[frame.f_lasti]
            return on_opcode

        self._point(frame)
        return on_opcode


def at_point(call: Callable[[], Any], n: int) -> tuple[str | None, int]:
    """Calls; returns where it was interrupted, if it was, and how many places there were."""
    mode = AtPoint(n)
    try:
        try:
            with mode:
                call()
        finally:
            sys.settrace(None)
    except Interrupted:
        return mode.where, mode.points
    finally:
        _torch_as_it_was()
    return None, mode.points


def by_timer(call: Callable[[], Any], delay: float, kind: str) -> str | None:
    """Calls, and has a signal arrive after ``delay`` seconds; returns its kind if it was raised."""

    def handler(*_: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    try:
        try:
            if kind == "SIGINT":
                timer.start()
            else:
                signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
            call()
            time.sleep(0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            timer.cancel()
            if timer.is_alive():
                timer.join()
        time.sleep(0)
    except (Interrupted, KeyboardInterrupt):
        if timer.is_alive():
            timer.join()
        return kind
    finally:
        signal.signal(signal.SIGALRM, before)
        _torch_as_it_was()
    return None


def _torch_as_it_was() -> None:
    # Torch's own context managers may have been interrupted on their way out.
    torch.set_grad_enabled(True)


class OutOfMemory(TorchDispatchMode):
    """The n-th operation that makes a tensor fails."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n
        self.allocations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.returns and not any(x.alias_info for x in func._schema.returns):
            self.allocations += 1
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("not enough memory")
        return func(*args, **(kwargs or {}))


def out_of_memory(call: Callable[[], Any], n: int) -> tuple[str | None, int]:
    """Calls; returns what failed, if it did, and how many allocations there were."""
    mode = OutOfMemory(n)
    try:
        with mode:
            call()
    except RuntimeError as error:
        if "not enough memory" not in str(error):
            raise
        return f"allocation {n}", mode.allocations
    return None, mode.allocations


class StepsInside(TorchDispatchMode):
    """Calls ``step`` within the n-th operation, which must raise; the operation then goes on."""

    def __init__(self, n: int, step: Callable[[], Any]) -> None:
        super().__init__()
        self.left = n
        self.step = step
        self.outcome: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= func.namespace != "profiler"  # which torch calls around a step
        if self.left == 0:
            self.left -= 1
            try:
                self.step()
                self.outcome = "no error"
            except RuntimeError as error:
                self.outcome = f"refused: {error}"
        return func(*args, **(kwargs or {}))

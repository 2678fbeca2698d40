"""Steps of one optimizer exclude each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class StepLock:
    """Lets one step of an optimizer run at a time.

    Use::

        lock.refuse_nested()
        with lock.held:
            ...

    The ``with`` statement is that of the standard library's lock, so that no signal handler finds it taken and not yet
    guarded.
    """

    def __init__(self) -> None:
        self.held = threading.RLock()
        self._user_code = False

    def refuse_nested(self) -> None:
        """Raises inside a step; a step on another thread is waited for by ``with lock.held``.

        Raises:
            RuntimeError: this thread is in a step, or another one is and runs a function of the user's, which may wait
                for this thread.
        """
        if self.held._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError("a step of this optimizer was begun inside another one, by a function that step() calls")
        self.refuse_waiting(
            "a step of this optimizer was begun while another one runs a confidence function: does that function run a "
            "backward that takes steps?"
        )

    def refuse_waiting(self, why: str) -> None:
        """Raises where another thread is in a step and runs a function of the user's, which may wait for this thread.

        Raises:
            RuntimeError: says why.
        """
        if self._user_code and not self._is_free():
            raise RuntimeError(why)

    def _is_free(self) -> bool:
        free = self.held.acquire(blocking=False)
        if free:
            self.held.release()
        return free

    @contextlib.contextmanager
    def runs_user_code(self) -> Iterator[None]:
        """While a function of the user's runs inside a step: whoever comes then is refused, not made to wait."""
        self._user_code = True
        try:
            yield
        finally:
            self._user_code = False

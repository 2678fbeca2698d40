"""A thread that does jobs in the order in which they were given, and tells of each by a future."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch


class InOrder:
    """One thread, made at the first job. It does not keep the process from ending.

    A collective that is started from the callback of another waits for ever on gloo, whose threads run the callbacks.
    Here nothing is chained: the thread waits for each, and backward goes on meanwhile.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], torch.futures.Future[Any], int]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], Any]) -> torch.futures.Future[Any]:
        """The future of what ``job`` returns or raises."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="signadam_ext votes", daemon=True)
            self._thread.start()
        future: torch.futures.Future[Any] = torch.futures.Future()
        self._jobs.put((job, future, torch.get_num_threads()))
        return future

    def _work(self) -> None:
        while True:
            job, future, threads = self._jobs.get()
            # A new thread begins with as many as the machine has, whatever the process was told.
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # which a future does not take
                future.set_exception(RuntimeError(repr(error)))
            del job, future  # which hold on to gradients

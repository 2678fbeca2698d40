"""Processes that stay and run functions together, with a gloo group: what a test of distributed training needs."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

IS_2_6 = torch.__version__.startswith("2.6.")
#: Of tests that train with FSDP2, whose ranks are processes on the CPU.
with_fsdp2 = pytest.mark.skipif(IS_2_6, reason="torch 2.6's FSDP2 asks the CPU for events, which it does not have")
#: Seconds after which a call that has not ended is taken for a deadlock.
PATIENCE = 240


class Ranks:
    """``count`` processes with one default group. A call that fails ends them; the next one starts new ones.

    ``environment`` holds in them from before anything is imported.
    """

    def __init__(self, count: int, folder: Path, **environment: str) -> None:
        self.count, self._folder, self._environment = count, folder, environment
        self._started = 0
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` returns on each rank; it must be importable, and pass through a pickle.

        Raises:
            AssertionError: it has raised somewhere, with every rank's traceback, or not ended in time.
        """
        if not self._processes:
            self._start()
        call = pickle.dumps((function, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        answers: list[Any] = [None] * self.count
        failed: list[str] = []
        deadline = time.monotonic() + PATIENCE
        waiting = dict(enumerate(self._pipes))
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout=1)
            for rank, pipe in list(waiting.items()):
                if pipe in ready:
                    del waiting[rank]
                    try:
                        answers[rank], error = pipe.recv()
                    except EOFError:
                        error = "the process has ended"
                    if error is not None:
                        failed.append(f"rank {rank}: {error}")
            # The others may wait for one that has failed.
            if waiting and (time.monotonic() > deadline or (failed and not ready)):
                failed += [f"rank {rank}: has not ended" for rank in waiting]
                break
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        return answers

    def _start(self) -> None:
        self._started += 1
        context = multiprocessing.get_context("spawn")
        store = self._folder / f"store-{self.count}-{self._started}"
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.count, str(store), theirs, self._environment), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank: int, count: int, store: str, pipe: Any, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count)
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        _end_groups()  # of the last call, which has ended on all ranks
        answer, error = None, None
        try:
            answer = function(*arguments)
        except BaseException:
            error = traceback.format_exc()
        function = arguments = None
        pipe.send((answer, error))


def _end_groups() -> None:
    """Ends what groups calls have made: each has a thread that wakes up 100 times a second for good.

    Those of meshes stay, which torch keeps by their shape; see :func:`mesh_of`.
    """
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and not group.group_desc.startswith("mesh_"):
            dist.destroy_process_group(group)
    gc.collect()


@functools.cache
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> Any:
    """One mesh of a shape for all calls, so that there is one set of groups."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names or tuple("abc"[: len(shape)]))

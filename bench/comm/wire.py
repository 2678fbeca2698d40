"""Bytes and times of a step, of processes that talk to each other through links of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from bench.comm import network
from bench.comm.formulas import HOOKS
from reporting import machine

Report = dict[str, Any]

FULL = {
    "wire_model": {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 128},  # the example's preset "small"
    "time_model": {"n_layer": 3, "n_head": 6, "n_embd": 288, "block_size": 128},  # that of experiments.convergence
    "wire_steps": 20,
    "time_steps": 25,
    "settle": 0.4,
    "limit": 120,
}
_TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}
QUICK = {"wire_model": _TINY, "time_model": _TINY, "wire_steps": 3, "time_steps": 3, "settle": 0.1, "limit": 60}
WORKERS, QUICK_WORKERS = (2, 4, 8), (2,)
#: Gbit/s of a worker's link, and no limit. What a machine does not reach by itself needs no limit: see the page.
RATES = (1, 10, None)
#: Workers whose steps are timed.
TIMED = (2, 4)


def measure(quick: bool = False) -> Report:
    """All hooks with each number of workers."""
    prefix = network.enter()
    report: Report = {**machine.facts(), "namespaces": prefix is not None, "load": os.getloadavg()[0]}
    report["settings"] = dict(QUICK if quick else FULL)
    report |= {"wire": [], "times": [], "failed": {}}
    for workers in QUICK_WORKERS if quick else WORKERS:
        plan = {
            **report["settings"],
            "workers": workers,
            "hooks": list(HOOKS),
            "namespaces": prefix is not None,
            "interface": "lo" if prefix is None else "eth0",
            "address": "127.0.0.1" if prefix is None else network.address(0),
            "port": network.free_port() if prefix is None else 29500,
            "rates": ([None] if prefix is None else list(RATES)) if workers in TIMED else [],
        }
        command = [*(prefix or []), sys.executable, "-m", "bench.comm.wire", json.dumps(plan)]
        # Standard error is the terminal's, where what goes wrong is read.
        limit = 4 * report["settings"]["limit"] + 60 * workers
        done = subprocess.run(command, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True, timeout=limit, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        for key in ("wire", "times"):
            report[key] += found[key]
        report["failed"] |= found["failed"]
        print(f"{workers} workers: {len(found['wire'])} hooks counted", flush=True)
    return report


def _start(plan: Report, rank: int, output: Any) -> subprocess.Popen[str]:
    inside = ["ip", "netns", "exec", f"w{rank}"] if plan["namespaces"] else []
    # As many threads as the plan says, that do not wait by spinning: there are more processes than cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": plan["interface"]}
    environment |= {"PYTHONWARNINGS": "ignore::FutureWarning", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [*inside, sys.executable, "-m", "bench.comm.worker", json.dumps(plan), str(rank)]
    return subprocess.Popen(command, cwd=machine.ROOT, env=environment, stdout=output, text=True)


def run(plan: Report) -> str:
    """What rank 0 printed. All workers are ended when one fails.

    Raises:
        RuntimeError: a worker failed; it has said why.
    """
    if plan["namespaces"]:
        network.build(plan["workers"])
    with tempfile.TemporaryFile("w+") as output:
        started = [_start(plan, rank, output if rank == 0 else sys.stderr) for rank in range(plan["workers"])]
        try:
            for process in started:
                if process.wait() != 0:
                    raise RuntimeError(f"a worker of {plan['workers']} ended with status {process.returncode}")
        finally:
            for process in started:
                process.kill()
                process.wait()
        output.seek(0)
        return output.read()


def main(arguments: Sequence[str]) -> None:
    print(run(json.loads(arguments[0])), end="")


if __name__ == "__main__":
    main(sys.argv[1:])

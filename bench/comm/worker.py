"""One of the workers whose bytes are counted and whose steps are timed."""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.comm import network
from bench.comm.formulas import CODES_PER_WORD
from reporting import machine
from signadam_ext.distributed import VoteHook
from signadam_ext.distributed.votes import kernels_for

sys.path.insert(0, str(machine.ROOT / "examples"))
from gpt import GPT, GPTConfig

_WARM_UP = 5  # DDP settles its buckets, PowerSGD begins, votes compare their options


def bf16_all_reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What torch's bf16_compress_hook does, which asks for NCCL."""
    buffer = bucket.buffer()
    halved = buffer.to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(halved, async_op=True).get_future()
    return future.then(lambda done: buffer.copy_(done.value()[0]))


def torch_refuses_bf16() -> str | None:
    """What DDP says to torch's own bf16 hook on this backend; None where it takes it."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    ddp = DistributedDataParallel(nn.Linear(1, 1))
    try:
        ddp.register_comm_hook(None, default_hooks.bf16_compress_hook)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def register(ddp: DistributedDataParallel, hook: str) -> VoteHook | None:
    """Puts one of `formulas.HOOKS` in the place of DDP's all-reduce; gives ours back."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    if hook == "bf16":
        ddp.register_comm_hook(None, bf16_all_reduce)
    elif hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif hook in ("majority", "mean"):
        ours = VoteHook(vote=hook)
        ddp.register_comm_hook(None, ours)
        return ours
    return None


class _Steps:
    def __init__(self, model: dict[str, int], hook: str) -> None:
        torch.manual_seed(0)
        module: nn.Module = GPT(GPTConfig(**model))
        self.shapes = [list(p.shape) for p in module.parameters()]
        # All gradients in one bucket, for hooks differ in how many they bear.
        self.ddp = DistributedDataParallel(module, broadcast_buffers=False, bucket_cap_mb=1000)
        self.hook = register(self.ddp, hook)
        generator = torch.Generator().manual_seed(dist.get_rank())
        # Few tokens: they change nothing of what is sent.
        self.tokens = torch.randint(256, (1, 17), generator=generator)

    def run(self, steps: int) -> list[float]:
        """Seconds of each step, from gradients set to None to those that all workers have."""
        found = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.ddp.zero_grad()
            self.ddp(self.tokens[:, :-1], self.tokens[:, 1:]).backward()
            found.append(time.perf_counter() - begin)
        return found


def _sent(what: Callable[[], object], times: int, interface: str, settle: float) -> tuple[int, int]:
    """Bytes and packets that this worker sends between two barriers, with so many calls there."""
    dist.barrier()
    time.sleep(settle)  # acknowledgements come late
    before = network.sent(interface)
    for _ in range(times):
        what()
    time.sleep(settle)
    after = network.sent(interface)
    dist.barrier()
    return after[0] - before[0], after[1] - before[1]


def _first_phase(hook: VoteHook, shapes: list[list[int]]) -> Callable[[], object]:
    """The all-to-all of a vote on tensors of these shapes, and the counting."""
    vote = hook._started(torch.device("cpu"))  # noqa: SLF001
    exchange = vote.exchange
    codes = exchange.room(sum(-(-math.prod(shape) // CODES_PER_WORD) for shape in shapes), torch.device("cpu"))
    kernels = kernels_for("cpu", [torch.empty(1)])
    return lambda: exchange.part(codes, kernels)


def count(plan: dict[str, Any], hook: str) -> dict[str, Any]:
    """Bytes a step: of a number of steps, less those of none in the same time."""
    steps, interface, settle = _Steps(plan["wire_model"], hook), plan["interface"], plan["settle"]
    if plan["namespaces"]:
        network.whole_packets(interface, True)
    steps.run(_WARM_UP)
    number = plan["wire_steps"]
    nothing = _sent(lambda: None, number, interface, settle)
    measured = [_sent(lambda: steps.run(1), number, interface, settle)]
    if steps.hook is not None:
        measured.append(_sent(_first_phase(steps.hook, steps.shapes), number, interface, settle))
    each = [[(own[i] - nothing[i]) / number for i in (0, 1)] for own in measured]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, each)
    if not plan["namespaces"]:  # everybody saw what all have sent
        every = [[[value / len(every) for value in pair] for pair in own] for own in every]
    return {
        "hook": hook,
        "workers": dist.get_world_size(),
        "parameters": sum(p.numel() for p in steps.ddp.parameters()),
        "shapes": steps.shapes,
        "steps": number,
        "bytes": [own[0][0] for own in every],
        "packets": [own[0][1] for own in every],
        "bytes_there": [own[1][0] for own in every] if steps.hook is not None else None,
        "bytes_of_no_step": nothing[0],
    }


def clock(plan: dict[str, Any], hook: str, rates: list[float | None]) -> list[dict[str, Any]]:
    """Times of a step by the rate of each worker's link; None for a link that is not shaped."""
    steps, found = _Steps(plan["time_model"], hook), []
    if plan["namespaces"]:
        network.whole_packets(plan["interface"], False)
    steps.run(_WARM_UP)
    for rate in rates:
        if plan["namespaces"]:
            network.shape(plan["interface"], rate)
        dist.barrier()
        own = sorted(steps.run(plan["time_steps"] + 1)[1:])
        dist.barrier()
        if plan["namespaces"]:
            network.shape(plan["interface"], None)
        low, _, high = statistics.quantiles(own, n=4)
        found.append(
            {
                "hook": hook,
                "workers": dist.get_world_size(),
                "parameters": sum(p.numel() for p in steps.ddp.parameters()),
                "shapes": steps.shapes,
                "gbit": rate,
                "seconds": {"low": low, "median": statistics.median(own), "high": high},
            }
        )
    return found


def main() -> None:
    plan, rank = json.loads(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = plan["interface"]
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{plan['address']}:{plan['port']}",
        rank=rank,
        world_size=plan["workers"],
        timeout=timedelta(seconds=plan["limit"]),
    )
    rows: dict[str, Any] = {"wire": [], "times": [], "failed": {}}
    if said := torch_refuses_bf16():
        rows["failed"]["bf16_compress_hook"] = said
    for hook in plan["hooks"]:
        try:
            rows["wire"].append(count(plan, hook))
            if plan["rates"]:
                rows["times"] += clock(plan, hook, plan["rates"])
        except Exception as error:  # which all workers have, or the time limit ends it
            if hook in ("allreduce", "majority", "mean"):
                raise
            rows["failed"][hook] = f"{type(error).__name__}: {error}".splitlines()[0]
    if rank == 0:
        print(json.dumps(rows), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

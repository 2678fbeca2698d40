"""What ranks do in tests of votes: models under DDP and FSDP2, and what a vote is, written anew in plain operations."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signadam_ext.distributed import VoteAllReduce, VoteHook, VoteReduceScatter


class Model(nn.Module):
    """Parameters of sizes that fill words and that do not, one of them never used."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(7, 33, dtype=dtype)
        self.second = nn.Linear(33, 300, dtype=dtype)
        self.third = nn.Linear(300, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.tanh(self.first(x))))) * self.scale


def batch(step: int, rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(5, 7, generator=generator).to(dtype)


def loss_of(model: nn.Module, step: int, rank: int, dtype: torch.dtype) -> Tensor:
    return model(batch(step, rank, dtype)).float().square().sum()


class Expected:
    """The result of votes on lists of local gradients, from the definition."""

    def __init__(self, options: dict[str, Any], workers: int) -> None:
        self.options = {
            "vote": "majority",
            "alpha": 0.0,
            "confidence": "fixed",
            "confidence_beta": 0.9,
            "threshold": "local",
            "momentum": 0.0,
            "error_feedback": False,
            "nonfinite": "propagate",
            **options,
        }
        self.workers = workers
        self.memory: dict[tuple[int, int, str], Any] = {}

    def result(self, number: int, gradients: list[Tensor]) -> Tensor:
        o = self.options
        voted, kept = [], []
        for worker, gradient in enumerate(gradients):
            g = gradient.float()
            u = g
            if o["momentum"]:
                m = self.memory.get((number, worker, "m"), torch.zeros_like(g))
                u = torch.tensor(o["momentum"]).float() * m + torch.tensor(1 - o["momentum"]).float() * g
                kept.append(("m", worker, u, m))
            voted.append(u + self.memory.get((number, worker, "r"), torch.zeros_like(g)))
        thresholds = [torch.tensor(o["alpha"]).float()] * self.workers
        if o["confidence"] == "adaptive":
            pools = [voted] * self.workers if o["threshold"] == "agreed" else [[x] for x in voted]
            for worker, pool in enumerate(pools):
                first = sum(x.sum(dtype=torch.float64) for x in pool)
                second = sum(x.double().square().sum() for x in pool)
                n = sum(x.numel() for x in pool)
                std = (second / n - (first / n) ** 2).clamp(min=0).sqrt()
                a = self.memory.get((number, worker, "a"), torch.zeros((), dtype=torch.float64))
                a = o["confidence_beta"] * a + (1 - o["confidence_beta"]) * std if std.isfinite() else a
                self.memory[number, worker, "a"] = a
                thresholds[worker] = (o["alpha"] * a).float()
        codes, spoiled = [], torch.zeros_like(voted[0], dtype=torch.bool)
        for worker, (e, threshold, gradient) in enumerate(zip(voted, thresholds, gradients, strict=True)):
            finite = e.isfinite() & gradient.isfinite()
            code = torch.where(finite & (e.abs() > threshold), e.sign(), torch.zeros_like(e))
            codes.append(code)
            spoiled |= ~finite
            if o["error_feedback"]:
                passes = e[code != 0].abs().double()
                scale = (passes.sum() / max(len(passes), 1)).float()
                r = self.memory.get((number, worker, "r"), torch.zeros_like(e))
                self.memory[number, worker, "r"] = torch.where(finite, e - scale * code, r)
        for name, worker, new, old in kept:
            finite = voted[worker].isfinite() & gradients[worker].isfinite()
            self.memory[number, worker, name] = torch.where(finite, new, old)
        total = torch.stack(codes).sum(0)
        result = total.sign() if o["vote"] == "majority" else total / torch.tensor(float(self.workers))
        if o["nonfinite"] == "propagate":
            result = torch.where(spoiled, torch.nan, result)
        return result.to(gradients[0].dtype)


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=1234.0), b.nan_to_num(nan=1234.0))


def ddp_votes(
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    steps: int = 3,
    spoiled: bool = False,
    view: bool = True,
) -> list[str]:
    """Names of parameters whose gradients after backward are not what the vote on the local ones gives."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    alone = Model(dtype)
    # Several buckets, whose layout changes after the first step.
    ddp = DistributedDataParallel(Model(dtype), bucket_cap_mb=0.01, gradient_as_bucket_view=view)
    ddp.register_comm_hook(None, VoteHook(**options))
    expected = Expected(options, workers)
    wrong = []
    for step in range(steps):
        for model in (alone, ddp):
            model.zero_grad()
            loss = loss_of(model, step, rank, dtype)
            if spoiled and step == 1 and rank == workers - 1:
                loss = loss * float("nan")
            loss.backward()
        for number, ((name, own), param) in enumerate(
            zip(alone.named_parameters(), ddp.module.parameters(), strict=True)
        ):
            gathered = [torch.empty_like(own.grad) for _ in range(workers)]
            dist.all_gather(gathered, own.grad)
            if not equal(param.grad, expected.result(number, gathered)):
                wrong.append(f"{name} at step {step}")
    return wrong


def resumed(options: dict[str, Any]) -> bool:
    """Whether a hook that takes over another's state goes on as that one does."""
    rank = dist.get_rank()
    runs = []
    for resumes in (False, True):
        hook = VoteHook(**options)
        ddp = DistributedDataParallel(Model(), bucket_cap_mb=0.01)
        ddp.register_comm_hook(None, hook)
        found = []
        for step in range(6):
            if resumes and step == 3:
                fresh = VoteHook(**options)
                fresh.load_state_dict(hook.state_dict())
                ddp = DistributedDataParallel(Model(), bucket_cap_mb=0.01)
                ddp.register_comm_hook(None, fresh)
            ddp.zero_grad()
            loss_of(ddp, step, rank, torch.float32).backward()
            found.append([param.grad.clone() for param in ddp.parameters()])
        runs.append(found)
    return all(torch.equal(a, b) for x, y in zip(*runs, strict=True) for a, b in zip(x, y, strict=True))


def error_of(options_by_rank: list[dict[str, Any]]) -> str:
    """What a first vote with these options raises."""
    ddp = DistributedDataParallel(Model())
    ddp.register_comm_hook(None, VoteHook(**options_by_rank[dist.get_rank()]))
    try:
        loss_of(ddp, 0, dist.get_rank(), torch.float32).backward()
    except Exception as error:
        return str(error)
    return "nothing"


def overlaps() -> tuple[bool, int]:
    """Whether backward went on while a vote was under way, and the number of buckets."""
    ddp = DistributedDataParallel(Model(), bucket_cap_mb=0.01)
    hook = VoteHook()
    under_way: list[float] = []
    called: list[float] = []

    class Slow(VoteHook):
        def __call__(self, state: Any, bucket: Any) -> Any:
            called.append(time.perf_counter())
            future = super().__call__(state, bucket)
            vote = self._started()
            if not under_way:
                elect = vote.elect

                def slow(*arguments: Any) -> None:
                    time.sleep(0.2)
                    elect(*arguments)
                    under_way.append(time.perf_counter())

                vote.elect = slow
            return future

    hook = Slow()
    ddp.register_comm_hook(None, hook)
    for step in range(2):
        ddp.zero_grad()
        under_way.clear(), called.clear()
        loss_of(ddp, step, dist.get_rank(), torch.float32).backward()
    return called[-1] < under_way[-1], len(called)


def without_all_to_all(options: dict[str, Any]) -> list[str]:
    """As :func:`ddp_votes`, of a backend that has no all-to-all."""
    own = dist.all_to_all_single

    def refuses(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("Backend fake does not support alltoall_base")

    dist.all_to_all_single = refuses
    try:
        return ddp_votes(options)
    finally:
        dist.all_to_all_single = own


def fsdp_votes(options: dict[str, Any], replicated: bool = False) -> list[str]:
    """Names of parameters whose sharded gradients are not this rank's part of what the vote gives."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    rank, workers = dist.get_rank(), dist.get_world_size()
    model = Model()
    model.scale = None  # of no dimension, which FSDP2 does not shard
    model.forward = lambda x: model.third(torch.relu(model.second(torch.tanh(model.first(x)))))
    alone = Model()
    alone.scale = None
    alone.forward = lambda x: alone.third(torch.relu(alone.second(torch.tanh(alone.first(x)))))
    if replicated:
        mesh = init_device_mesh("cpu", (2, workers // 2), mesh_dim_names=("replicate", "shard"))
        shard, group = mesh["shard"], mesh["replicate"].get_group()
    else:
        shard, group = init_device_mesh("cpu", (workers,)), None
    for part in (model.second, model):
        fully_shard(part, mesh=shard)
    comm = VoteAllReduce(group, **options) if replicated else VoteReduceScatter(**options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            (module.set_all_reduce_hook if replicated else module.set_custom_reduce_scatter)(comm)
    wrong = []
    for step in range(2):
        for each in (alone, model):
            each.zero_grad()
            loss_of(each, step, rank, torch.float32).backward()
        for (name, own), param in zip(alone.named_parameters(), model.parameters(), strict=True):
            gathered = [torch.empty_like(own.grad) for _ in range(workers)]
            dist.all_gather(gathered, own.grad)
            if replicated:
                # Shards of a replica are averaged over it; then replicas vote.
                half = workers // 2
                gathered = [torch.stack(gathered[i : i + half]).sum(0) / half for i in (0, half)]
            expected = Expected(options, len(gathered)).result(0, gathered)
            if not equal(param.grad.full_tensor(), expected):
                wrong.append(f"{name} at step {step}")
    return wrong


def stays_away(seconds: float) -> str:
    """What the other rank's backward raises, where the last one does not come to its vote."""
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    ddp = DistributedDataParallel(Model(), process_group=group)
    ddp.register_comm_hook(None, VoteHook(process_group=group))
    loss_of(ddp, 0, dist.get_rank(), torch.float32).backward()
    # In the second step DDP agrees on its buckets.
    loss_of(ddp, 1, dist.get_rank(), torch.float32).backward()
    if dist.get_rank() == dist.get_world_size() - 1:
        return "stayed away"
    try:
        loss_of(ddp, 2, dist.get_rank(), torch.float32).backward()
    except Exception as error:
        return str(error)
    return "nothing"


def of_dtype(dtype: torch.dtype) -> str:
    """What a vote on gradients of that dtype raises."""
    ddp = DistributedDataParallel(Model(dtype))
    ddp.register_comm_hook(None, VoteHook())
    try:
        loss_of(ddp, 0, dist.get_rank(), dtype).backward()
    except Exception as error:
        return str(error)
    return "nothing"

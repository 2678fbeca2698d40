"""What ranks do in tests of votes: models under DDP and FSDP2, and what a vote is, written anew in plain operations."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from support.ranks import mesh_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signadam_ext import distributed
from signadam_ext.core.formats import narrow_stochastic
from signadam_ext.core.random_bits import random_bits
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
            vote = self._started(bucket.buffer().device)
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
    from torch.distributed.fsdp import FSDPModule, fully_shard

    rank, workers = dist.get_rank(), dist.get_world_size()
    model = Model()
    model.scale = None  # of no dimension, which FSDP2 does not shard
    model.forward = lambda x: model.third(torch.relu(model.second(torch.tanh(model.first(x)))))
    alone = Model()
    alone.scale = None
    alone.forward = lambda x: alone.third(torch.relu(alone.second(torch.tanh(alone.first(x)))))
    if replicated:
        mesh = mesh_of((2, workers // 2), ("replicate", "shard"))
        shard, group = mesh["shard"], mesh["replicate"].get_group()
    else:
        shard, group = mesh_of((workers,)), None
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


class ExpectedUpdate:
    """What a distributed optimizer makes of lists of the workers' gradients, from the definition, in fp32."""

    def __init__(self, name: str, options: dict[str, Any], workers: int) -> None:
        self.name, self.workers = name, workers
        defaults = {"betas": (0.9, 0.99), "beta": 0.9, "alpha": 0.0, "weight_decay": 0.0, "vote": "majority"}
        self.options = {**defaults, "nonfinite": "propagate", "maximize": False, **options}
        self.momenta: dict[tuple[int, int], Tensor] = {}

    def step(self, number: int, param: Tensor, gradients: list[Tensor | None]) -> Tensor:
        o = self.options
        if all(gradient is None for gradient in gradients):
            return param.float()
        beta1, beta2 = o["betas"] if self.name == "DistributedLion" else (o["beta"], o["beta"])

        def blend(beta: float, m: Tensor, x: Tensor) -> Tensor:
            return torch.tensor(beta).float() * m + torch.tensor(1 - beta).float() * x

        total = torch.zeros_like(param, dtype=torch.float32)
        spoiled = torch.zeros_like(param, dtype=torch.bool)
        for worker, gradient in enumerate(gradients):
            if gradient is None:
                continue
            g = gradient.float() * (-1 if o["maximize"] else 1)
            m = self.momenta.get((number, worker), torch.zeros_like(g))
            x = g
            if self.name == "DistributedSignAdamPP":
                x = torch.where(g.abs() > o["alpha"], g.sign(), torch.zeros_like(g))
            finite = g.isfinite()
            total += torch.where(finite, blend(beta1, m, x).sign(), 0.0)
            spoiled |= ~finite
            self.momenta[number, worker] = torch.where(finite, blend(beta2, m, x), m)
        vote = total.sign() if o["vote"] == "majority" else total / torch.tensor(float(self.workers))
        if o["nonfinite"] == "propagate":
            vote = torch.where(spoiled, torch.nan, vote)
        p = param.float()
        moved = p * torch.tensor(1 - o["lr"] * o["weight_decay"]).float() - torch.tensor(o["lr"]).float() * vote
        return torch.where(vote.isnan(), p, moved)


def distributed_steps(
    name: str, options: dict[str, Any], dtype: torch.dtype = torch.float32, spoiled: bool = False, backend: str = "cpu"
) -> list[str]:
    """Names of parameters that are not where the definition takes them, after each of some steps."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    model = Model(dtype)
    model.third.weight.data = model.third.weight.data.t().contiguous().t()  # lies by columns
    optimizer = getattr(distributed, name)(model.parameters(), **options, backend=backend)
    expected = ExpectedUpdate(name, options, workers)
    wrong = []
    for step in range(4):
        model.zero_grad()
        loss_of(model, step, rank, dtype).backward()
        if spoiled and rank == workers - 1:
            model.second.weight.grad[3] = float("inf")
        if step == 1:
            model.first.bias.grad = None  # of nobody
            if rank == 0:
                model.second.bias.grad = None
        aims = []
        for number, param in enumerate(model.parameters()):
            gathered: list[Any] = [None] * workers
            dist.all_gather_object(gathered, param.grad)
            aims.append(expected.step(number, param.detach().clone(), gathered).to(dtype))
        optimizer.step()
        for aim, (label, param) in zip(aims, model.named_parameters(), strict=True):
            if not torch.equal(aim, param):
                wrong.append(f"{label} at step {step}")
    return wrong


def notices_a_step(name: str, backend: str) -> bool:
    """Whether autograd refuses what it has saved of a parameter before a step, and versions count each of two steps."""
    param = nn.Parameter(torch.ones(40))
    optimizer = getattr(distributed, name)([param], lr=0.01, backend=backend)
    loss = param.square().sum()
    versions = []
    for _ in range(2):
        param.grad = torch.ones(40)
        optimizer.step()
        versions.append((param._version, optimizer.state[param]["exp_avg"]._version))
    try:
        loss.backward()
    except RuntimeError as error:
        moved = [later - earlier for earlier, later in zip(*versions, strict=True)]
        return "modified by an inplace operation" in str(error) and moved == [1, 1]
    return False


def steps_in_inference_mode(name: str) -> bool:
    """Whether steps of which the first is taken in inference mode are those that are not."""
    ends = []
    for in_mode in (False, True):
        param = nn.Parameter(torch.linspace(-1, 1, 40))
        optimizer = getattr(distributed, name)([param], lr=0.01)
        for step in range(3):
            param.grad = torch.linspace(1, -2, 40).sin() * (step + 1)
            with torch.inference_mode(in_mode and step == 0):
                optimizer.step()
        ends.append(torch.cat([param.detach(), optimizer.state[param]["exp_avg"]]))
    return torch.equal(*ends)


def stays_equal(name: str, options: dict[str, Any], steps: int) -> tuple[bool, float, float]:
    """Whether all workers end with the same parameters after steps on their own data; and losses, first and last."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    model = Model(torch.bfloat16)
    optimizer = getattr(distributed, name)(model.parameters(), **options)
    losses = []
    for step in range(steps):
        model.zero_grad()
        loss = loss_of(model, step, rank, torch.bfloat16)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    flat = torch.cat([param.detach().flatten() for param in model.parameters()])
    gathered = [torch.empty_like(flat) for _ in range(workers)]
    dist.all_gather(gathered, flat)
    return all(torch.equal(each, flat) for each in gathered), losses[0], losses[-1]


def resumes(name: str, options: dict[str, Any]) -> bool:
    """Whether a run that is saved and taken up again ends where an undisturbed one ends."""
    ends = []
    for interrupted in (False, True):
        model = Model(torch.bfloat16)
        optimizer = getattr(distributed, name)(model.parameters(), **options)
        for step in range(6):
            if interrupted and step == 3:
                saved = optimizer.state_dict()
                optimizer = getattr(distributed, name)(model.parameters(), **{**options, "lr": 1.0})
                optimizer.load_state_dict(saved)
            model.zero_grad()
            loss_of(model, step, dist.get_rank(), torch.bfloat16).backward()
            optimizer.step()
        ends.append([param.detach().clone() for param in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def first_step_error(name: str, options_by_rank: list[dict[str, Any]], moved: float = 0.0) -> str:
    """What a first step raises; the last rank's parameters are ``moved``."""
    rank = dist.get_rank()
    model = Model()
    if rank == dist.get_world_size() - 1:
        model.first.bias.data.add_(moved)
    optimizer = getattr(distributed, name)(model.parameters(), **options_by_rank[rank])
    loss_of(model, 0, rank, torch.float32).backward()
    before = [param.detach().clone() for param in model.parameters()]
    try:
        optimizer.step()
    except RuntimeError as error:
        unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return str(error) if unchanged else "parameters were written"
    return "nothing"


def laid_out_anew() -> bool:
    """Whether steps are those of a twin whose parameter stays as it was, after it has been laid out channels last."""
    ends = []
    for changes in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(2, 3, 4, 5))
        optimizer = distributed.DistributedLion([param], lr=0.01)
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            if changes and step == 1:
                param.data = param.data.to(memory_format=torch.channels_last)
            param.grad = torch.randn(2, 3, 4, 5, generator=generator)
            optimizer.step()
        ends.append(param.detach().clone())
    return torch.equal(*ends)


def compiled() -> bool:
    """Whether steps that a compiled function takes are those of one that is not compiled."""
    ends = []
    for compiles in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(7))
        optimizer = distributed.DistributedLion([param], lr=0.01)
        step = torch.compile(lambda optimizer=optimizer: optimizer.step(), backend="eager")
        for number in range(3):
            param.grad = torch.randn(7, generator=torch.Generator().manual_seed(10 * number + dist.get_rank()))
            step() if compiles else optimizer.step()
        ends.append(param.detach().clone())
    return torch.equal(*ends)


def other_memory_order() -> str:
    """What a first step raises where the last rank's parameter lies by columns."""
    values = torch.arange(6.0).view(2, 3)
    param = nn.Parameter(values if dist.get_rank() == 0 else values.t().contiguous().t())
    optimizer = distributed.DistributedLion([param])
    param.grad = torch.ones_like(param)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def loads_vote() -> float:
    """Where a mean of votes, of which one is for and one neither, takes a parameter that ascends from 0 by 1."""
    saved = distributed.DistributedLion([nn.Parameter(torch.zeros(1))], lr=1.0, vote="mean", maximize=True).state_dict()
    param = nn.Parameter(torch.zeros(1))
    optimizer = distributed.DistributedLion([param])
    optimizer.load_state_dict(saved)
    param.grad = torch.tensor([float(dist.get_rank())])
    optimizer.step()
    return float(param)


def forgets() -> bool:
    """Whether a hook that has voted starts anew with the state of one that has not."""
    grads = []
    hook = VoteHook(momentum=0.9, error_feedback=True)
    before = hook.state_dict()
    ddp = DistributedDataParallel(Model())
    ddp.register_comm_hook(None, hook)
    for step in (0, 1, 0):
        if len(grads) == 2:
            hook.load_state_dict(before)
        ddp.zero_grad()
        loss_of(ddp, step, dist.get_rank(), torch.float32).backward()
        grads.append([param.grad.clone() for param in ddp.parameters()])
    return all(torch.equal(a, b) for a, b in zip(grads[0], grads[2], strict=True))


def sum_in_fsdp() -> str:
    """What backward raises where FSDP2 is told to add gradients up."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 4)
    fully_shard(model, mesh=mesh_of((dist.get_world_size(),)))
    model.set_force_sum_reduction_for_comms(True)
    model.set_custom_reduce_scatter(VoteReduceScatter())
    try:
        model(torch.ones(2, 4)).sum().backward()
    except ValueError as error:
        return str(error)
    return "nothing"


def rounded_at_random() -> tuple[bool, int]:
    """Whether bf16 parameters are where seed, number, step and element round them, and how many values there are."""
    first, param = (nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2))
    options = {"lr": 1e-4, "param_storage": "stochastic", "seed": 5}
    optimizer = distributed.DistributedSignum([first, param], **options)
    expected = param.detach().clone()
    for step in (1, 2):
        first.grad, param.grad = (torch.ones_like(each) for each in (first, param))
        optimizer.step()
        moved = expected.float() - torch.tensor(1e-4)
        expected = narrow_stochastic(moved, random_bits(5, 1, step, 0, 5000), torch.bfloat16)
    return torch.equal(param, expected), len(param.unique())

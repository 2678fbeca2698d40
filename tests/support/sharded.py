"""What ranks run in the tests of sharded training: one training, sharded or not, on the same gradients.

Every function here is called on all ranks at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.paper_formulas import TABLE
from support.ranks import mesh_of
from support.strategies import same_bits
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import signadam_ext
from signadam_ext import GradES, per_sample_variance, release_gradients
from signadam_ext.engine import gradients
from signadam_ext.optimizers import ranks

ROWS = {row.id: row for row in TABLE}
#: Uneven over 2, 3 and 4 ranks; with empty parts on 4; a vector, and more dimensions.
SHAPES = ((12, 10), (7, 5), (3, 4), (33,), (5, 3, 2))


def whole_gradients(shapes: Sequence[tuple[int, ...]], step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def whole_parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def make(name: str, params: Any, options: dict[str, Any]) -> Any:
    return getattr(signadam_ext, name)(params, **options)


def step_on(params: Sequence[Tensor], optimizer: Any, grads: Sequence[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = grad
    optimizer.step()


def whole(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    # Gloo moves no int16.
    return value.int().full_tensor().short() if value.dtype == torch.int16 else value.full_tensor()


def difference(ours: Any, theirs: Any) -> str | None:
    """Where two optimizers' parameters, or what their checkpoints hold, differ by a bit."""
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for i, (param, alone) in enumerate(zip(group["params"], other["params"], strict=True)):
            if not same_bits(whole(param.detach()), whole(alone.detach())):
                return f"parameter {i}"
    state, alone = ours.state_dict()["state"], theirs.state_dict()["state"]
    if state.keys() != alone.keys():
        return f"parameters with state: {list(state)} and {list(alone)}"
    for number, entries in state.items():
        if entries.keys() != alone[number].keys():
            return f"entries of {number}: {list(entries)} and {list(alone[number])}"
        for name, value in entries.items():
            value, expected = whole(value), whole(alone[number][name])
            if isinstance(value, Tensor) and not (value.dtype == expected.dtype and same_bits(value, expected)):
                return f"{name} of {number}"
            if not isinstance(value, Tensor) and value != expected:
                return f"{name} of {number}: {value} and {expected}"
    return None


def sharded_as_alone(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    mesh: Sequence[int] = (),
    dims: Sequence[int | None] = (0,),
    steps: int = 4,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    grad_dtype: torch.dtype | None = None,
) -> str | None:
    """Whether a training on DTensors has the bits of one on plain tensors: None, or what differs.

    ``dims``: by dimension of the mesh, the dimension that is sharded there, or None for a copy on every rank.
    """
    device_mesh = mesh_of(tuple(mesh) or (dist.get_world_size(),))
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    alone = [nn.Parameter(value) for value in whole_parameters(shapes, dtype)]
    params = [
        nn.Parameter(distribute_tensor(value, device_mesh, placements)) for value in whole_parameters(shapes, dtype)
    ]
    ours, theirs = make(name, params, options), make(name, alone, options)
    for step in range(steps):
        grads = whole_gradients(shapes, step, grad_dtype or dtype)
        before = [param._version for param in params]
        step_on(params, ours, grads)
        step_on(alone, theirs, grads)
        counted = [param._version - count for param, count in zip(params, before, strict=True)]
        if counted != [1] * len(params):
            return f"after step {step + 1}: versions of the DTensors have moved by {counted}"
        if (found := difference(ours, theirs)) is not None:
            return f"after step {step + 1}: {found}"
    return None


def averages_as_alone(name: str, options: dict[str, Any], dtype: torch.dtype) -> str | None:
    """Whether DTensors in evaluation, and what checkpoints hold then, have the bits of plain tensors, and come back."""
    device_mesh = mesh_of((dist.get_world_size(),))
    alone = [nn.Parameter(value) for value in whole_parameters(SHAPES, dtype)]
    params = [
        nn.Parameter(distribute_tensor(value, device_mesh, [Shard(0)])) for value in whole_parameters(SHAPES, dtype)
    ]
    ours, theirs = make(name, params, options), make(name, alone, options)
    for step in range(3):
        grads = whole_gradients(SHAPES, step, dtype)
        for optimizer, own in ((ours, params), (theirs, alone)):
            step_on(own, optimizer, grads)
            optimizer.eval()
        if (found := difference(ours, theirs)) is not None:
            return f"in evaluation after step {step + 1}: {found}"
        ours.load_state_dict(ours.state_dict())
        for optimizer in (ours, theirs):
            optimizer.train()
        if (found := difference(ours, theirs)) is not None:
            return f"in training after step {step + 1}: {found}"
    return None


def agreed_thresholds(
    options: dict[str, Any], dtype: torch.dtype, mesh: Sequence[int] = (), dims: Sequence[int | None] = (0,)
) -> list[float]:
    """The largest difference, as a share, of a threshold's state from that of a training on whole tensors; and of a
    parameter, whose elements may pass in one run and not in the other where they equal the threshold."""
    device_mesh = mesh_of(tuple(mesh) or (dist.get_world_size(),))
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    # In one run a parameter without elements on some ranks, and one that all ranks have.
    shapes = [shape for shape in SHAPES if len(shape) > max(dim or 0 for dim in dims)]
    alone = [nn.Parameter(value) for value in whole_parameters(shapes, dtype)]
    params = [
        nn.Parameter(distribute_tensor(value, device_mesh, placements if i else [Replicate()] * len(placements)))
        for i, value in enumerate(whole_parameters(shapes, dtype))
    ]
    options = {"lr": 2.0**-6, **options}
    name = options.pop("method", "SignAdamPP")
    ours, theirs = make(name, params, options), make(name, alone, options)
    found = [0.0, 0.0]
    for step in range(4):
        grads = whole_gradients(shapes, step, dtype)
        step_on(params, ours, grads)
        step_on(alone, theirs, grads)
        for param, single in zip(params, alone, strict=True):
            own, other = ours.state[param], theirs.state[single]
            name = next(name for name in own if name in ("exp_avg_std", "threshold", "param_rms", "corrected_norm"))
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, own[name].item())
            assert len(set(everyone)) == 1, f"ranks have other thresholds: {everyone}"
            assert other[name].item() > 0
            found[0] = max(found[0], abs(own[name].item() / other[name].item() - 1))
            found[1] = max(found[1], (whole(param.detach()).double() - single.detach().double()).abs().max().item())
    return found


def clipped_as_alone(
    name: str, options: dict[str, Any], mesh: Sequence[int] = (), dims: Sequence[int | None] = (0,)
) -> list[float]:
    """The largest difference, as a share, of the norm of all gradients from that of a training on whole tensors; and of
    a parameter. The third of four steps is skipped: one entry, which one rank has, is not finite."""
    device_mesh = mesh_of(tuple(mesh) or (dist.get_world_size(),))
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    shapes = [shape for shape in SHAPES if len(shape) > max(dim or 0 for dim in dims)]
    alone = [nn.Parameter(value) for value in whole_parameters(shapes, torch.float32)]
    # Of the first every rank has all, by way of a DTensor; the last is none.
    params = [
        nn.Parameter(distribute_tensor(value, device_mesh, placements if i else [Replicate()] * len(placements)))
        for i, value in enumerate(whole_parameters(shapes, torch.float32)[:-1])
    ]
    params.append(nn.Parameter(whole_parameters(shapes, torch.float32)[-1]))
    options = {"max_grad_norm": 0.5, **options}
    ours, theirs = make(name, params, options), make(name, alone, options)
    found = [0.0, 0.0]
    for step in range(4):
        grads = whole_gradients(shapes, step, torch.float32)
        if step == 2:
            grads[1].view(-1)[0] = math.nan
        step_on(params, ours, grads)
        step_on(alone, theirs, grads)
        skipped = 1 if step > 1 else 0
        assert (ours.skipped_steps.item(), theirs.skipped_steps.item()) == (skipped, skipped)
        norm, other = ours.last_grad_norm.item(), theirs.last_grad_norm.item()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, norm)
        if step == 2:
            assert all(map(math.isnan, (*everyone, other)))
        else:
            assert len(set(everyone)) == 1, f"ranks have other norms: {everyone}"
            found[0] = max(found[0], abs(norm / other - 1))
        for param, single in zip(params, alone, strict=True):
            own = whole(param.detach())
            found[1] = max(found[1], (own.double() - single.detach().double()).abs().max().item())
    return found


def by_python_reader(*arguments: Any) -> str | None:
    """:func:`sharded_as_alone` where torch's C shim is not found."""
    make_reader, gradients._shim = gradients._shim, lambda: None
    try:
        return sharded_as_alone(*arguments)
    finally:
        gradients._shim = make_reader


# FSDP2


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, widths: Sequence[int] = (6, 11, 7, 3)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def batch(step: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1000 * step + rank)).to(dtype)


def fsdp_model(dtype: torch.dtype = torch.float32, mesh: Any = None, **options: Any) -> Model:
    model = Model(dtype)
    if mesh is not None:
        options["mesh"] = mesh
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def both_step(model: nn.Module, ours: Any, theirs: Any) -> str | None:
    """Steps a sharded model and one alone, which is given the same gradients, whole: None, or what differs then."""
    alone = [param for group in theirs.param_groups for param in group["params"]]
    for param, single in zip(model.parameters(), alone, strict=True):
        single.grad = None if param.grad is None else whole(param.grad).clone()
    ours.step()
    theirs.step()
    return difference(ours, theirs)


def tensor_parallel_as_alone(name: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> str | None:
    """FSDP2 over half of the ranks, and layers cut over the other, by rows and by columns."""
    mesh = mesh_of((2, 2))
    model, alone = (Model(dtype, (6, 12, 8, 3)) for _ in range(2))  # tensor parallelism wants even cuts
    parallelize_module(model, mesh["b"], {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()})
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["a"])
    fully_shard(model, mesh=mesh["a"])
    ours, theirs = make(name, model.parameters(), options), make(name, alone.parameters(), options)
    for step in range(3):
        ours.zero_grad()
        model(batch(step, mesh.get_local_rank("a"), dtype)).square().sum().backward()
        if (found := both_step(model, ours, theirs)) is not None:
            return f"after step {step + 1}: {found}"
    return None


def fsdp_as_alone(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    mesh: Sequence[int] = (),
    clip: float | None = None,
    steps: int = 3,
    compiled: bool = False,
    policy: str | None = None,
) -> str | None:
    """Whether FSDP2 has the bits of a single model that is given the gradients which FSDP2 has reduced."""
    policies: dict[str | None, dict[str, Any]] = {
        "mixed precision": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }
    model = fsdp_model(dtype, mesh_of(tuple(mesh)) if mesh else None, **policies.get(policy, {}))
    alone = Model(dtype)
    ours, theirs = make(name, model.parameters(), options), make(name, alone.parameters(), options)
    run = torch.compile(model, backend="eager") if compiled else model
    for step in range(steps):
        ours.zero_grad()
        run(batch(step, dist.get_rank(), dtype)).square().sum().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if (found := both_step(model, ours, theirs)) is not None:
            return f"after step {step + 1}: {found}"
    return None


def frozen_as_alone(options: dict[str, Any]) -> str | None:
    """Whether GradES freezes under FSDP2 what it freezes in a single model, and frozen parameters stay."""
    model, alone = fsdp_model(torch.float32), Model(torch.float32)
    ours, theirs = make("Signum", model.named_parameters(), options), make("Signum", alone.named_parameters(), options)
    watching = [GradES(optimizer, tau=0.01, grace_steps=1, every=1) for optimizer in (ours, theirs)]
    counts: list[int] = []
    for step in range(6):
        ours.zero_grad()
        model(batch(step, dist.get_rank(), torch.float32)).square().sum().backward()
        # As if one matrix had converged after the other, and of each matrix the part of a rank before the other's.
        for i, param in enumerate(model.parameters()):
            if param.grad is not None:
                param.grad.to_local().mul_(0.5 ** (step * (1 + i) + 6 * dist.get_rank()))
        if (found := both_step(model, ours, theirs)) is not None:
            return f"after step {step + 1}: {found}"
        names = [each.frozen for each in watching]
        if names[0] != names[1]:
            return f"after step {step + 1}: {names}"
        counts.append(len(names[0]))
    return None if len(set(counts)) > 2 else f"frozen after each step: {counts}"


# Checkpoints


def model_and_optimizer(name: str, options: dict[str, Any], dtype: torch.dtype, is_sharded: bool) -> tuple[Model, Any]:
    model = fsdp_model(dtype) if is_sharded else Model(dtype)
    return model, make(name, model.parameters(), options)


def train(model: Model, optimizer: Any, begin: int, end: int, dtype: torch.dtype) -> list[Tensor]:
    """The whole parameters after steps whose gradients are functions of the step alone."""
    params = list(model.parameters())
    for step in range(begin, end):
        step_on(params, optimizer, whole_gradients([tuple(param.shape) for param in params], step, dtype))
    return [whole(param.detach()).clone() for param in params]


def saved_and_trained_on(
    folder: str,
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    is_sharded: bool,
    flattened: bool,
    is_async: bool = False,
) -> list[Tensor]:
    """Trains three steps, saves, and trains three more."""
    model, optimizer = model_and_optimizer(name, options, dtype, is_sharded)
    train(model, optimizer, 0, 3, dtype)
    found = states(model, optimizer, flattened)
    if is_async:
        dcp.async_save(found, checkpoint_id=folder).result()
    else:
        dcp.save(found, checkpoint_id=folder)
    return train(model, optimizer, 3, 6, dtype)


def loaded_and_trained_on(
    folder: str, name: str, options: dict[str, Any], dtype: torch.dtype, is_sharded: bool, flattened: bool
) -> list[Tensor]:
    """Loads, and trains three steps more."""
    model, optimizer = model_and_optimizer(name, options, dtype, is_sharded)
    found = states(model, optimizer, flattened)
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=found["model"],
        optim_state_dict=found["optimizer"],
        options=StateDictOptions(flatten_optimizer_state_dict=flattened),
    )
    return train(model, optimizer, 3, 6, dtype)


def states(model: Model, optimizer: Any, flattened: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optimizer": optimizer_state}


def takes_over_adamw(folder: str) -> str | None:
    """Saves torch's AdamW over sharded parameters, and loads ours from that: None, or an entry that differs."""
    model = fsdp_model()
    theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, theirs, 0, 3, torch.float32)
    dcp.save(states(model, theirs, False), checkpoint_id=folder)
    model, ours = model_and_optimizer("AdamW", {"lr": 0.02}, torch.float32, True)
    found = states(model, ours, False)
    # It has no seed, no method and none of the other entries of our groups.
    dcp.load(found, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(model, ours, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    expected, state = theirs.state_dict()["state"], ours.state_dict()["state"]
    for number, entries in expected.items():
        for name, value in entries.items():
            if not torch.equal(whole(value), whole(state[number][name]).to(value.dtype)):
                return f"{name} of {number}"
    train(model, ours, 3, 4, torch.float32)
    return None


# Gradients that are released in backward


def released_as_not(name: str, options: dict[str, Any], dtype: torch.dtype, accumulates: bool) -> str | None:
    """Whether steps inside FSDP2's backward give the bits of steps after it."""
    models = [fsdp_model(dtype), fsdp_model(dtype)]
    ours, theirs = (make(name, model.parameters(), options) for model in models)
    release_gradients(models[0], ours)
    for step in range(3):
        for i, model in enumerate(models):
            for part in range(2 if accumulates else 1):
                if accumulates:
                    model.set_requires_gradient_sync(part == 1)
                model(batch(2 * step + part, dist.get_rank(), dtype)).square().sum().backward()
            if i == 0 and any(param.grad is not None for param in model.parameters()):
                return f"step {step + 1} has left a gradient"
        theirs.step()
        theirs.zero_grad()
        if (found := difference(ours, theirs)) is not None:
            return f"after step {step + 1}: {found}"
    return None


# Other gradients than the parameter's sharding has, and what is refused


def odd_gradients(kind: str, name: str = "SignAdamPP", dtype: torch.dtype = torch.float32) -> str | None:
    """Whether a step on gradients that are spread otherwise than the parameter has the bits of one on the whole."""
    mesh, shape = mesh_of((dist.get_world_size(),)), (8, 6)
    value = whole_parameters([shape], dtype)[0]
    placement = Replicate() if kind in ("partial on a copy", "shard on a copy") else Shard(0)
    param, alone = nn.Parameter(distribute_tensor(value, mesh, [placement])), nn.Parameter(value.clone())
    ours, theirs = make(name, [param], {"lr": 0.01}), make(name, [alone], {"lr": 0.01})
    for step in range(3):
        grad = whole_gradients([shape], step, dtype)[0]
        if kind.startswith("partial"):
            # Summands of small whole numbers, so that their sum is exact.
            grad = torch.arange(48.0).view(shape).sub(20 + step)
            given = DTensor.from_local(grad * (dist.get_rank() + 1), mesh, [Partial()], run_check=False)
            grad = grad * sum(range(1, dist.get_world_size() + 1))
        elif kind == "shard on a copy":
            given = distribute_tensor(grad, mesh, [Shard(0)])
        elif kind == "other dimension":
            given = distribute_tensor(grad, mesh, [Shard(1)])
        elif kind == "other strides":
            given = distribute_tensor(grad, mesh, [Shard(0)])
            given = DTensor.from_local(given.to_local().t().contiguous().t(), mesh, [Shard(0)], run_check=False)
        elif kind == "still under way":
            given = distribute_tensor(grad, mesh, [Shard(1)]).redistribute(mesh, [Shard(0)], async_op=True)
        elif kind == "under way here":
            part = AsyncCollectiveTensor(distribute_tensor(grad, mesh, [Shard(0)]).to_local())
            given = DTensor(part, param._spec, requires_grad=False)
        param.grad, alone.grad = given, grad
        ours.step()
        theirs.step()
        if (found := difference(ours, theirs)) is not None:
            return f"after step {step + 1}: {found}"
    return None


def error_of(kind: str) -> str:
    """What is said of a parameter, a gradient or a call that cannot be served; nothing must have been written."""
    world = dist.get_world_size()
    mesh = mesh_of((world,))
    value = whole_parameters([(4 * world, 6)], torch.float32)[0]
    param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    options: dict[str, Any] = {}
    name = "MSVAG" if kind == "variance" else "SignAdamPP"
    if kind == "variance":
        options = {"variance": "minibatch"}
    try:
        if kind == "summands":
            param = nn.Parameter(DTensor.from_local(value, mesh, [Partial()], run_check=False))
        if kind == "pieces":
            placements = [_StridedShard(0, split_factor=2)]
            param = nn.Parameter(DTensor.from_local(param.to_local().detach(), mesh, placements, run_check=False))
        if kind == "three cuts":
            cube, block = mesh_of((world, 1, 1)), torch.ones(2, 4, 4, 4)
            param = nn.Parameter(distribute_tensor(block, cube, [Shard(1), Shard(2), Shard(3)]))
        optimizer = make(name, [param], {"lr": 0.01, **options})
        param.grad = distribute_tensor(torch.ones_like(value), mesh, param.placements)
        if kind == "plain gradient":
            # Of the right shape, and at a later step than the first.
            param = nn.Parameter(distribute_tensor(value, mesh, [Replicate()]))
            optimizer = make(name, [param], {"lr": 0.0})
            param.grad = distribute_tensor(torch.ones_like(value), mesh, [Replicate()])
            optimizer.step()
            param.grad = None
            param.grad = torch.ones_like(value)
        if kind == "gradient elsewhere":
            other = mesh_of((world, 1))
            param.grad = distribute_tensor(torch.ones_like(value), other, [Shard(0), Replicate()])
        if kind == "columns":
            part = param.to_local().detach().t().contiguous().t()
            param = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False))
            optimizer = make(name, [param], {"lr": 0.01})
            param.grad = distribute_tensor(torch.ones_like(value), mesh, [Shard(0)])
        if kind == "samples":
            module = fsdp_model()
            per_sample_variance(module, nn.functional.mse_loss, (torch.ones(4, 6), torch.ones(4, 3)))
        if kind == "accumulated release":
            param.grad = None
            release_gradients([param], optimizer, accumulation_steps=2)
        if kind == "state file":
            optimizer.save_state("/nonexistent/file")
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        if kind not in ("summands", "pieces", "three cuts"):
            assert same_bits(whole(param.detach()), value), "the parameter has changed"
        return f"{type(error).__name__}: {error}"
    return "no error"


# Ranks that do not belong together


def error_of_ranks(kind: str, mesh: Sequence[int] = ()) -> str:
    """What is said on this rank, where rank 1 has something otherwise than the others."""
    is_other = dist.get_rank() == 1
    device_mesh = mesh_of(tuple(mesh) or (dist.get_world_size(),))
    placements = [Shard(0)] * device_mesh.ndim
    values = whole_parameters([(8, 3), (8, 3), (8, 2)], torch.float32)
    params = [nn.Parameter(distribute_tensor(value, device_mesh, placements)) for value in values]
    if kind == "two meshes":
        # One that only this row of the mesh has: ranks that find the difference there must not leave the others alone.
        params.append(nn.Parameter(distribute_tensor(values[0], device_mesh["b"], [Shard(0)])))
    options: dict[str, Any] = {"lr": 0.01, "alpha": 0.1, "seed": 3}
    given = params
    if is_other:
        other_seed = {"seed": 4}
        others = {"lr": {"lr": 0.02}, "alpha": {"alpha": 0.2}, "seed": other_seed, "two meshes": other_seed}
        options |= others.get(kind, {})
        given = {"order": params[::-1], "number": params[:2]}.get(kind, params)
    optimizer = make("SignSGD" if kind == "class" and is_other else "SignAdamPP", given, {**options})
    version = ranks.__version__
    try:
        if kind == "version" and is_other:
            ranks.__version__ = "0.0.1"
        for param in params:
            param.grad = distribute_tensor(torch.ones_like(param.full_tensor()), param.device_mesh, param.placements)
        optimizer.step()
    except RuntimeError as error:
        for param, value in zip(params, values, strict=False):
            assert torch.equal(param.full_tensor(), value), "a parameter has changed"
        return str(error)
    finally:
        ranks.__version__ = version
    return "no error"


# FSDP's first version


def first_fsdp(confidence: str, original: bool) -> str | None:
    """Trains under FullyShardedDataParallel: the error of a step, or None where ranks agree and weights have moved."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Model(), use_orig_params=original, device_id=torch.device("cpu"))
    optimizer = make("SignAdamPP", model.parameters(), {"lr": 0.01, "confidence": confidence, "state_dtype": "int2"})
    with FullyShardedDataParallel.summon_full_params(model):
        before = [param.detach().clone() for param in model.parameters()]
    try:
        for step in range(2):
            model(batch(step, dist.get_rank())).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    except TypeError as error:
        return str(error)
    with FullyShardedDataParallel.summon_full_params(model):
        for param, old in zip(model.parameters(), before, strict=True):
            first = param.detach().clone()
            dist.broadcast(first, 0)
            if not same_bits(first, param.detach()) or torch.equal(param.detach(), old):
                return "ranks differ, or nothing has moved"
    return None


def first_fsdp_resumed(options: dict[str, Any], dtype: torch.dtype, original: bool) -> str | None:
    """Goes on from FSDP.optim_state_dict: the error, or None where parameters have the bits of who went on unsaved."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        layers = Model(dtype)
        model = FullyShardedDataParallel(layers, use_orig_params=original, device_id=torch.device("cpu"))
        return model, make("SignAdamPP", model.parameters(), {"lr": 0.01, **options})

    def step(model: nn.Module, optimizer: Any, number: int) -> None:
        optimizer.zero_grad()
        model(batch(number, dist.get_rank(), dtype)).square().sum().backward()
        optimizer.step()

    model, optimizer = made()
    for number in range(2):
        step(model, optimizer, number)
    other, resumed = made()
    other.load_state_dict(model.state_dict())
    try:
        saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        resumed.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(other, resumed, saved))
    except (AssertionError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    step(model, optimizer, 2)
    step(other, resumed, 2)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return None if all(same_bits(a.detach(), b.detach()) for a, b in pairs) else "another step than without saving"


# Data parallelism


def data_parallel(options: dict[str, Any], accumulates: bool) -> str | None:
    """Trains under DistributedDataParallel: None where all ranks have the bits of one training on the mean gradient."""
    model, alone = nn.parallel.DistributedDataParallel(Model()), Model()
    ours, theirs = (make("SignAdamPP", each.parameters(), {"lr": 0.01, **options}) for each in (model, alone))
    for step in range(3):
        ours.zero_grad()
        if accumulates:
            with model.no_sync():
                model(batch(100 + step, dist.get_rank())).square().sum().backward()
        model(batch(step, dist.get_rank())).square().sum().backward()
        if (found := both_step(model, ours, theirs)) is not None:
            return f"after step {step + 1}: {found}"
    for param in model.parameters():
        first = param.detach().clone()
        dist.broadcast(first, 0)
        if not same_bits(first, param.detach()):
            return "ranks differ"
    return None


def redundancy_free(name: str) -> str | None:
    """Trains under ZeroRedundancyOptimizer: None where all ranks have the bits of one training alone."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, alone = Model(), Model()
    ours = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=getattr(signadam_ext, name), lr=0.01)
    theirs = make(name, alone.parameters(), {"lr": 0.01})
    for step in range(4):
        for each, optimizer in ((model, ours), (alone, theirs)):
            optimizer.zero_grad()
            each(batch(step, 0)).square().sum().backward()
            optimizer.step()
        for i, (param, single) in enumerate(zip(model.parameters(), alone.parameters(), strict=True)):
            if not same_bits(param.detach(), single.detach()):
                return f"parameter {i} after step {step + 1}"
    ours.consolidate_state_dict(0)
    if dist.get_rank() == 0:
        saved = ours.state_dict()["state"]
        for number, entries in theirs.state_dict()["state"].items():
            if not same_bits(saved[number]["exp_avg"], entries["exp_avg"]):
                return f"exp_avg of {number}"
    return None


def step_without_rank_1(seconds: float) -> str:
    """The error of a step whose threshold both ranks have to agree on, and to which one does not come."""
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    mesh = DeviceMesh.from_group(group, "cpu")
    value = whole_parameters([(8, 3)], torch.float32)[0]
    param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    optimizer = make("SignAdamPP", [param], {"lr": 0.01, "confidence": "adaptive"})
    param.grad = distribute_tensor(torch.ones_like(value), mesh, [Shard(0)])
    optimizer.step()
    before = param.detach().to_local().clone()
    if dist.get_rank() == 1:
        return "stayed away"
    try:
        optimizer.step()
    except RuntimeError as error:
        assert same_bits(param.detach().to_local(), before), "the parameter has changed"
        return str(error)
    return "no error"


def under_way(by_python: bool = False) -> str | None:
    """Whether a parameter whose part a collective still writes is stepped as one that is there."""
    make_reader = gradients._shim
    gradients._shim = (lambda: None) if by_python else make_reader
    try:
        mesh, shape = mesh_of((dist.get_world_size(),)), (8, 6)
        value = whole_parameters([shape], torch.float32)[0]
        cut = distribute_tensor(value, mesh, [Shard(0)])
        param = nn.Parameter(cut.redistribute(mesh, [Replicate()], async_op=True))
        alone = nn.Parameter(value.clone())
        if not isinstance(param._local_tensor, AsyncCollectiveTensor):
            return "the part was there already"
        ours, theirs = make("SignAdamPP", [param], {"lr": 0.01}), make("SignAdamPP", [alone], {"lr": 0.01})
        for step in range(3):
            step_on([param], ours, whole_gradients([shape], step, torch.float32))
            step_on([alone], theirs, whole_gradients([shape], step, torch.float32))
            if (found := difference(ours, theirs)) is not None:
                return f"after step {step + 1}: {found}"
    finally:
        gradients._shim = make_reader
    return None


# What a step leaves alone


def step_beside_others() -> str | None:
    """A step beside frozen DTensors of any kind, and with a parameter without dimensions, whose state is loaded."""
    mesh, world = mesh_of((dist.get_world_size(),)), dist.get_world_size()
    value = whole_parameters([(4 * world, 6)], torch.float32)[0]
    param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    scale = nn.Parameter(distribute_tensor(torch.tensor(1.5), mesh, [Replicate()]))
    summands = nn.Parameter(DTensor.from_local(value, mesh, [Partial()], run_check=False), requires_grad=False)
    part = param.to_local().detach().t().contiguous().t()
    columns = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False), requires_grad=False)
    groups = [{"params": [param, scale, summands, columns], "mine": object()}]
    optimizer = make("SignAdamPP", groups, {"lr": 0.01})
    for _ in range(2):
        param.grad = distribute_tensor(torch.ones_like(value), mesh, [Shard(0)])
        scale.grad = distribute_tensor(torch.tensor(2.0), mesh, [Replicate()])
        optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    momentum = optimizer.state[scale]["exp_avg"]
    if set(optimizer.state) != {param, scale} or not same_bits(momentum, whole(saved["state"][1]["exp_avg"])):
        return "state has changed on the way"
    return None if not same_bits(whole(param.detach()), value) else "nothing has moved"

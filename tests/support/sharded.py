"""What ranks run in the tests of sharded training: one training, sharded or not, on the same gradients.

Every function here is called on all ranks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.paper_formulas import TABLE
from support.strategies import same_bits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import signadam_ext

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


def mesh_of(shape: Sequence[int]) -> Any:
    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=tuple("abc"[: len(shape)]))


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
    device_mesh = mesh_of(mesh or (dist.get_world_size(),))
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    alone = [nn.Parameter(value) for value in whole_parameters(shapes, dtype)]
    params = [
        nn.Parameter(distribute_tensor(value, device_mesh, placements)) for value in whole_parameters(shapes, dtype)
    ]
    ours, theirs = make(name, params, options), make(name, alone, options)
    for step in range(steps):
        grads = whole_gradients(shapes, step, grad_dtype or dtype)
        step_on(params, ours, grads)
        step_on(alone, theirs, grads)
        if (found := difference(ours, theirs)) is not None:
            return f"after step {step + 1}: {found}"
    return None


# FSDP2


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((6, 11), (11, 7), (7, 3)))
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


def fsdp_as_alone(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    mesh: Sequence[int] = (),
    clip: float | None = None,
    steps: int = 3,
    compiled: bool = False,
) -> str | None:
    """Whether FSDP2 has the bits of a single model that is given the gradients which FSDP2 has reduced."""
    model = fsdp_model(dtype, mesh_of(mesh) if mesh else None)
    alone = Model(dtype)
    ours, theirs = make(name, model.parameters(), options), make(name, alone.parameters(), options)
    run = torch.compile(model, backend="eager") if compiled else model
    for step in range(steps):
        ours.zero_grad()
        run(batch(step, dist.get_rank(), dtype)).square().sum().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for param, single in zip(model.parameters(), alone.parameters(), strict=True):
            single.grad = param.grad.full_tensor()
        ours.step()
        theirs.step()
        if (found := difference(ours, theirs)) is not None:
            return f"after step {step + 1}: {found}"
    return None


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

"""What ranks must have alike to train one model: compared once, before an optimizer's first step on sharded parameters.

A difference would show later, as ranks whose parts no longer belong together, or as a wait without end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .._version import __version__
from ..core import shards
from .groups import GroupedOptimizer, label


def compare(optimizer: GroupedOptimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises on all ranks where they do not have the same optimizer; communicates if a parameter is sharded.

    Args:
        optimizer: of this rank.
        groups: its groups, as they were read for this step.

    Raises:
        RuntimeError: another version, class, hyperparameter or seed, or other parameters, on some rank.
    """
    meshes = {param.device_mesh: None for group in groups for param in group["params"] if shards.is_sharded(param)}
    # In one order on all ranks: each may be in other meshes of a kind, and have parameters in another order.
    own_meshes = sorted(
        (mesh for mesh in meshes if mesh.get_coordinate() is not None),
        key=lambda mesh: (mesh.ndim, mesh.mesh.flatten().tolist()),
    )
    if not own_meshes:
        return
    own = _told(optimizer, groups)
    differing = [mesh for mesh in own_meshes if len(set(_gathered(mesh, digest(own)).values())) > 1]
    told = [_gathered(mesh, own) for mesh in differing]
    for each in told:
        refuse_differences(each)


def digest(told: Mapping[str, str]) -> str:
    """What ranks compare first: of a thousand of them all that they have would be much, where it is the same."""
    return hashlib.sha256(repr(dict(told)).encode()).hexdigest()


def _told(optimizer: GroupedOptimizer, groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is to be the same, by what an error calls it."""
    told = {
        "the version of signadam_ext": __version__,
        "the optimizer": type(optimizer).__qualname__,
        "the number of parameter groups": str(len(groups)),
    }
    for index, group in enumerate(groups):
        # A rank's own, experts for example, may be others than elsewhere, as long as the shared ones keep their places.
        spread = [(i, param) for i, param in enumerate(group["params"]) if shards.is_sharded(param)]
        told[f"the number of sharded parameters of group {index}"] = str(len(spread))
        for i, param in spread:
            told[label(group, index, i)] = f"{tuple(param.shape)}, {param.dtype}, {tuple(param.placements)}"
        # Other entries are a user's.
        for name in sorted(group.keys() & optimizer.defaults.keys()):
            told[f"{name} of group {index}"] = shown(group[name])
    return told


def shown(value: Any) -> str:
    """A hyperparameter as text that is the same on all ranks."""
    if callable(value) and not isinstance(value, Tensor):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return repr(value.tolist() if isinstance(value, Tensor) else value)


def _gathered(mesh: Any, value: Any) -> dict[int, Any]:
    """A value of every rank of a mesh, by rank."""
    import torch.distributed as dist

    found = {dist.get_rank(): value}
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, found, group=group)
        found = {rank: value for part in parts for rank, value in part.items()}
    return dict(sorted(found.items()))


def refuse_differences(told: Mapping[int, Mapping[str, str]], what: str = "optimizer") -> None:
    """Raises with the first thing that ranks do not have alike.

    Args:
        told: of each rank, what must be the same, by what an error calls it.
        what: all of it belongs to.

    Raises:
        RuntimeError: values that differ, with the ranks that have each.
    """
    for name in dict.fromkeys(name for own in told.values() for name in own):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, own in told.items():
            ranks_by_value.setdefault(own.get(name, "missing"), []).append(rank)
        if len(ranks_by_value) > 1:
            values = "; ".join(
                f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                for value, ranks in ranks_by_value.items()
            )
            raise RuntimeError(f"ranks do not have the same {what}: {name} is {values}. No parameter has been updated")

"""Tensors that lie in parts on the ranks of a device mesh (DTensor): the part of this rank, and where it lies.

A step works on the parts where they lie. ``torch.distributed.tensor`` is not imported here: who has a DTensor has
imported it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .shard_index import WHOLE, ShardIndex


@dataclass(frozen=True, slots=True, eq=False)
class Sharding:
    """How a tensor is spread over a mesh, and which part of it is this rank's.

    Attributes:
        spec: what torch keeps of it; a gradient of the same sharding mostly has the same object.
        mesh, placements: as of the DTensor.
        shape, stride: of the whole tensor.
        is_split: whether ranks have different parts.
        index: where the elements of this rank's part lie in the whole tensor, row by row.
        first, part: where this rank's part begins in each dimension, and its shape.
    """

    spec: Any
    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    is_split: bool
    index: ShardIndex
    first: tuple[int, ...]
    part: tuple[int, ...]

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that it has whole, as a view."""
        for dim, (begin, size) in enumerate(zip(self.first, self.part, strict=True)):
            whole = whole.narrow(dim, begin, size)
        return whole

    def whole(self, part: Tensor) -> Tensor:
        """A tensor of this rank's shape as the DTensor that the parts on all ranks make up."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of this rank, without a copy; a tensor that is no DTensor is its own."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        # What a collective still writes is a tensor of torch's own class, to be waited for. The one that it wraps takes
        # its place, so that a step finds the part of a parameter where it lay when the plan was made.
        wait = getattr(tensor._local_tensor, "wait", None)  # type: ignore[attr-defined]
        if wait is not None:
            tensor._local_tensor = wait()  # type: ignore[attr-defined]
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP's first version has put this into a flat parameter of which each rank keeps a part."""
    return bool(getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False))


def sharding_of(label: str, param: Tensor) -> Sharding | None:
    """How a parameter is spread over a mesh; None for a tensor that is no DTensor.

    Raises:
        TypeError: a parameter of which ranks have summands, not parts (a ``Partial`` placement), or pieces that lie
            apart, or that is cut on three dimensions behind the first.
    """
    if not is_sharded(param):
        return None
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = param.device_mesh, tuple(param.placements)  # type: ignore[attr-defined]
    # A strided shard is no Shard in every version, and has its dimension too.
    splits = [(i, placement) for i, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    for _, placement in splits:
        if not hasattr(placement, "dim"):
            raise TypeError(
                f"{label} is a DTensor with the placement {placement}: its parts must be shards or copies of the "
                "parameter; redistribute it"
            )
    for i, placement in splits:
        if hasattr(placement, "split_factor") and not _fills(mesh, splits, i, placement):
            raise TypeError(
                f"{label} is a DTensor with the placements {placements}, which give a rank pieces that lie apart: "
                "redistribute it"
            )
    shape = param.shape
    # Decided by the whole, so that ranks with a small part do not go on where others raise.
    if len({placement.dim for _, placement in splits} - {0}) > 2:
        raise TypeError(
            f"{label} is a DTensor with the placements {placements}: its part is cut on three dimensions behind the "
            "first; redistribute it"
        )
    # Torch computes with tensors there, of which a mode, FakeTensorMode for example, would make its own.
    with torch._C._DisableTorchDispatch():
        part, first = compute_local_shape_and_global_offset(shape, mesh, placements)
    index = WHOLE
    if 0 in part:  # torch gives an offset that is none; and of a rank outside of the mesh another number of sizes
        part = tuple(local(param).shape) if len(part) == len(shape) else (0, *shape[1:])
        first = (0,) * len(shape)
    else:
        try:
            index = ShardIndex.of(shape, first, part)
        except ValueError as error:
            raise TypeError(
                f"{label} is a DTensor with the placements {placements}: {error}; redistribute it"
            ) from None
    return Sharding(
        spec=param._spec,  # type: ignore[attr-defined]
        mesh=mesh,
        placements=placements,
        shape=shape,
        stride=param.stride(),
        is_split=bool(splits),
        index=index,
        first=tuple(first),
        part=tuple(part),
    )


def _fills(mesh: Any, splits: Sequence[tuple[int, Any]], index: int, placement: Any) -> bool:
    """Whether the pieces of a strided shard lie side by side, because later dimensions of the mesh split them again."""
    later = [mesh.size(i) for i, other in splits if i > index and other.dim == placement.dim]
    return bool(math.prod(later) == placement.split_factor)


def aligned(label: str, value: Tensor, sharding: Sharding) -> Tensor:
    """This rank's part of a tensor of the parameter's shape; communicates where it is spread otherwise.

    Args:
        label: what errors call it.
        value: a DTensor of any placements, or a plain tensor that every rank has whole.
        sharding: of the parameter.

    Raises:
        ValueError: another mesh or another shape.
    """
    if value.shape != sharding.shape:
        raise ValueError(f"{label} has shape {tuple(value.shape)}: must be the parameter's, {tuple(sharding.shape)}")
    if not is_sharded(value):
        return sharding.cut(value)
    if _lies_like(value, sharding):
        return local(value)
    if value.device_mesh != sharding.mesh:  # type: ignore[attr-defined]
        raise ValueError(f"{label} is spread over another mesh than its parameter: must be over {sharding.mesh}")
    moved = value.int() if value.dtype == torch.int16 else value  # which gloo does not move
    return local(moved.redistribute(sharding.mesh, sharding.placements)).to(value.dtype)  # type: ignore[attr-defined]


def gradient(label: str, grad: Tensor, sharding: Sharding) -> Tensor:
    """This rank's part of a parameter's gradient, summed and spread as the parameter is; communicates where it is not.

    Raises:
        TypeError: a plain tensor, of which nothing says what other ranks have.
        ValueError: another mesh or another shape.
    """
    if not is_sharded(grad):
        raise TypeError(f"the gradient of {label} is a plain tensor: must be a DTensor, as the parameter is")
    return aligned(f"the gradient of {label}", grad, sharding)


def like_gradient(label: str, grad: Tensor, param: Tensor, sharding: Sharding) -> Tensor:
    """What :func:`gradient` will give, without communication: its numbers need not be those of the gradient.

    Raises:
        TypeError, ValueError: as :func:`gradient`.
    """
    if is_sharded(grad) and grad.shape == sharding.shape and not _lies_like(grad, sharding):
        return torch.empty_like(param, dtype=grad.dtype, requires_grad=False)
    return gradient(label, grad, sharding)


def _lies_like(value: Tensor, sharding: Sharding) -> bool:
    """Whether a DTensor is spread over the ranks as the parameter is."""
    spec = value._spec  # type: ignore[attr-defined]
    if spec is sharding.spec:
        return True
    # Some versions take a strided shard for equal to one that is not.
    own, others = (
        [(type(place), place, getattr(place, "split_factor", None)) for place in placements]
        for placements in (spec.placements, sharding.placements)
    )
    return bool(spec.mesh == sharding.mesh and own == others)

"""The backends by name, and the one for a device."""

from __future__ import annotations

import functools
import warnings

import torch

from ..core import checks
from ..core.options import BACKENDS
from .base import Backend


@functools.cache
def get(name: str) -> Backend:
    """The backend of that name, imported when it is first asked for."""
    if name == "reference":
        from .reference.backend import ReferenceBackend

        return ReferenceBackend()
    if name == "cpu":
        from .cpu import CpuBackend

        return CpuBackend()
    if name == "cuda":
        from .cuda import CudaBackend

        return CudaBackend()
    from .triton import TritonBackend

    return TritonBackend()


#: What ``backend="auto"`` tries, by device type; everything else is left to the reference.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def check_usable(name: str) -> None:
    """Raises unless a backend is "auto" or one that this installation has at all.

    Raises:
        RuntimeError: a backend that cannot serve any tensor here, with the reason.
    """
    if name != "auto" and (reason := get(name).unusable(None)) is not None:
        raise RuntimeError(f"backend={name!r} cannot be used here: {reason}")


def choose(name: str, device: torch.device, label: str) -> Backend:
    """The backend for a tensor.

    Raises:
        RuntimeError: the named backend cannot serve the device.
    """
    if name != "auto":
        backend = get(checks.one_of("backend", name, ("auto", *BACKENDS)))
        if (reason := backend.unusable(device)) is not None:
            raise RuntimeError(f"backend={name!r} cannot serve {label} on {device}: {reason}; use backend='auto'")
        return backend
    return _automatic(device)


@functools.cache
def _automatic(device: torch.device) -> Backend:
    reasons: list[str] = []
    for name in PREFERENCE.get(device.type, ()):
        backend = get(name)
        if (reason := backend.unusable(device)) is None:
            if reasons:
                warnings.warn(f"signadam_ext uses {name} on {device}: {'; '.join(reasons)}", stacklevel=2)
            return backend
        reasons.append(f"{name} cannot, because {reason}")
    if reasons:
        warnings.warn(f"signadam_ext uses the slow reference on {device}: {'; '.join(reasons)}", stacklevel=2)
    return get("reference")

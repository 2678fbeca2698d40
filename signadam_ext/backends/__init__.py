"""Backends: what takes a bucket of tensors and scalars, and updates them.

Each is a module with one class; :func:`choose` finds the one for a device.
"""

from .base import (
    Backend,
    DeviceBackend,
    DeviceKernels,
    DeviceLaunch,
    HostLaunch,
    Launch,
    ScalarSet,
    StreamedLaunch,
    commit,
)
from .bucket import Bucket, Entry
from .registry import PREFERENCE, check_usable, choose, get

__all__ = [
    "PREFERENCE",
    "Backend",
    "Bucket",
    "DeviceBackend",
    "DeviceKernels",
    "DeviceLaunch",
    "Entry",
    "HostLaunch",
    "Launch",
    "ScalarSet",
    "StreamedLaunch",
    "check_usable",
    "choose",
    "commit",
    "get",
]

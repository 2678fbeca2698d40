"""Profiles of the property tests, and skips that say why."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# A fixed seed: the suite is the same every time. `--hypothesis-profile=long` draws afresh, for minutes.
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("suite", max_examples=160, derandomize=True, **COMMON)
settings.register_profile("medium", max_examples=80, derandomize=True, **COMMON)
settings.register_profile("report", max_examples=20, derandomize=True, **COMMON)
settings.register_profile("short", max_examples=15, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=20_000, derandomize=False, **COMMON)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-actions", type=int, default=2000, help="actions of tests/test_fuzz.py, 10^6 for a night")
    parser.addoption("--fuzz-seed", type=int, default=7, help="its seed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = "no CUDA device: torch " + (f"{torch.__version__} sees none" if torch.version.cuda else "is a CPU build")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))

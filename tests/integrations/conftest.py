"""Libraries that people train with, at the versions that docs/integrations.md names; skipped without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from support.ranks import Ranks

# Asked for before anything imports them: nothing is looked up in a network, and nothing is told to one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """``ranks(2).run(function, ...)`` runs a function on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    made: dict[int, Ranks] = {}
    yield lambda count: made.setdefault(count, Ranks(count, folder))
    for each in made.values():
        each.stop()

"""Groups of processes, started by the first test that asks and kept for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """``ranks(4).run(function, ...)`` runs a function on four ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    made: dict[int, Ranks] = {}
    yield lambda count: made.setdefault(count, Ranks(count, folder))
    for each in made.values():
        each.stop()

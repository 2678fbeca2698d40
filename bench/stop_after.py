"""A plugin of pytest: ``-p bench.stop_after --stop-after 100`` skips what has not begun after so many seconds.

A run that ends by itself says what it has done; one that is killed says nothing.
"""

import time

import pytest

_BEGIN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stop-after", type=float, metavar="SECONDS", help="skip tests that have not begun by then")


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--stop-after")
    if limit is not None and time.monotonic() - _BEGIN > limit:
        pytest.skip(f"the time limit of {limit:.0f} s")

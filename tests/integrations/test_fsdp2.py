"""Accelerate shards by FSDP2 on two ranks: prepared, clipped, accumulated, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import accelerated
from support.ranks import Ranks
from support.tiny import OPTIONS, same

pytest.importorskip("accelerate")


@pytest.mark.parametrize(("name", "options"), [("SignAdamPP", OPTIONS), ("AdamW", {"lr": 1e-2})])
def test_the_bits_of_plain_fsdp2(
    ranks: Callable[[int], Ranks], name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    plain = ranks(2).run(accelerated.plain, name, options, 4)
    for expected, found in zip(plain, ranks(2).run(accelerated.prepared, name, options, str(tmp_path)), strict=True):
        assert same(found["undisturbed"], expected)
        assert same(found["loaded"], found["saved"]) and not same(found["saved"], expected)
        assert same(found["resumed"], expected)

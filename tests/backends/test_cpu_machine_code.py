"""Which loops of the CPU kernels have a function of their own in the module."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

import signadam_ext._C as _C
from signadam_ext.core.formats import BF16, CODES


@pytest.fixture(scope="module")
def functions() -> set[tuple[str, str]]:
    """By their instruction set, without arguments."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("no nm, which comes with a compiler")
    listed = subprocess.run([tool, "-C", _C.__file__], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"signadam::cpu::(\w+)::\(anonymous namespace\)::(\w+<[^>]*>)", listed))
    if not found:
        pytest.skip("the module's symbols have been stripped")
    return found


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_loops_over_memory_are_functions_of_their_own(functions: set[tuple[str, str]], capability: str) -> None:
    """GCC had joined them with what chooses among them, and kept scalars and constants on the stack."""
    if not any(own == capability for own, _ in functions):
        pytest.skip("not built for this processor")
    rule = "signadam::SignAdamPP"
    expected = {f"update_fp32<{rule}>", f"update_blocks<{rule}>", f"update_observed<{rule}>"}
    for as_it_is in ("true", "false"):
        expected.add(f"update_groups<{rule}, {as_it_is}>")
        forms = (BF16, *CODES.values())
        expected |= {f"update_pairs<{rule}, (signadam::Format){form.number}, {as_it_is}>" for form in forms}
    assert expected <= {name for own, name in functions if own == capability}

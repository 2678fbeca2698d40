"""Words that were coined here have given way to those of torch and the field, in code (prose may use them)."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Each with what is said instead.
GONE = {
    "Observed": "ChunkStatistics",
    "observed": "chunk_statistics",
    "gate": "threshold_state",
    "Form": "Format",
    "FORMS": "FORMATS",
    "beside": "residual",
    "BESIDE": "RESIDUALS",
    "said_beside": "moment_tags",
    "noise": "rng_keys",
    "Noise": "RngKey",
    "third": "aux",
    "THIRD": "AUX",
    "gappy": "non_dense",
    "waves": "overlap_levels",
    "Resident": "StreamGuarded",
    "_Whole": "_ModuleWithLoss",
    "_Spread": "_Welford",
    "_TensorBytes": "Kept",
    "GATHER": "SAME_PASS",
    "gather": "same_pass",
    "Weights": "ParamStorage",
    "WEIGHTS": "PARAM_STORAGES",
    "as_is": "nearest",
    "AS_IS": "NEAREST",
    "effective_weights": "effective_param_storage",
    "low_of_master": "remainder_of_master",
    "LOW_AT": "RESIDUAL_AT",
    "slot": "index",
    "_Slot": "_Progress",
    "FIRST_AT": "SHARD_OFFSET_AT",
    "Row": "ScalarSet",
    "ScalarRow": "ScalarSet",
    "rows_by_step": "scalars_by_step",
    "Reader": "GradientReader",
    "PieceNoise": "PieceBits",
    "_places": "_known_memory",
}
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".inl"}
SOURCES = [
    path
    for folder in ("signadam_ext", "triton_kernels", "csrc")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in SUFFIXES
]


def names_in(path: Path) -> set[str]:
    """The identifiers of a source, without its comments and strings."""
    text = path.read_text()
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return {token.string for token in tokens if token.type == tokenize.NAME}
    code = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"', " ", text, flags=re.DOTALL)
    return set(re.findall(r"[A-Za-z_]\w*", code))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_coined_words_are_gone(path: Path) -> None:
    found = {word: GONE[word] for word in names_in(path) & GONE.keys()}
    assert not found


def test_they_would_be_found(tmp_path: Path) -> None:
    for name, text in {"a.py": "gappy = 1  # noise", "a.h": "// noise\nint gappy;"}.items():
        path = tmp_path / name
        path.write_text(text)
        assert names_in(path) & GONE.keys() == {"gappy"}


def test_there_are_sources() -> None:
    assert {path.parent.name for path in SOURCES} >= {"core", "block", "cpu", "cuda", "python", "triton_kernels"}

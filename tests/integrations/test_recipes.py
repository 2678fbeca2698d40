"""The snippets of docs/integrations.md, run as printed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tiny import batch, copies, loss_of, network
from support.toolchain import ROOT

from reporting.commands import blocks

PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
SNIPPETS = [block.lines for block in blocks(PAGE) if block.language == "python"]
#: Names of the packages that a snippet imports, by which it is known.
IMPORTS = [
    re.findall(r"^(?:from|import) (?!signadam_ext|torch\b)(\w+)", snippet, re.MULTILINE) or ["torch"]
    for snippet in SNIPPETS
]


class Examples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """What transformers' Trainer hands to a model, which names its arguments."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": batch(index)[0]}


class Scored(torch.nn.Module):
    """A network that answers with its loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": loss_of(self.layers, x)}


@pytest.fixture
def in_folder(tmp_path: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    yield
    os.chdir(before)


def test_every_library_of_the_page_has_a_snippet() -> None:
    named = {name for imports in IMPORTS for name in imports}
    assert {"transformers", "accelerate", "lightning", "peft", "pytorch_optimizer", "schedulefree", "torch"} == named


def test_the_versions_of_the_page_are_those_that_ci_installs() -> None:
    pinned = re.findall(r'"(\w+)==([\d.]+)",$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(pinned) == 7
    table = PAGE[: PAGE.index("torchtitan")]
    assert sorted(re.findall(r"\b\d+\.\d+\.\d+\b", table)) == sorted(version for _, version in pinned)


@pytest.mark.parametrize("number", range(len(SNIPPETS)), ids=["-".join(imports) for imports in IMPORTS])
@pytest.mark.usefixtures("in_folder")
def test_a_snippet_trains(number: int) -> None:
    for name in IMPORTS[number]:
        pytest.importorskip(name)
    model = Scored() if "transformers" in IMPORTS[number] else network()
    before = copies(model.parameters())
    names = {
        "model": model,
        "dataset": Examples(),
        "loader": torch.utils.data.DataLoader([batch(index) for index in range(4)], batch_size=None),
        "loss_of": loss_of,
    }
    exec(compile(SNIPPETS[number], "docs/integrations.md", "exec"), names)
    trained = copies(param for param in names["model"].parameters() if param.requires_grad)
    assert all(param.isfinite().all() for param in trained)
    pairs = zip(before, copies(model.parameters()), strict=False)
    assert "peft" in IMPORTS[number] or not any(torch.equal(one, other) for one, other in pairs)

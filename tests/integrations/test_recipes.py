"""The snippets of docs/integrations.md, run as printed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import megatron
from support import torchtune_interface as torchtune
from support.recipes import PAGE, block_of, versions_of_the_table
from support.tiny import batch, copies, loss_of, network
from support.toolchain import ROOT
from support.torchvision_stub import import_timm

from reporting.commands import blocks
from signadam_ext.integrations import TESTED
from signadam_ext.training import replacement

SNIPPETS = [block.lines for block in blocks(PAGE) if block.language == "python"]


def imports_of(snippet: str) -> list[str]:
    """Names of the packages that a snippet imports, and of the plugins, by which it is known."""
    packages = re.findall(r"^(?:from|import) (?!signadam_ext|torch\b)(\w+)", snippet, re.MULTILINE)
    plugins = re.findall(r"signadam_ext\.integrations(?:\.| import )(\w+)", snippet)
    return list(dict.fromkeys([*packages, *plugins])) or ["torch"]


IMPORTS = [imports_of(snippet) for snippet in SNIPPETS]
#: Libraries whose recipes are configs, which the tests of the library take from the page.
CONFIGURED = ("axolotl", "LLaMA-Factory", "torchtune")


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


def test_every_library_of_the_page_has_a_recipe() -> None:
    named = {name for imports in IMPORTS for name in imports} - {"torch"}
    assert named == {
        *("transformers", "accelerate", "lightning", "peft", "pytorch_optimizer", "schedulefree"),
        *(TESTED.keys() - {"axolotl"}),
    }
    assert all(block_of(name, "yaml") for name in CONFIGURED)


def pins(path: str, pattern: str) -> dict[str, str]:
    return dict(re.findall(pattern, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE))


def test_the_versions_of_the_page_are_those_that_are_tested() -> None:
    extra = pins("pyproject.toml", r'"(\w+)==([\d.]+)",$')
    assert len(extra) == 7
    plugins = {name: version for versions in TESTED.values() for name, version in versions.items()}
    wheels = pins("tests/integrations/wheels.txt", r"^([\w-]+)==([\d.]+)$")
    assert wheels.items() >= {name: plugins[name] for name in plugins.keys() & wheels.keys()}.items()
    assert plugins.keys() - wheels.keys() == {"megatron-core", "emerging-optimizers"}
    written = [version for versions in versions_of_the_table() for version in re.findall(r"\d+\.\d+\.\d+", versions)]
    # Accelerate has two rows.
    assert sorted(written) == sorted([*extra.values(), extra["accelerate"], *plugins.values(), torchtune.VERSION])


def sft_of(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of LLaMA-Factory's run, which would load a model and data: its trainer with the config of the page."""
    source = importlib.metadata.distribution("llamafactory").locate_file("llamafactory/v1/trainers/sft_trainer.py")
    assert "\ndef run_sft(" in Path(str(source)).read_text(encoding="utf-8")
    module = ModuleType("llamafactory.v1.trainers.sft_trainer")

    def run_sft() -> None:
        import yaml
        from support.llamafactory import trainer_of

        trainer_of(yaml.safe_load(block_of("LLaMA-Factory", "yaml"))["optim_config"], model, 4).fit()

    module.__dict__["run_sft"] = run_sft
    monkeypatch.setitem(sys.modules, module.__name__, module)


def prepare(imports: list[str], model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips what is not installed, and puts in place what a snippet asks for and a test cannot have."""
    if "megatron" in imports:
        megatron.put_in_place(monkeypatch)
        return
    for name in imports:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if "timm" in imports:
        import_timm()
    if "llamafactory" in imports:
        sft_of(model, monkeypatch)


@pytest.mark.parametrize("number", range(len(SNIPPETS)), ids=["-".join(imports) for imports in IMPORTS])
@pytest.mark.usefixtures("in_folder")
def test_a_snippet_trains(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scored() if "transformers" in IMPORTS[number] else network()
    before = copies(model.parameters())
    prepare(IMPORTS[number], model, monkeypatch)
    names: dict[str, Any] = {
        "model": model,
        "dataset": Examples(),
        "loader": torch.utils.data.DataLoader([batch(index) for index in range(4)], batch_size=None),
        "loss_of": loss_of,
    }
    exec(compile(SNIPPETS[number], "docs/integrations.md", "exec"), names)
    if "megatron" in IMPORTS[number]:  # which trains in Megatron
        assert names["name"] == "sign_adam_pp"
        return
    trained = copies(param for param in names["model"].parameters() if param.requires_grad)
    assert all(param.isfinite().all() for param in trained)
    pairs = zip(before, copies(model.parameters()), strict=False)
    assert "peft" in IMPORTS[number] or not any(torch.equal(one, other) for one, other in pairs)


def test_the_page_names_what_has_a_rule_of_thumb() -> None:
    (section,) = re.findall(r"There is one from torch's (.*?), and between\n(.*?) here;", PAGE, re.DOTALL)
    torchs, ours = (re.findall(r"`(\w+)`", part) for part in section)
    assert {getattr(torch.optim, name) for name in torchs} == set(replacement._AS_ADAMW)
    assert set(ours) == {cls.__name__ for cls in replacement.SHARES}

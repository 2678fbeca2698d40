"""What the plugins have in common: nothing imports them by itself, and one without its library says which it needs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from signadam_ext import SignAdamPP, integrations, optimizers


def test_there_is_a_plugin_for_each() -> None:
    found = {path.stem for path in Path(integrations.__file__).parent.glob("*.py")} - {"__init__"}
    assert found == integrations.TESTED.keys()


def test_the_package_imports_none_of_them() -> None:
    code = "import signadam_ext, signadam_ext.integrations, sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "signadam_ext.integrations" in modules
    roots = {name.split(".")[0] for name in modules}
    assert not roots & {*integrations.TESTED, "emerging_optimizers", "transformers", "pydantic"}
    assert not [name for name in modules if name.startswith("signadam_ext.integrations.")]


@pytest.mark.parametrize("plugin", integrations.TESTED)
def test_without_its_library_a_plugin_says_which(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in (plugin, "emerging_optimizers")]:
        monkeypatch.delitem(sys.modules, name)
    for name in (plugin, "emerging_optimizers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"signadam_ext.integrations.{plugin}", raising=False)
    with pytest.raises(ImportError) as raised:
        importlib.import_module(f"signadam_ext.integrations.{plugin}")
    for library, version in integrations.TESTED[plugin].items():
        assert f"{library} {version}" in str(raised.value)
    assert f"signadam_ext.integrations.{plugin} " in str(raised.value)


def test_classes_by_their_names() -> None:
    assert integrations.class_of("SignAdamPP") is SignAdamPP
    assert set(integrations.CLASSES) == {name for name in optimizers.__all__ if name[0].isupper()}
    with pytest.raises(ValueError, match=r"SignAdamP.*SignAdamPP"):
        integrations.class_of("SignAdamP")

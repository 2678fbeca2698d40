"""The package for the kernel hub: assembled, loaded offline by ``kernels``, and its own tests run interpreted."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hub import assemble

pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    assemble.assemble(folder)
    return folder


def test_its_tests_pass(repository: Path) -> None:
    """In a process of its own, where Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir=.", "tests"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"\d+ passed in", done.stdout.splitlines()[-1]), done.stdout + done.stderr


def test_files_are_those_of_its_metadata(repository: Path) -> None:
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    variant = repository / "build" / assemble.VARIANT
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert metadata.name.python_name == assemble.NAME and metadata.id.isidentifier()
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def test_it_lies_where_older_versions_look(repository: Path) -> None:
    place = repository / "build" / assemble.VARIANT / assemble.NAME / "__init__.py"
    spec = importlib.util.spec_from_file_location("older", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (newer,) = (name for name in sys.modules if re.fullmatch(r"_signadam_[0-9a-f]+", name))
    assert "SignAdamPP" in module.__all__ and module.SignAdamPP is sys.modules[newer].SignAdamPP

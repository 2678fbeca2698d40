"""Commands that the README prints are those that CI runs."""

from pathlib import Path

import pytest

from reporting import commands

TEXT = commands.README.read_text(encoding="utf-8")


def test_every_block_of_commands_says_who_runs_it() -> None:
    blocks = commands.blocks(TEXT)
    assert len(blocks) * 2 == sum(line.startswith("```") for line in TEXT.splitlines())
    assert {block.language for block in blocks} == {"python", "sh"}
    for block in blocks:
        if block.language == "sh":
            assert block.use in commands.USES or (block.use or "").startswith("not run, "), block.lines
        else:
            assert block.use is None


def test_ci_runs_both_uses() -> None:
    ci = Path(commands.README.parent, ".ci", "run")
    if not ci.exists():
        pytest.skip(".ci/run is not in the source distribution")
    for use in commands.USES:
        assert f"-m reporting.commands {use} " in ci.read_text(encoding="utf-8")


def test_commands_are_the_lines_as_printed() -> None:
    marked = "<!-- commands: main -->\n```sh\n{}```\n"
    page = marked.format("one\ntwo  # b\n") + "\n```python\nx\n```\n" + marked.format("three\n")
    assert commands.commands(page, "main") == "one\ntwo  # b\nthree\n"
    assert commands.left_out(page) == []
    with pytest.raises(SystemExit, match="no block of commands marked 'tests'"):
        commands.commands(page, "tests")


def test_blocks_that_are_not_run_are_listed_with_the_reason() -> None:
    assert [(block.use, block.lines) for block in commands.left_out(TEXT)] == [
        (
            "not run, for it measures at full size; CI runs `python -m pytest bench --quick`",
            'pip install -e ".[bench]" && python -m pytest bench\n',
        )
    ]

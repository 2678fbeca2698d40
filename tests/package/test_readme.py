"""Commands that the README prints are those that CI runs; its code runs; pages are short, and link to what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from reporting import commands
from reporting.pages import hand_written_figures

ROOT = commands.README.parent
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
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert commands.left_out(TEXT) == []
    assert [(block.use, block.lines) for block in commands.left_out(results)] == [
        (
            "not run, for it measures at full size; CI runs `python -m pytest bench --quick`",
            'pip install -e ".[bench]" && python -m pytest bench\n',
        )
    ]


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(TEXT.splitlines()) <= 170
    assert len(TEXT.split()) <= 1600


DOCS = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.stem)
def test_figures_stand_in_generated_blocks_alone(page: Path) -> None:
    assert hand_written_figures(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    ["takes 12.5 ms", "1.38x", "is 3x as fast", "of 24 GiB", "20%", "40 GB/s", "1,234 s", "in 2 hours", ".5 nats"],
)
def test_a_figure_is_found(text: str) -> None:
    assert len(hand_written_figures(f"a\n{text}, b\n")) == 1
    assert hand_written_figures(f"<!-- x:begin -->\n{text}\n<!-- x:end -->\n```\n{text}\n```\n`{text}`") == []


@pytest.mark.parametrize(
    "text", ["2 bits", "4 bytes per parameter", "30 steps", "768x3072", "v 2.6", "1e-3", "10 seeds"]
)
def test_what_is_counted_or_chosen_is_no_figure(text: str) -> None:
    assert hand_written_figures(text) == []


SNIPPETS = {
    f"{page.stem}-{i}": block.lines
    for page in PAGES
    for i, block in enumerate(commands.blocks(page.read_text(encoding="utf-8")))
    # Of one file and another, or for Triton's compiler; those of integrations.md have a test of their own.
    if block.language == "python" and block.lines.startswith("import ") and page.stem != "integrations"
}


def test_code_runs() -> None:
    """Each block by itself, in one process: most of the time goes into the import of torch."""
    assert len(SNIPPETS) >= 6
    program = f"for code in {list(SNIPPETS.values())!r}: exec(code, {{'__name__': '__main__'}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page if path == "" else (page.parent / path).resolve()
        if not target.exists() and any(part == "results" for part in target.parts):
            continue  # which the source distribution does not hold
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_every_linked_page_is_a_page_of_the_documentation() -> None:
    """A file outside docs/ becomes one where a page includes it; without that, the documentation is not built."""
    docs = ROOT / "docs"
    include = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
    included = {
        (page.parent / match[1]).resolve()
        for page in docs.rglob("*.md")
        if (match := include.search(page.read_text(encoding="utf-8")))
    }
    read = [*docs.rglob("*.md"), *(file for file in included if file.exists())]
    links = {
        (page.parent / link).resolve(): page
        for page in read
        for link in re.findall(r"\]\(((?!https?://)[^)#\s]+\.md)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8"))
    }
    assert len(included) >= 8
    outside = {file for file in links if not file.is_relative_to(docs)}
    assert {str(file.relative_to(ROOT)): str(links[file]) for file in outside - included} == {}

"""What pages get when the documentation is built: files beside the folder, links to these, the memory page's data."""

import json
import os
import re
from pathlib import Path

import memory_data
from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parents[2]
#: Files outside the folder that are pages of the documentation as well: each page includes its file.
INCLUDED = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"\]\(((?!https?://|#)[^)#\s]+)(#[^)\s]*)?\)")


def _included(page: Path) -> Path | None:
    match = INCLUDED.search(page.read_text(encoding="utf-8"))
    return (page.parent / match[1]).resolve() if match else None


def _pages(docs: Path) -> dict[Path, Path]:
    """The page that includes each file outside the folder."""
    return {file: page for page in docs.rglob("*.md") if (file := _included(page)) is not None}


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put in what a page includes, and let links lead to pages where there is one of a file.

    Beside the sources the same text is read as it stands, and its links lead to the files.
    """
    page = Path(app.env.doc2path(docname)).resolve()
    pages = _pages(Path(app.srcdir).resolve())
    text, written_in = source[0], page.parent
    if (file := _included(page)) is not None:
        app.env.note_dependency(str(file))
        # Results are not in the source distribution.
        whole = (
            file.read_text(encoding="utf-8") if file.exists() else f"# {file.stem}\n\nNot in this copy of the sources."
        )
        text, written_in = INCLUDED.sub(lambda _: whole, text), file.parent

    def led(match: re.Match[str]) -> str:
        target = (written_in / match[1]).resolve()
        target = pages.get(target, target)
        return f"]({Path(os.path.relpath(target, page.parent)).as_posix()}{match[2] or ''})"

    source[0] = LINK.sub(led, text)


def _data(app: Sphinx) -> None:
    path = Path(app.srcdir) / "_static" / "memory_data.js"
    text = f"const MEMORY = {json.dumps(memory_data.data())};\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _exported(app: Sphinx, env: BuildEnvironment, node: pending_xref, child: Element) -> Element | None:
    """Where a docstring names what the package exports by its name alone, as its reader does."""
    if node.get("refdomain") != "py" or "." in (name := node["reftarget"]):
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], f"signadam_ext.{name}", node, child)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", _data)
    app.connect("source-read", _read)
    app.connect("missing-reference", _exported)
    return {"parallel_read_safe": True}

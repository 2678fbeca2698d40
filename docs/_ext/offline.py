"""Ends a build in which some page would ask the network for a script, a style, a font or a picture."""

import re
from html.parser import HTMLParser
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

#: Attributes by which a page asks for something, by element. A link that a reader follows (`a`) asks for nothing.
ASKING = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "video": ("src", "poster"),
}
REMOTE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"""(?:@import\s+|url\(\s*)["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.remote: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        for name in ASKING.get(tag, ()):
            if REMOTE.match((found.get(name) or "").strip()):
                self.remote.append(f"<{tag} {name}={found[name]}>")
        self.remote += IN_STYLE.findall(found.get("style") or "")


def remote_resources(folder: Path) -> list[str]:
    """What the pages and styles of a folder would ask the network for, with the file that does."""
    found = []
    for path in sorted(folder.rglob("*.html")):
        page, text = _Page(), path.read_text(encoding="utf-8")
        page.feed(text)
        styles = "".join(re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL))
        found += [f"{path.relative_to(folder)}: {asked}" for asked in page.remote + IN_STYLE.findall(styles)]
    for path in sorted(folder.rglob("*.css")):
        found += [
            f"{path.relative_to(folder)}: {asked}" for asked in IN_STYLE.findall(path.read_text(encoding="utf-8"))
        ]
    return found


def _refuse(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html" and (found := remote_resources(Path(app.outdir))):
        raise ExtensionError("pages ask for resources of the network:\n" + "\n".join(found))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", _refuse, priority=900)
    return {"parallel_read_safe": True}

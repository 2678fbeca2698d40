"""What ends a build of the documentation: pages and styles that would ask the network for something."""

from pathlib import Path

import pytest

pytest.importorskip("sphinx")


@pytest.fixture
def remote_resources(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "docs" / "_ext"))
    from offline import remote_resources

    return remote_resources


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<SCRIPT SRC="//cdn.example/x.js"></SCRIPT>',
        '<link rel="stylesheet" href="http://fonts.example/css">',
        '<img src="https://img.example/a.png">',
        '<img srcset="https://img.example/a.png 2x">',
        '<div style="background: url(https://img.example/a.png)"></div>',
        "<style>@import 'https://fonts.example/css';</style>",
        "<style>a { src: url( '//fonts.example/a.woff' ) }</style>",
        '<iframe src="https://video.example"></iframe>',
    ],
)
def test_is_found(text, remote_resources, tmp_path):
    (tmp_path / "page.html").write_text(text)
    (found,) = remote_resources(tmp_path)
    assert found.startswith("page.html: ") and "example" in found


def test_of_styles_is_found(remote_resources, tmp_path):
    (tmp_path / "a.css").write_text('@font-face { src: url("https://fonts.example/a.woff2") }')
    assert remote_resources(tmp_path) == ["a.css: https://fonts.example/a.woff2"]


def test_links_and_own_files_are_let_be(remote_resources, tmp_path):
    (tmp_path / "page.html").write_text(
        '<a href="https://arxiv.org/abs/1907.09008">paper</a><script src="_static/x.js"></script>'
        '<img src="data:image/png;base64,AA//BB"><code>src="https://cdn.example/x.js"</code>'
    )
    assert remote_resources(tmp_path) == []

"""The documentation: `python -m sphinx -W docs docs/_build`. Nothing in a built page comes from the network."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from signadam_ext._version import __version__  # noqa: E402

project = "signadam_ext"
author = copyright = "The signadam_ext authors"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx-mathjax-offline",  # MathJax and its fonts, as files
    "pages",
    "offline",
]
exclude_patterns = ["_build"]

# Markdown, as it is also read beside the sources.
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_ambiguous"]

# Docstrings. Every name that one refers to must lead somewhere, but for those of other projects.
nitpicky = True
nitpick_ignore = [
    ("py:exc", "zipfile.BadZipFile"),
    ("py:meth", "register_state_dict_post_hook"),  # of torch's optimizers, as is what torch's own docstrings name:
    ("py:class", "torch.Tensor"),
    ("py:class", "optional"),
    ("py:class", "signadam_ext.engine.runtime.Runtime"),  # shown, and no part of the interface
]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they stand in the signature
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False

html_theme = "furo"
html_title = f"signadam_ext {__version__}"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

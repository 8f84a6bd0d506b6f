"""How Sphinx makes the site of these pages: `make docs`, or `sphinx-build -W -b html docs docs/_site`."""

from __future__ import annotations

from resilience import __version__

project = "resilience"
author = "The authors of resilience"
project_copyright = "The authors of resilience. Apache License 2.0"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_site"]
nitpicky = False  # docstrings name classes of torch, whose own site is not asked

myst_heading_anchors = 4  # `page.md#a-heading` leads to it, as on any forge
myst_links_external_new_tab = True
suppress_warnings: list[str] = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True  # `os.environ`, not what it holds where the pages are made

default_role = "code"  # docstrings write code in single backquotes

html_theme = "furo"
html_title = f"resilience {release}"
html_show_sourcelink = False
html_copy_source = False

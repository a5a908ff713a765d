"""Sphinx configuration; `make docs` builds with warnings as errors."""

import sys
from pathlib import Path

import lightning_bilevel

sys.path.insert(0, str(Path(__file__).parent))
import tables

project = "lightning_bilevel"
author = "The lightning_bilevel authors"
copyright = f"2026, {author}"
release = lightning_bilevel.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links to headings of other pages
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = "lightning_bilevel"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # names that two public modules re-export

tables.write_all(Path(__file__).parent / "_generated")

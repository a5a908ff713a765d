"""Sphinx configuration; `make docs` builds with warnings as errors."""

from pathlib import Path

import lightning_bilevel
from lightning_bilevel.strategies import table

project = "lightning_bilevel"
author = "The lightning_bilevel authors"
release = lightning_bilevel.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = "lightning_bilevel"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # names that two public modules re-export

# The table of strategies is what the classes say about themselves.
generated = Path(__file__).parent / "_generated"
generated.mkdir(exist_ok=True)
(generated / "strategies.md").write_text(table.markdown() + "\n")

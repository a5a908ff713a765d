"""Sphinx configuration; `make docs` builds with warnings as errors, and without a network."""

import os
import sys
from pathlib import Path

import lightning_bilevel

sys.path.insert(0, str(Path(__file__).parent))
import inventories
import reference
import tables

HERE = Path(__file__).parent
project = "lightning_bilevel"
author = "The lightning_bilevel authors"
copyright = f"2026, {author}"
release = lightning_bilevel.__version__

extensions = [
    "anchors",
    "clickable",
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_generated", "_templates"]
suppress_warnings = ["ref.python"]  # names that two public modules re-export

html_theme = "furo"
html_title = "lightning_bilevel"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3  # links to headings of other pages

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # of the notebooks: small tensors, and what their run times say
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_merge_streams = True
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_use_ivar = True
add_module_names = False

tables.write_all(HERE / "_generated")
intersphinx_mapping = inventories.write_all(HERE / "_generated")
autosummary_context = reference.context()

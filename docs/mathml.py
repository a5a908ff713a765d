"""A Sphinx extension: formulas as MathML, which browsers draw themselves, with no script and no network.

``html_math_renderer = "mathml"`` turns it on. A formula that cannot be converted is a warning, which fails `make docs`.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)


def mathml(tex: str, node: nodes.Node, display: str) -> str:
    """Return a formula as a ``<math>`` element; ``display`` is ``"inline"`` or ``"block"``."""
    try:
        found = convert(tex.replace(r"\arg", r"\mathrm{arg}\,"), display=display)
    except Exception as error:
        LOGGER.warning("cannot convert the formula %r: %s", tex, error, location=node)
        return f"<code>{tex}</code>"
    if "\\" in found:  # what the converter does not know, it copies
        LOGGER.warning(
            "a command of the formula %r is not known to latex2mathml",
            tex,
            location=node,
        )
    return found


def visit_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), node, "inline"))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    formula = mathml(node.astext(), node, "block")
    translator.body.append(f'<div class="formula" tabindex="0">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

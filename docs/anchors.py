"""A Sphinx extension: an anchor for each row of a table of messages, which an error could lead to.

`troubleshooting.html#error-has-no-hypergradient-strategy` is the row whose first message has these words.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx

HEAD = "message"
"""What stands above the first column of such a table."""


def anchor(message: str) -> str:
    """Return the name of a row: the words of its first message, in the letters that an address has."""
    words = re.findall(r"[a-z0-9_]+", message.lower())
    return "-".join(["error", *words])


def mark_rows(app: Sphinx, doctree: nodes.document) -> None:
    """Give each row its name, and a link to itself beside its message."""
    for table in doctree.findall(nodes.table):
        head, *rows = table.findall(nodes.row)
        if head.children[0].astext() != HEAD:
            continue
        for row in rows:
            cell = row.children[0]
            message = next(iter(cell.findall(nodes.literal)), cell)
            name = anchor(message.astext())
            cell["ids"].append(name)
            link = nodes.reference("", "¶", refuri=f"#{name}", classes=["headerlink"])
            next(iter(cell.findall(nodes.paragraph))).append(link)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", mark_rows)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""A Sphinx extension: a click on a picture opens it at its full size."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.osutil import relative_uri


def link_pictures(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Make each picture a link to its own file, where it is none to anything else."""
    if app.builder.format != "html":
        return
    here = app.builder.get_target_uri(docname)
    for picture in list(doctree.findall(nodes.image)):
        if (
            isinstance(picture.parent, nodes.reference)
            or picture["uri"] not in app.env.images
        ):
            continue
        _, file = app.env.images[picture["uri"]]
        link = nodes.reference("", "", refuri=relative_uri(here, f"_images/{file}"))
        picture.replace_self(link)
        link += picture


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-resolved", link_pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

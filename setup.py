"""What setup.cfg cannot say: the description for a package index, where no file lies beside it. All else is there."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?://)([^)\s]+)\)\n*")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?://)([^)\s]+)\)")


def description(readme: str, files: str) -> str:
    """Return a text without relative links and pictures: they lead to ``files``, or are cut where that is empty."""
    if files:
        base = files.rstrip("/")
        return re.sub(r"(!?\[[^\]]*\]\()(?!https?://)([^)\s]+\))", rf"\g<1>{base}/\g<2>", readme)
    return LINK.sub(r"\1", PICTURE.sub("", readme))


if __name__ == "__main__":
    settings = ConfigParser()
    settings.read(HERE / "setup.cfg")
    text = (HERE / "README.md").read_text(encoding="utf-8")
    setup(long_description=description(text, settings["description"]["files"]))

"""The description that PyPI shows: README.md, whose links lead into the repository there."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?:|#)")


def with_whole_links(text: str) -> str:
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    return LINK.sub(lambda link: f"{link[0]}{repository}/{'raw' if link[1] else 'blob'}/HEAD/", text)


setup(
    long_description=with_whole_links((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)

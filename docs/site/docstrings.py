"""An extension of griffe, which reads the docstrings: the project's habits in words that griffe knows."""

import re

from griffe import Extension

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)
OTHERS = re.compile(r"^    ( *)Others: (.*(?:\n\1     +.*)*)", re.MULTILINE)
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Docstrings(Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = fence(split(set_apart(obj.docstring.value)))


def fence(docstring: str) -> str:
    """Make the examples, which end with an empty line, blocks of code, in which nothing is a link.

    >>> fence("Add.\\n\\n>>> 1 + 1\\n2\\n\\nMore.")
    'Add.\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```\\n\\nMore.'
    """
    return EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", docstring)


def set_apart(docstring: str) -> str:
    """Say of the other arguments what they are behind the list of arguments, which would have one named Others.

    >>> set_apart("Args:\\n    k: keys.\\n    Others: as for `f`.\\n\\nReturns:\\n    More.")
    'Args:\\n    k: keys.\\n\\nOther arguments: as for `f`.\\n\\nReturns:\\n    More.'
    """
    return OTHERS.sub(lambda found: f"\n{found[1]}Other arguments: {' '.join(found[2].split())}", docstring)


def split(docstring: str) -> str:
    """Give each argument that shares a line with others a line of its own.

    >>> split("Args:\\n    k, v: keys and values.")
    'Args:\\n    k: keys and values.\\n    v: keys and values.'
    """
    return SHARED.sub(
        lambda found: "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", ")), docstring
    )

"""Text that came from elsewhere, made safe for a terminal."""

from __future__ import annotations


def printable(text: object) -> str:
    r"""`text` with every character that a terminal may obey written as an escape, such as ``\x1b``.

    Lines and tabs stay. Control characters can move the cursor, set the title of a window or hide
    what was printed before; a file that somebody else wrote may hold them.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")

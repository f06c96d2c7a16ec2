"""Names that end in a number, such as ``input_10``: an engine's tensors are in that order."""

from __future__ import annotations

import re


def trailing_number(name: str) -> int:
    """Return the number at the end of a name, e.g. 10 of ``input_10``: the key to sort names by.

    Sorted as text, ``input_10`` comes before ``input_2``.

    Raises:
        ValueError: the name ends in no number.
    """
    found = re.search(r"\d+$", name)
    if found is None:
        raise ValueError(f"{name!r} ends in no number")
    return int(found[0])

"""Tables in Markdown that are aligned, so that they also read well in a terminal."""

from collections.abc import Sequence


def markdown(cells: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table, ending in a newline.

    >>> print(markdown([["SAE", "L0"], ["a", "31.8"]]), end="")
    | SAE |   L0 |
    |-----|-----:|
    | a   | 31.8 |

    Args:
        cells: rows of equal length, the head first.
        left: how many columns are aligned left; the others are numbers and go right.
    """
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    marks = "<" * left + ">" * (len(widths) - left)
    lines = [
        "| " + " | ".join(f"{c:{m}{w}}" for c, m, w in zip(row, marks, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = (("-" * (w + 2))[: -1 if m == ">" else None] + ":" * (m == ">")
            for m, w in zip(marks, widths, strict=True))  # fmt: skip
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]]) + "\n"

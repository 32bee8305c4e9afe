"""Tables as text."""

from collections.abc import Sequence


def columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A titled table with a header, as text; the first column is aligned left, the others right.

    >>> print(columns("gradients", ["L", "variance"], [["1", "9.1"], ["10", "0.9"]]))
    gradients
      L   variance
      1        9.1
      10       0.9
    """
    widths = [max(map(len, cells)) for cells in zip(header, *rows, strict=True)]
    lines = [title]
    for row in (header, *rows):
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join([first, *others]))
    return "\n".join(lines)

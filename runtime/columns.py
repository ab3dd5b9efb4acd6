"""Text in columns that line up."""

from collections.abc import Sequence


def in_columns(rows: Sequence[Sequence[str]], *, figures: bool = False) -> list[str]:
    """One line per row, each cell padded to the width of the widest in its column.

    With `figures`, all columns but the first line up on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if figures and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

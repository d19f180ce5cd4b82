"""Tables in Markdown, which people can read and paste."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns under their names; a row that is shorter than the head ends in empty cells.

    Raises:
      ValueError: a row has more cells than there are columns.
    """
    lines = [head, ("---",) * len(head)]
    for row in rows:
        if len(row) > len(head):
            raise ValueError(f"{len(row)} cells in a table of {len(head)} columns: {list(row)}")
        lines.append([*row, *[""] * (len(head) - len(row))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

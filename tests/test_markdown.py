import pytest

from ldm_jax import markdown


def test_a_table_has_a_cell_for_each_column():
    lines = markdown.table(("by", "seconds"), [("us", "1.2"), ["them"]]).splitlines()
    assert lines == ["| by | seconds |", "| --- | --- |", "| us | 1.2 |", "| them |  |"]


def test_cells_without_a_column_are_refused():
    with pytest.raises(ValueError, match="3 cells in a table of 2 columns"):
        markdown.table(("by", "seconds"), [("us", "1.2", "3")])

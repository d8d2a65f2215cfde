"""The command line that all programs share: tables and hints."""

from jaxlm import cli


def test_a_table_has_words_at_the_left_and_numbers_at_the_right():
    rows = [("a", 1, 2.5), ("bcd", 100, "")]
    assert cli.table(rows, ("name", "x", "y")) == "name    x    y\na       1  2.5\nbcd   100"
    assert cli.table(rows, left=0).splitlines()[0] == "  a    1  2.5"


def test_a_table_shows_cells_as_they_are():
    """No markup, no wrapped line, and none cut off, however long."""
    assert cli.table([("[red]", ":smile:"), ("x" * 1000, "y")], left=2).splitlines() == [
        "[red]" + " " * 997 + ":smile:",
        "x" * 1000 + "  y",
    ]


def test_a_table_of_nothing_is_empty():
    assert cli.table([]) == ""

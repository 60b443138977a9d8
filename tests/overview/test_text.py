"""pipeline/text.py: tables for a terminal."""

from pipeline.text import aligned


def test_columns_are_as_wide_as_their_widest_cell_and_no_line_ends_with_spaces():
    rows = [("cell", "top-1, %", "answer"), ("alone", "8.25", "class_head"), ("soft", "100.00", "")]
    assert aligned(rows, left=(0, 2), indent="  ").split("\n") == [
        "  cell   top-1, %  answer",
        "  alone      8.25  class_head",
        "  soft     100.00",
    ]


def test_a_character_that_takes_two_columns_of_a_terminal_counts_as_two():
    assert aligned([("猫", "1"), ("cats", "2")]).split("\n") == ["猫    1", "cats  2"]


def test_a_name_in_a_table_cannot_drive_the_terminal_or_break_the_line():
    assert aligned([("a\x1b[31m\nb", "1")]) == "a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}b  1"

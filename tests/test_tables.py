"""`saes.tables`: Markdown that is also aligned."""

from hypothesis import given
from hypothesis import strategies as st

from saes.tables import markdown

CELL = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=9)


def test_an_example() -> None:
    assert markdown([["SAE", "L0"], ["a|b", "31.8"]]) == (
        "| SAE  |   L0 |\n|------|-----:|\n| a\\|b | 31.8 |\n"
    )


@given(
    cells=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n), min_size=1, max_size=5)
    ),
    left=st.integers(0, 4),
)
def test_lines_are_equally_long_and_cells_come_back(cells: list[list[str]], left: int) -> None:
    lines = markdown(cells, left=min(left, len(cells[0]))).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == len(cells) + 1
    for line, row in zip([lines[0], *lines[2:]], cells, strict=True):
        found = line[1:-1].replace("\\|", "\0").split("|")
        assert [c.replace("\0", "|").strip() for c in found] == [c.strip() for c in row]

"""Numbers in words; the sentences are checked against whole records in test_report.py."""

import pytest

from labeling.summary import mean_interval
from labeling.words import interval, number, probability


@pytest.mark.parametrize(
    ("value", "digits", "sign", "shown"),
    [(-0.125, 3, False, "−0.125"), (0.5, 2, True, "+0.50"), (-0.0001, 2, True, "0.00"),
     (None, 2, False, "–"), (float("nan"), 2, False, "–"), (1234.5, 0, False, "1234")],
)  # fmt: skip
def test_numbers_in_words(value: float | None, digits: int, sign: bool, shown: str) -> None:
    assert number(value, digits, sign=sign) == shown


def test_values_that_are_all_equal_have_no_spread() -> None:
    shown = [interval(mean) for x in ((1.0,) * 5, (0.9, 1.0), (0.5,)) if (mean := mean_interval(x))]
    assert shown == ["1.000 (no spread)", "0.950 (0.315 to 1.000)", "0.500"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0321, "0.032"),
        (4.2e-7, "4 × 10⁻⁷"),
        (1.0, "1.000"),
        (9.96e-4, "1 × 10⁻³"),
        (0.0, "0.000"),
    ],
)
def test_probabilities_in_words(value: float, shown: str) -> None:
    assert probability(value) == shown

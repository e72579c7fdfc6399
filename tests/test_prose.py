"""Numbers in words; the sentences are checked against whole records in test_report.py."""

import pytest

from labeling.prose import number, probability


@pytest.mark.parametrize(
    ("value", "digits", "sign", "shown"),
    [(-0.125, 3, False, "−0.125"), (0.5, 2, True, "+0.50"), (-0.0001, 2, True, "0.00"),
     (None, 2, False, "–"), (float("nan"), 2, False, "–"), (1234.5, 0, False, "1234")],
)  # fmt: skip
def test_numbers_in_words(value: float | None, digits: int, sign: bool, shown: str) -> None:
    assert number(value, digits, sign=sign) == shown


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

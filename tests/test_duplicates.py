"""Near-duplicates across places are found as an exact comparison of all pairs finds them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.corpora.duplicates import SHINGLE, normal, repeated, shingles

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "hill", "over", "home", "again"]


def brute(texts: list[str], place: list[int], threshold: float) -> list[int | None]:
    """The same by all pairs of sets of runs."""
    runs = []
    for text in map(normal, texts):
        runs.append({text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))})
    found: list[int | None] = []
    for i, own in enumerate(runs):
        found.append(None)
        equal = [j for j in range(i) if normal(texts[j]) == normal(texts[i])]
        near = [
            j
            for j in range(i)
            if place[j] != place[i]
            and found[j] is None
            and len(own & runs[j]) >= threshold * len(own | runs[j])
        ]
        if equal or near:
            found[i] = min(equal or near)
    return found


def sentences(rng: np.random.Generator, n: int) -> list[str]:
    """Random sentences, some of them changed copies of others."""
    texts: list[str] = []
    for _ in range(n):
        if texts and rng.random() < 0.4:
            words = texts[rng.integers(len(texts))].split()
            for _ in range(rng.integers(0, 4)):
                words[rng.integers(len(words))] = str(rng.choice(WORDS))
            texts.append(" ".join(words))
        else:
            texts.append(" ".join(rng.choice(WORDS, rng.integers(3, 30))))
    return texts


@pytest.mark.parametrize("threshold", [0.8, 0.9, 1.0])
def test_against_all_pairs(threshold: float) -> None:
    rng = np.random.default_rng(0)
    texts = sentences(rng, 250)
    place = rng.integers(0, 3, len(texts)).tolist()
    found = repeated(texts, place, [threshold] * len(texts))
    expected = brute(texts, place, threshold)
    assert [i is None for i in found] == [i is None for i in expected]
    assert 20 < sum(i is not None for i in found) < 200


def test_each_text_has_its_threshold() -> None:
    texts = ["the cat sat on the mat and went home", "the cat sat on the mat and went home again"]
    (before, found) = repeated(texts, [0, 1], [0.9, 0.8])
    assert (before, found) == (None, 0)
    assert repeated(texts, [0, 1], [0.8, 0.9]) == [None, None]
    assert repeated(texts, [0, 0], [0.8, 0.8]) == [None, None]  # one place


def test_equal_texts_are_found_in_one_place_too() -> None:
    texts = ["Thank you!", "thank  YOU", "Thank you so", "!", "?", "!"]
    assert repeated(texts, [0] * 6, [1.0] * 6) == [None, 0, None, None, None, 3]
    assert repeated([], [], []) == []


@given(st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_shingles_are_the_runs_of_each_text(texts: list[str]) -> None:
    runs, starts = shingles(texts)
    parts = np.split(runs, starts[1:])
    for text, part in zip(texts, parts, strict=True):
        text = text or " "
        own = {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}
        assert len(part) == len(own)
        assert (np.diff(part.astype(object)) > 0).all()
    same, _ = shingles([texts[0]])
    np.testing.assert_array_equal(parts[0], same)


def test_what_texts_are_compared_by() -> None:
    assert normal("  Well — that's IT,\n“really”! ") == "well that s it really"
    assert normal("\uff21\uff22") == "ab"
    assert normal("🙂 !") == "🙂 !"

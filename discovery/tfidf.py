"""TF-IDF of bare text: what words alone say of a concept, in any language.

What counts as a term:
- a word: letters, digits and their marks, of any length, in lower case; and two words in sequence;
- in scripts that do not part words by white space (Chinese, Japanese, Thai, Lao, Khmer, Burmese):
  one, two or three characters in sequence, within a run of such characters;
- any other symbol, such as an emoji, as a word of its own.
Texts are normalised to NFKC first, so that one letter is not two terms. scikit-learn weighs them.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array

from discovery.contrast import averages
from discovery.corpora.leaks import UNSPACED
from discovery.labels import Labels
from discovery.probes import Reader

_LAST = 0x20000  # symbols, and marks that belong to letters, have lower code points

PIECE = 3
"""Longest sequence of characters in scripts that do not part words."""


def terms(text: str) -> list[str]:
    """The terms of a text, in the order of their kinds; "" has none."""
    spaced, unspaced = _patterns()
    normal = unicodedata.normalize("NFKC", text).lower()
    words: list[str] = spaced.findall(normal)
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    runs: list[str] = [] if normal.isascii() else unspaced.findall(normal)
    pieces = [
        run[i : i + n] for run in runs for n in range(1, PIECE + 1) for i in range(len(run) - n + 1)
    ]
    return words + pairs + pieces


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Words and symbols; runs of unspaced characters. `\\w` would cut words at their marks."""
    kinds = [(chr(code), unicodedata.category(chr(code))) for code in range(_LAST)]
    marks = _ranges(c for c, kind in kinds if kind[0] == "M")
    symbols = _ranges(c for c, kind in kinds if kind == "So")
    word = rf"(?![{UNSPACED}])\w(?:(?![{UNSPACED}])[\w{marks}])*"
    return re.compile(rf"{word}|[{symbols}]"), re.compile(rf"(?:(?=[{UNSPACED}])[\w{marks}])+")


def _ranges(characters: Iterable[str]) -> str:
    """The inside of a character class, from characters in ascending order."""
    bounds: list[list[str]] = []
    for c in characters:
        if bounds and ord(c) == ord(bounds[-1][1]) + 1:
            bounds[-1][1] = c
        else:
            bounds.append([c, c])
    return "".join(f"{re.escape(low)}-{re.escape(high)}" for low, high in bounds)


def term_counts(texts: Iterable[str]) -> Float[csr_array, "texts terms"]:
    """How often each term is in each text."""
    from sklearn.feature_extraction.text import CountVectorizer

    rows = list(texts)
    if not any(map(terms, rows)):  # which scikit-learn refuses
        return csr_array((len(rows), 1))
    counter = cast("Any", CountVectorizer)(analyzer=terms, dtype=np.float64)
    return csr_array(counter.fit_transform(rows))


def fit_tfidf(counts: Float[csr_array, "texts terms"], labels: Labels) -> Reader:
    """Difference of mean TF-IDF vectors, with sublinear term frequency, of counted texts.

    Terms and their weights are those of the fitted texts; other terms count for nothing, and a text
    without any known term scores 0. Pairs of words, and the difference from the mean of all
    concepts in place of the cosine with a concept's mean, make it the stronger baseline.

    Args:
        counts: of `term_counts`, made once for all texts.
        labels: of the same texts.
    """
    from sklearn.feature_extraction.text import TfidfTransformer

    weights: Any = TfidfTransformer(sublinear_tf=True).fit(counts)
    # terms of the other texts alone must not count in lengths
    weights.idf_[np.bincount(counts.indices, minlength=counts.shape[1]) == 0] = 0
    means = averages(labels) @ csr_array(weights.transform(counts))
    grand = means.sum(0) / max(1, np.count_nonzero(labels.counts))

    def reader(others: Float[csr_array, "others terms"]) -> Float[np.ndarray, "others concepts"]:
        x = csr_array(weights.transform(others))
        return (x @ means.T).toarray() - (x @ grand)[:, None]

    return reader

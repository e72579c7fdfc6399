"""TF-IDF against scikit-learn's vectorizer; its terms in several scripts."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import TfidfVectorizer

from discovery.labels import Labels, single
from discovery.probes import cross_fit
from discovery.tfidf import fit_tfidf, term_counts, terms

WORDS = np.array(["morning", "table", "window", "a", "I", "bread", "letter", "x9", "don't", "über"])


def corpus(seed: int, n_topics: int = 6) -> tuple[np.ndarray, Labels]:
    """Texts of three concepts, in topics of two writers each."""
    rng = np.random.default_rng(seed)
    topics = np.repeat(np.arange(n_topics), 3)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in topics]
    labels = single(np.tile(np.arange(3), n_topics), 3, topics, topics // 2)
    return np.array(texts, dtype=object), labels


def split(fitted: np.ndarray, others: np.ndarray) -> tuple[csr_array, csr_array]:
    """Counts of two sets of texts, made at once."""
    counts = term_counts(np.concatenate([fitted, others]))
    return counts[: len(fitted)], counts[len(fitted) :]


def test_scores_are_products_with_differences_of_mean_vectors_of_sklearn():
    first, labels = corpus(0)
    second = np.append(corpus(1)[0], ["wholly unknown", ""]).astype(object)
    reference = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
    x = reference.fit_transform(first).toarray()
    means = np.stack([x[labels.of(c)].mean(0) for c in range(3)])
    expected = reference.transform(second).toarray() @ (means - means.mean(0)).T
    fitted, others = split(first, second)
    np.testing.assert_allclose(fit_tfidf(fitted, labels)(others), expected, atol=1e-12)


def test_a_text_counts_for_each_of_its_concepts():
    first, labels = corpus(0)
    dense = labels.dense()
    dense[::4] = True
    dense[1] = False
    several = labels._replace(concepts=csr_array(dense))
    reference = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"\w+")
    x = reference.fit_transform(first).toarray()
    means = np.stack([x[dense[:, c]].mean(0) for c in range(3)])
    counts = term_counts(first)
    np.testing.assert_allclose(
        fit_tfidf(counts, several)(counts), x @ (means - means.mean(0)).T, atol=1e-12
    )


def test_other_texts_in_the_counts_change_nothing():
    first, labels = corpus(0)
    second, _ = corpus(1)
    fitted, others = split(first, second)
    more = term_counts(np.concatenate([second, ["words that nothing else has"], first]))
    again = fit_tfidf(more[len(second) + 1 :], labels)(more[: len(second)])
    np.testing.assert_allclose(again, fit_tfidf(fitted, labels)(others), atol=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I am, I AM", ["i", "am", "i", "am", "i am", "am i", "i am"]),
        ("don't", ["don", "t", "don t"]),
        ("Naïve", ["naïve"]),
        ("Nai\u0308ve", ["naïve"]),  # the same letters, written apart
        ("मैं ख़ुश हूँ", ["मैं", "ख़ुश", "हूँ", "मैं ख़ुश", "ख़ुश हूँ"]),
        ("걱정돼 너무", ["걱정돼", "너무", "걱정돼 너무"]),
        ("悲しい", ["悲", "し", "い", "悲し", "しい", "悲しい"]),
        ("很好。好", ["很", "好", "很好", "好"]),
        ("ดี", ["ด", "ี", "ดี"]),
        ("ﾊﾞ", ["バ"]),
        ("OK很", ["ok", "很"]),
        ("so 😭😭", ["so", "😭", "😭", "so 😭", "😭 😭"]),
        ("❤️", ["❤"]),
        ("", []),
        ("... —!", []),
    ],
)
def test_terms(text, expected):
    assert terms(text) == [unicodedata.normalize("NFKC", term) for term in expected]


@given(st.text())
def test_every_letter_is_in_a_term(text):
    seen = set("".join(terms(text)))
    letters = {c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum()}
    assert letters <= seen


@pytest.mark.parametrize(
    "marked", ["我今天很{}因为下雨", "きょうはとても{}です", "วันนี้ฉันรู้สึก{}มาก", "आज मैं {} हूँ", "x {} y"]
)
def test_one_word_is_found_in_any_script(marked):
    """A word of the concept is read in texts of other topics."""
    words = {"我": "悲伤高兴生气", "き": "かなしうれしこわい", "ว": "เศร้ดีใจโกรธ", "आ": "अबकखगघ"}
    letters = words.get(marked[0], "uvwabc")
    third = len(letters) // 3
    own = [letters[i * third : (i + 1) * third] for i in range(3)]
    topics = np.repeat(np.arange(6), 3)
    texts = [marked.format(own[c]) + "。" + "。" * t for t in range(6) for c in range(3)]
    labels = single(np.tile(np.arange(3), 6), 3, topics, topics)
    scores = cross_fit(fit_tfidf, term_counts(texts), labels)
    assert (scores.argmax(1) == np.tile(np.arange(3), 6)).all()


def test_texts_without_known_terms_score_nothing():
    _, labels = corpus(0)
    empty = term_counts(["..."] * 18)
    np.testing.assert_array_equal(fit_tfidf(empty, labels)(empty), np.zeros((18, 3)))
    fitted, others = split(corpus(0)[0], np.array(["nothing of it", ""], dtype=object))
    np.testing.assert_array_equal(fit_tfidf(fitted, labels)(others), np.zeros((2, 3)))

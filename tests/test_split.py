"""Halves and samples keep units whole, are balanced, and depend on the seed and nothing else."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from discovery.corpora.rows import Text
from discovery.corpora.split import halves, sample


def text(i: int, concepts: tuple[str, ...], topic: str = "", writer: str = "") -> Text:
    return Text(str(i), f"text {i}", concepts, "selection", topic, writer)


def flat(n: int, seed: int = 0) -> list[Text]:
    """Texts without groups; some concepts are rare, some texts have two."""
    rng = np.random.default_rng(seed)
    names = np.array(["a", "b", "c", "rare"])
    return [
        text(
            i, tuple(rng.choice(names, rng.integers(1, 3), replace=False, p=[0.4, 0.35, 0.2, 0.05]))
        )
        for i in range(n)
    ]


def test_halves_are_balanced_for_every_concept() -> None:
    texts = flat(401)
    second = halves(texts, 0)
    assert abs(2 * second.sum() - 401) <= 20
    for name in "abc":
        with_it = np.array([name in t.concepts for t in texts])
        assert abs(int((with_it & second).sum()) - int((with_it & ~second).sum())) <= 3
    rare = np.array(["rare" in t.concepts for t in texts])
    assert abs(int((rare & second).sum()) - int((rare & ~second).sum())) <= 1


def test_units_stay_whole() -> None:
    rng = np.random.default_rng(0)
    texts = [
        text(i, ("ab"[i % 2],), f"t{rng.integers(30)}" if i % 3 else "", f"w{rng.integers(60)}")
        for i in range(300)
    ]
    second = halves(texts, 1)
    assert 0 < second.sum() < 300
    for of in ("topic", "writer"):
        first, other = ({getattr(t, of) for t in np.array(texts)[s]} for s in (~second, second))
        assert not (first & other) - {""}


def test_the_seed_decides() -> None:
    texts = flat(100)
    assert (halves(texts, 0) == halves(texts, 0)).all()
    assert (halves(texts, 0) != halves(texts, 1)).any()
    turned = halves(texts[::-1], 0)[::-1]
    assert (turned == halves(texts, 0)).all()


def test_a_concept_of_two_units_is_in_both_halves() -> None:
    for seed in range(10):
        texts = [*flat(50, seed), text(100, ("new",)), text(101, ("new", "a"))]
        second = halves(texts, seed)
        assert second[-1] != second[-2]


def test_a_sample_is_of_whole_groups() -> None:
    texts = [text(i, ("a",), f"t{i % 25}" if i % 2 else "", f"w{i % 40}") for i in range(400)]
    kept = sample(texts, 100, 0)
    assert 0.8 * 100 < len(kept) <= 100
    assert kept == [t for t in texts if t in set(kept)]  # in their order
    size, left = Counter(t.topic for t in texts), Counter(t.topic for t in kept)
    assert all(left[topic] == size[topic] for topic in left if topic)
    assert set(kept) <= set(sample(texts, 200, 0))
    assert set(kept) == set(sample(texts[::-1], 100, 0))
    assert set(kept) != set(sample(texts, 100, 1))
    assert sample(texts, 400, 0) == texts
    assert sample([text(i, ("a",), "t") for i in range(5)], 4, 0) == []


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "s", "t", "u"]), st.sampled_from(["", "v", "w"])),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 5),
)
def test_no_known_group_or_writer_is_ever_split(names: list[tuple[str, str]], seed: int) -> None:
    texts = [text(i, ("a",), *pair) for i, pair in enumerate(names)]
    second = halves(texts, seed)
    for a, in_a in zip(texts, second, strict=True):
        for b, in_b in zip(texts, second, strict=True):
            if (a.topic and a.topic == b.topic) or (a.writer and a.writer == b.writer):
                assert in_a == in_b

"""Halves and samples of texts that keep groups and writers whole. numpy only."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from discovery.corpora.rows import Text
from discovery.labels import units_of


def halves(texts: Sequence[Text], seed: int) -> Bool[np.ndarray, " texts"]:
    """Which texts are of the second half: units (texts that share a group or writer) stay whole.

    Units are dealt out one by one, large ones and those of rare concepts first, each to the half
    that has the smaller share of its concepts (after Sechidis, Tsoumakas and Vlahavas 2011, "On the
    stratification of multi-label data"); ties fall to the smaller half.

    Args:
        seed: orders units that are alike.
    """
    every = sorted({name for text in texts for name in text.concepts})
    names = {name: i for i, name in enumerate(every)}
    units = units_of([text.topic for text in texts], [text.writer for text in texts])
    size = np.bincount(units)
    count = [Counter[int]() for _ in range(len(size))]
    for text, unit in zip(texts, _list(units), strict=True):
        count[unit].update(names[name] for name in text.concepts)
    total = Counter(names[name] for text in texts for name in text.concepts)
    rarest = np.array([min((total[at] for at in of), default=0) for of in count])
    order = np.lexsort((_hashes(texts, units, seed), rarest, -size))
    ahead = [0.0] * len(names)  # of each concept, the share in the first half less the second's
    taller = 0
    second = np.zeros(len(size), dtype=bool)
    for unit in _list(order):
        lead = sum(n * ahead[at] / total[at] for at, n in count[unit].items())
        second[unit] = lead > 0 or (lead == 0 and taller > 0)
        sign = -1 if second[unit] else 1
        taller += sign * int(size[unit])
        for at, n in count[unit].items():
            ahead[at] += sign * n / total[at]
    return second[units]


def sample(texts: Sequence[Text], limit: int, seed: int) -> list[Text]:
    """At most `limit` texts: whole groups (or writers, where groups are unknown) in the order of
    the hash of their names, until the next would be too many. The texts keep their order.

    The order of the texts does not matter, and a smaller limit gives a part of what a larger gives.
    """
    keys = [text.topic or text.writer or text.id for text in texts]
    size: dict[str, int] = {}
    for key in keys:
        size[key] = size.get(key, 0) + 1
    kept: set[str] = set()
    room = limit
    for key in sorted(size, key=lambda key: _hash(key, seed)):
        if size[key] > room:
            break
        kept.add(key)
        room -= size[key]
    return [text for text, key in zip(texts, keys, strict=True) if key in kept]


def _hashes(
    texts: Sequence[Text], units: Int[np.ndarray, " texts"], seed: int
) -> Int[np.ndarray, " units"]:
    """The place of each unit among all by the hash of its first text's id."""
    _, first = np.unique(units, return_index=True)
    ids = [text.id for text in texts]
    hashes = [_hash(ids[i], seed) for i in _list(first)]
    place = np.empty(len(hashes), dtype=np.int64)
    place[sorted(range(len(hashes)), key=hashes.__getitem__)] = np.arange(len(hashes))
    return place


def _list(numbers: Int[np.ndarray, " n"]) -> list[int]:
    return numbers.tolist()


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()

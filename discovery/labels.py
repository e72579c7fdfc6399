"""The labels of texts: which concepts, which comparison group, which independent unit.

numpy and scipy only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

MAX_FOLDS = 10


class Labels(NamedTuple):
    """The labels of some texts."""

    concepts: Bool[csr_array, "texts concepts"]
    """A text may have none, one or several concepts."""
    topics: Int[np.ndarray, " texts"]
    """Texts are compared with each other only within a topic; one topic where there are none."""
    units: Int[np.ndarray, " texts"]
    """Texts of different units share neither topic nor writer: folds and halves keep units whole.
    In a corpus without topics and writers every text is a unit."""

    @property
    def n_concepts(self) -> int:
        return self.concepts.shape[1]

    @property
    def counts(self) -> Int[np.ndarray, " concepts"]:
        """Texts of each concept."""
        return np.bincount(self.concepts.indices, minlength=self.n_concepts)

    def of(self, concept: int) -> Bool[np.ndarray, " texts"]:
        """Which texts are labelled with a concept, by its index."""
        return self.concepts[:, [concept]].toarray()[:, 0]

    def dense(self) -> Bool[np.ndarray, "texts concepts"]:
        """The labels as a dense array."""
        return self.concepts.toarray()

    def rows(self, keep: Bool[np.ndarray, " texts"] | Int[np.ndarray, " some"]) -> "Labels":
        """The labels of some of the texts."""
        return Labels(csr_array(self.concepts[keep]), self.topics[keep], self.units[keep])

    def columns(self, concepts: Int[np.ndarray, " some"]) -> "Labels":
        """The same texts with the labels of some concepts only, renumbered from 0."""
        return self._replace(concepts=csr_array(self.concepts[:, concepts]))

    def masked(self, keep: Bool[np.ndarray, " texts"]) -> "Labels":
        """The same texts, but those outside `keep` lose their labels: they count as others."""
        row = np.repeat(np.arange(len(keep)), np.diff(self.concepts.indptr))
        kept = keep[row]
        indptr = np.concatenate([[0], np.cumsum(kept)])[self.concepts.indptr]
        data, indices = self.concepts.data[kept], self.concepts.indices[kept]
        shape = self.concepts.shape
        return self._replace(concepts=csr_array((data, indices, indptr), shape=shape))

    def crossed(self, folds: Int[np.ndarray, " texts"]) -> "Labels":
        """The same labels with texts compared only within their topic and fold.

        For scores that another selection made for each fold: they have no common scale. Where folds
        keep topics whole, as with known topics, the groups are the topics.
        """
        _, topics = np.unique(np.stack([self.topics, folds]), axis=1, return_inverse=True)
        return self._replace(topics=topics.reshape(-1).astype(np.int64))

    def compared(self) -> Int[np.ndarray, " concepts"]:
        """Texts of each concept whose topic also holds a text that is not of the concept."""
        _, topic, size = np.unique(self.topics, return_inverse=True, return_counts=True)
        row = np.repeat(np.arange(len(topic)), np.diff(self.concepts.indptr))
        ones, shape = np.ones(len(row), np.int64), (len(size), self.n_concepts)
        table = csr_array((ones, (topic[row], self.concepts.indices)), shape=shape)
        table.sum_duplicates()
        full = np.repeat(size, np.diff(table.indptr)) == table.data
        counted = np.where(full, 0, table.data)
        return np.bincount(table.indices, counted, minlength=self.n_concepts).astype(np.int64)

    def shuffled(self, rng: np.random.Generator) -> "Labels":
        """The same texts with their labels shuffled within each topic: nothing is to be found."""
        order = np.arange(len(self.topics))
        by_topic = np.argsort(self.topics, kind="stable")
        ends = np.flatnonzero(np.diff(self.topics[by_topic])) + 1
        for inside in np.split(by_topic, ends):
            order[inside] = rng.permutation(inside)
        return self._replace(concepts=csr_array(self.concepts[order]))

    def folds(self) -> Int[np.ndarray, " texts"]:
        """At most `MAX_FOLDS` folds that keep units whole.

        With more units than that, each goes, large ones first, to the fold that has least of its
        concepts so far (of each concept as a share of its texts), and among those to the smallest:
        in the spirit of the iterative stratification of Sechidis et al. (2011).
        """
        _, unit, size = np.unique(self.units, return_inverse=True, return_counts=True)
        n = min(MAX_FOLDS, len(size))
        if n == len(size):
            return unit
        ones = np.ones(len(unit), np.int64)
        member = csr_array((ones, (unit, np.arange(len(unit)))), shape=(len(size), len(unit)))
        content = csr_array(member @ self.concepts.astype(np.int64))
        share = content.data / np.maximum(self.counts, 1)[content.indices]
        fold, filled = np.zeros(len(size), np.int64), np.zeros(n, np.int64)
        held = np.zeros((n, self.n_concepts))
        for u in np.argsort(-size, kind="stable"):
            part = slice(content.indptr[u], content.indptr[u + 1])
            concepts, added = content.indices[part], share[part]
            crowded = (held[:, concepts] @ added).round(12)
            fold[u] = np.lexsort((filled, crowded))[0]
            held[fold[u], concepts] += added
            filled[fold[u]] += size[u]
        return fold[unit]


def single(
    concepts: Int[np.ndarray, " texts"],
    n_concepts: int,
    topics: Int[np.ndarray, " texts"],
    writers: Int[np.ndarray, " texts"],
) -> Labels:
    """Labels of texts with one concept each (negative: none), and a known topic and writer."""
    rows = np.flatnonzero(concepts >= 0)
    ones = np.ones(len(rows), dtype=bool)
    matrix = csr_array((ones, (rows, concepts[rows])), shape=(len(concepts), n_concepts))
    return Labels(matrix, topics, units_of([str(t) for t in topics], [str(w) for w in writers]))


def units_of(topics: Sequence[str], writers: Sequence[str]) -> Int[np.ndarray, " texts"]:
    """The independent unit of each text: texts that share a topic or a writer share a unit.

    "" is an unknown topic or writer and is shared with nobody.
    """
    n = len(topics)
    names: dict[tuple[str, str], int] = {}
    rows, nodes = list[int](), list[int]()
    for i, pair in enumerate(zip(topics, writers, strict=True)):
        for kind, name in zip(("topic", "writer"), pair, strict=True):
            if name:
                rows.append(i)
                nodes.append(n + names.setdefault((kind, name), len(names)))
    total = n + len(names)
    graph = csr_array((np.ones(len(rows)), (rows, nodes)), shape=(total, total))
    _, component = connected_components(graph, directed=False)
    return np.unique(component[:n], return_inverse=True)[1].astype(np.int64)

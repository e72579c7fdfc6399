"""Exact mid-ranks of texts within groups, kept sparse, and the AUROCs that follow from them.

A group is a set of texts that may be compared with each other: the texts of one topic. Scores are
ranked inside their group and never pooled across groups. numpy and scipy only.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from scipy import stats
from scipy.sparse import csc_array, csr_array

from discovery.labels import Labels

BLOCK = 1 << 16
"""Non-zeros that are ranked at a time: their arrays stay in a processor's cache."""


class Ranks(NamedTuple):
    """Mid-ranks of texts x features within groups, kept sparse.

    The mid-rank (1 = lowest) of text i on feature f is `zero[group[i], f] + deviation[i, f]`: the
    zeros of a group share one rank, so only the non-zeros are stored.
    """

    deviation: Float[csr_array, "texts features"]
    zero: Float[np.ndarray, "groups features"]
    group: Int[np.ndarray, " texts"]
    """The group of each text, from 0."""
    size: Int[np.ndarray, " groups"]
    """Texts in each group."""

    def rows(self, keep: Bool[np.ndarray, " texts"]) -> "Ranks":
        """The ranks of some texts, as they were: `keep` must keep or drop groups whole."""
        return Ranks(self.deviation[keep], self.zero, self.group[keep], self.size)


def within_group_ranks(
    x: Float[csr_array, "texts features"] | Float[np.ndarray, "texts features"],
    groups: Int[np.ndarray, " texts"],
) -> Ranks:
    """Rank every feature within every group, ties sharing their mean rank.

    Features are ranked a block at a time, so the working memory is bounded.
    """
    size, group = group_codes(groups)
    columns = by_feature(x)
    deviation = np.empty(columns.nnz)
    zero = np.empty((columns.shape[1], len(size)))
    for block in blocks(columns, BLOCK, len(size)):
        ranked = rank_block(block, group, size)
        deviation[block.entries] = ranked.deviation
        zero[block.features] = ranked.zero
    ranked = csc_array((deviation, columns.indices, columns.indptr), shape=columns.shape)
    return Ranks(ranked.tocsr(), zero.T, group, size)


def group_codes(
    groups: Int[np.ndarray, " texts"],
) -> tuple[Int[np.ndarray, " groups"], Int[np.ndarray, " texts"]]:
    """Group sizes, and each text's group as a number from 0."""
    _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    return size, group


def members(groups: Int[np.ndarray, " texts"]) -> Iterator[Int[np.ndarray, " some"]]:
    """The indices of the texts of each group in turn, in their order."""
    order = np.argsort(groups, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def midranks(
    values: Float[np.ndarray, " texts"], groups: Int[np.ndarray, " texts"]
) -> Float[np.ndarray, " texts"]:
    """Mid-rank (1 = lowest) of each text within its group: all groups by one sort."""
    n = len(values)
    order = np.lexsort((values, groups))
    value, group = values[order], groups[order]
    new_group, new_run = np.ones(n, bool), np.ones(n, bool)
    np.not_equal(group[1:], group[:-1], out=new_group[1:])
    np.not_equal(value[1:], value[:-1], out=new_run[1:])
    start = np.flatnonzero(new_run | new_group)
    length = np.diff(start, append=n)
    lowest = np.flatnonzero(new_group)[np.cumsum(new_group)[start] - 1]
    ranks = np.empty(n)
    ranks[order] = np.repeat(start - lowest + (length + 1) / 2, length)
    return ranks


def by_feature(
    x: Float[csr_array, "texts features"] | Float[np.ndarray, "texts features"],
) -> Float[csc_array, "texts features"]:
    """A copy of `x` by columns, its non-zeros alone, texts in their order."""
    columns = csc_array(x, copy=True)
    columns.sum_duplicates()
    columns.eliminate_zeros()
    assert np.isfinite(columns.data).all(), "activations hold NaN or infinity"
    return columns


class Block(NamedTuple):
    """Some neighbouring features of a matrix by columns."""

    features: slice
    entries: slice
    """Where their non-zeros are in the matrix's arrays."""
    values: Float[np.ndarray, " nonzeros"]
    text: Int[np.ndarray, " nonzeros"]
    counts: Int[np.ndarray, " features"]
    """Non-zeros of each feature."""

    @property
    def feature(self) -> Int[np.ndarray, " nonzeros"]:
        """The feature of each non-zero, from 0 in the block."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


def blocks(columns: Float[csc_array, "texts features"], most: int, width: int) -> Iterator[Block]:
    """Cut features into blocks of at most `most` non-zeros and `most / width` features."""
    n_features: int = columns.shape[1]
    start = 0
    while start < n_features:
        room = int(columns.indptr[start]) + most
        stop = int(np.searchsorted(columns.indptr, room, side="right")) - 1
        stop = min(max(stop, start + 1), start + max(1, most // width), n_features)
        entries = slice(int(columns.indptr[start]), int(columns.indptr[stop]))
        counts = np.diff(columns.indptr[start : stop + 1])
        yield Block(
            slice(start, stop), entries, columns.data[entries], columns.indices[entries], counts
        )
        start = stop


class BlockRanks(NamedTuple):
    """Mid-ranks of a block of features within groups, as `Ranks` has them."""

    deviation: Float[np.ndarray, " nonzeros"]
    zero: Float[np.ndarray, "features groups"]
    ties: Float[np.ndarray, "features groups"]
    """Sum of t^3 - t over sets of t tied texts."""


def rank_block(
    block: Block, group: Int[np.ndarray, " texts"], size: Int[np.ndarray, " groups"]
) -> BlockRanks:
    """Rank each feature of a block within each group; the numbers do not depend on the block.

    Group, value and place in the column are packed into 64 bits, so that numpy's vectorised sort of
    integers does the work.
    """
    n, n_groups = len(block.values), len(size)
    starts = np.cumsum(block.counts) - block.counts
    place = np.arange(n) - np.repeat(starts, block.counts)
    low_bits = _bits(int(block.counts.max(initial=1)) - 1)
    code, code_bits = _ordered(block.values, 64 - low_bits - _bits(n_groups - 1))
    key = code << np.uint64(low_bits) | place.astype(np.uint64)
    if n_groups > 1:
        own = group[block.text]
        key |= own.astype(np.uint64) << np.uint64(code_bits + low_bits)
        count = np.bincount(block.feature * n_groups + own, minlength=len(starts) * n_groups)
    else:
        count = block.counts
    for start, length in zip(starts.tolist(), block.counts.tolist(), strict=True):
        key[start : start + length].sort()
    slot = np.repeat(starts, block.counts)
    slot += (key & np.uint64((1 << low_bits) - 1)).astype(np.int64)

    value = key >> np.uint64(low_bits)
    new_run = np.ones(n, dtype=bool)
    np.not_equal(value[1:], value[:-1], out=new_run[1:])
    new_run[starts[block.counts > 0]] = True
    zeros = np.tile(size, len(starts)) - count
    ties = (zeros.astype(np.float64) ** 3 - zeros).reshape(-1, n_groups)
    rank = np.arange(n, dtype=np.float64)
    if not new_run.all():
        run_start = np.flatnonzero(new_run)
        run_length = np.diff(run_start, append=n)
        rank = np.repeat(run_start + (run_length - 1) / 2, run_length)
        tied = run_length > 1
        segment = np.repeat(np.arange(len(count)), count)[run_start[tied]]
        length = run_length[tied].astype(np.float64)
        ties += np.bincount(segment, length**3 - length, len(count)).reshape(ties.shape)
    below_zero = block.values < 0
    zero = (zeros + 1) / 2
    if below_zero.any():
        below_zero = below_zero[slot]
        segment = np.repeat(np.arange(len(count)), count)
        negative = np.bincount(segment[below_zero], minlength=len(count))
        rank -= np.where(below_zero, zeros[segment], 0)
        zero += negative
    # A rank counts from 1 in its group, and texts above zero rank above the group's zeros.
    rank += np.repeat(1 + zeros - (np.cumsum(count) - count) - zero, count)
    deviation = np.empty(n)
    deviation[slot] = rank
    return BlockRanks(deviation, zero.reshape(-1, n_groups), ties)


def _bits(largest: int) -> int:
    return max(largest, 0).bit_length()


def _ordered(
    values: Float[np.ndarray, " n"], most_bits: int
) -> tuple[UInt64[np.ndarray, " n"], int]:
    """Integers in the order of the values, and how many bits they need."""
    single = values.astype(np.float32, copy=False)
    if most_bits >= 32 and (single is values or np.array_equal(single, values)):
        bits = single.view(np.uint32)
        if len(bits) == 0 or not (bits >> np.uint32(31)).any():
            return bits.astype(np.uint64), 31
        ordered = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
        return ordered.astype(np.uint64), 32
    levels, level = np.unique(values, return_inverse=True)
    bits = _bits(len(levels) - 1)
    assert bits <= most_bits, "too many texts and groups to rank at once"
    return level.astype(np.uint64), bits


def auroc_from_ranks(ranks: Ranks, labels: Labels) -> Float[np.ndarray, "features concepts"]:
    """Within-group AUROC of every feature for every concept, averaged over groups.

    The groups are those of `ranks`. Groups in which a concept has no text, or every text, are left
    out of its average; a concept without any group gives NaN.
    """
    shares = shares_of(ranks.group, ranks.size, labels)
    # By rows on both sides: `by_text.T` is by columns, and would turn all the ranks around.
    auroc = (csr_array(shares.by_text.T) @ ranks.deviation).toarray()
    auroc += shares.by_group @ ranks.zero - shares.least[:, None]
    auroc[~shares.known] = np.nan
    return auroc.T


class Shares(NamedTuple):
    """What every text and group adds to a concept's mean within-group AUROC."""

    by_text: Float[csr_array, "texts concepts"]
    """Of a positive text: 1 / (groups used, times the pairs of its group)."""
    by_group: Float[csr_array, "concepts groups"]
    """Sum of `by_text` over the positives of the group."""
    least: Float[np.ndarray, " concepts"]
    """What the sum of mid-ranks times `by_text` would be with every positive ranked lowest."""
    known: Bool[np.ndarray, " concepts"]
    """Whether any group holds both a text of the concept and another."""
    positives: Int[csr_array, "concepts groups"]


def shares_of(
    group: Int[np.ndarray, " texts"], size: Int[np.ndarray, " groups"], labels: Labels
) -> Shares:
    """Shares of texts whose groups are `group`, numbered from 0."""
    n_texts, n_concepts = labels.concepts.shape
    row = np.repeat(np.arange(n_texts), np.diff(labels.concepts.indptr))
    concept = labels.concepts.indices
    ones = np.ones(len(row), np.int64)
    positives = csr_array((ones, (concept, group[row])), shape=(n_concepts, len(size)))
    positives.sum_duplicates()
    owner = np.repeat(np.arange(n_concepts), np.diff(positives.indptr))
    m, n = positives.data, size[positives.indices] - positives.data
    used = n > 0
    groups_used = np.bincount(owner[used], minlength=n_concepts)
    share = np.where(used, 1 / np.maximum(groups_used[owner] * m * n, 1), 0.0)
    by_pair = csr_array((share, positives.indices, positives.indptr), shape=positives.shape)
    weight = share[_positions(positives, concept, group[row])]
    by_text = csr_array((weight, concept, labels.concepts.indptr), shape=labels.concepts.shape)
    by_group = csr_array((share * m, by_pair.indices, by_pair.indptr), shape=by_pair.shape)
    least = np.bincount(owner, share * m * (m + 1) / 2, minlength=n_concepts).astype(np.float64)
    return Shares(by_text, by_group, least, groups_used > 0, positives)


def _positions(
    table: Int[csr_array, "rows columns"],
    row: Int[np.ndarray, " entries"],
    column: Int[np.ndarray, " entries"],
) -> Int[np.ndarray, " entries"]:
    """Where the entries (row, column) are stored in `table`, whose indices are sorted."""
    n_columns = table.shape[1]
    owner = np.repeat(np.arange(table.shape[0]), np.diff(table.indptr))
    stored = owner * n_columns + table.indices
    return np.searchsorted(stored, row.astype(np.int64) * n_columns + column)


def within_group_auroc(
    x: Float[csr_array, "texts features"] | Float[np.ndarray, "texts features"], labels: Labels
) -> Float[np.ndarray, "features concepts"]:
    """Exact, tie-aware AUROC within topics of all features for all concepts at once."""
    return auroc_from_ranks(within_group_ranks(x, labels.topics), labels)


def aurocs_by_group(
    scores: Float[np.ndarray, "texts concepts"], labels: Labels
) -> Float[np.ndarray, "concepts groups"]:
    """AUROC of column c for concept c in each topic; NaN where it has no text or every text."""
    size, group = group_codes(labels.topics)
    n_concepts: int = scores.shape[1]
    result = np.full((n_concepts, len(size)), np.nan)
    for g, n in enumerate(size):
        inside = group == g
        ranks = stats.rankdata(scores[inside], axis=0)
        positive = labels.concepts[inside].toarray()
        m: np.ndarray = np.count_nonzero(positive, axis=0)
        used: np.ndarray = (m > 0) & (m < n)
        above: np.ndarray = np.sum(ranks * positive, axis=0) - m * (m + 1) / 2
        result[used, g] = above[used] / (m * (n - m))[used]
    return result


def centred(
    x: Float[np.ndarray, "texts features"], groups: Int[np.ndarray, " texts"]
) -> Float[np.ndarray, "texts features"]:
    """`x` less the mean of each group."""
    size, group = group_codes(groups)
    texts = np.arange(len(group))
    mean = csr_array((1 / size[group], (group, texts)), shape=(len(size), len(group))) @ x
    return x - mean[group]

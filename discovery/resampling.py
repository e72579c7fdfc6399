"""AUROCs of texts whose units are drawn with replacement.

numpy only.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from discovery.ranks import members

AT_ONCE = 1 << 22
"""Numbers that a bootstrap holds at a time."""


def aurocs(
    values: Float[np.ndarray, " texts"],
    positive: Bool[np.ndarray, " texts"],
    groups: Int[np.ndarray, " texts"],
    units: Int[np.ndarray, " texts"],
    draws: int,
    seed: int,
) -> Float[np.ndarray, " draws"]:
    """Mean within-group AUROC in each draw of units, and of one more unit at chance.

    A topic whose unit is drawn twice counts twice. The unit at chance counts among those with
    positives, or among those with others where these are fewer.
    """
    unit: np.ndarray = np.unique(units, return_inverse=True)[1]
    n_units = int(unit.max()) + 1
    kinds = [len(np.unique(unit[kind])) for kind in (positive, ~positive)]
    n_carriers, rarer = min(kinds), kinds[0] <= kinds[1]  # the kind of which fewer units have texts
    slot = np.arange(n_units)
    if n_units == len(values):  # then texts of one group, kind and value are alike: count them
        texts = np.stack([groups.astype(np.float64), positive.astype(np.float64), values])
        cells, slot = np.unique(texts, axis=1, return_inverse=True)
        groups, values = cells[0].astype(np.int64), cells[2]
        positive, unit = cells[1] > 0, np.arange(len(groups))
    n_slots = int(slot.max()) + 1
    carries = np.zeros(n_slots, dtype=bool)
    carries[unit[positive == rarer]] = True
    pairs = [_Pairs.of(values, positive, inside) for inside in members(groups)]
    rng = np.random.default_rng(seed)
    drawn = np.empty(draws)
    at_once = max(1, AT_ONCE // n_units)
    for start in range(0, draws, at_once):
        n = min(at_once, draws - start)
        chosen = slot[rng.integers(0, n_units, (n, n_units))] + n_slots * np.arange(n)[:, None]
        times = np.bincount(chosen.ravel(), minlength=n * n_slots).reshape(n, n_slots)
        resampled = _resampled_auroc(pairs, unit, times)
        weight = times[:, carries].sum(1)
        at_chance = rng.binomial(n_carriers + 1, 1 / (n_carriers + 1), size=n)
        total = np.maximum(weight + at_chance, 1)
        drawn[start : start + n] = (weight * resampled + 0.5 * at_chance) / total
    return drawn


class _Pairs(NamedTuple):
    """The positives and others of a group, and how many of the others each positive beats."""

    positives: Int[np.ndarray, " positives"]
    others: Int[np.ndarray, " others"]
    """By value."""
    below: Int[np.ndarray, " positives"]
    """Others below each positive."""
    level: Int[np.ndarray, " positives"]
    """Others below it or level with it."""

    @staticmethod
    def of(
        values: Float[np.ndarray, " texts"],
        positive: Bool[np.ndarray, " texts"],
        inside: Int[np.ndarray, " some"],
    ) -> "_Pairs":
        positives, others = inside[positive[inside]], inside[~positive[inside]]
        others = others[np.argsort(values[others])]
        below = np.searchsorted(values[others], values[positives], side="left")
        level = np.searchsorted(values[others], values[positives], side="right")
        return _Pairs(positives, others, below, level)


def _resampled_auroc(
    pairs: list[_Pairs], unit: Int[np.ndarray, " texts"], times: Int[np.ndarray, "draws units"]
) -> Float[np.ndarray, " draws"]:
    """Mean within-group AUROC where each unit counts `times` times; 0.5 where there is none."""
    total, used = np.zeros(len(times)), np.zeros(len(times))
    for positives, others, below, level in pairs:
        if not len(positives) or not len(others):
            continue
        own = times[:, unit[positives]]
        up_to = np.zeros((len(times), len(others) + 1), np.int64)
        np.cumsum(times[:, unit[others]], axis=1, out=up_to[:, 1:])
        beaten = np.einsum("dt,dt->d", own, up_to[:, below] + up_to[:, level]) / 2
        n_pairs = own.sum(1) * up_to[:, -1]
        whole = len(np.unique(unit[np.append(positives, others)])) == 1
        count = np.where(n_pairs > 0, own[:, 0] if whole else 1, 0)
        total += count * beaten / np.maximum(n_pairs, 1)
        used += count
    return np.where(used > 0, total / np.maximum(used, 1), 0.5)

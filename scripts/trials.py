"""One trial of each simulation of the verdict protocol: a seed in, counts out.

Trials are independent of each other given what they are run on, and each is a plain function, so
that they can be spread over processes. What they return can be written as JSON and read again.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import planted
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from discovery import captured, contrast, inference, selection
from discovery.align import AlignResult, align, verdict
from discovery.confirm import Confirmation
from discovery.labels import Labels
from discovery.records import VERDICTS
from discovery.selection import LabelledSet

BINS = 20
LEVELS = (0.001, 0.01, 0.05, 0.1)
Q = 0.05


@dataclass(frozen=True)
class Setting:
    """What the trials are run on."""

    design: planted.Design
    """Of the worlds with a selection and a confirmation set."""
    small: planted.Design
    """Of the worlds with one corpus, where whole selections are repeated."""
    few: planted.Design
    """Of worlds where few concepts are represented."""
    k: int = 16
    shuffles: int = 40
    """Of one cross-fitted run with a permutation null."""
    run: str = ""
    """A run folder whose captured activations take the place of planted worlds under the null."""
    intervals: int = 200
    """Latents of one trial of intervals."""
    draws: int = 1000
    """Of the bootstrap."""


class Sets(NamedTuple):
    """What the protocol is run on."""

    selection: LabelledSet
    confirmation: LabelledSet
    lexical: LabelledSet | None


def protocol(
    sets: Sets,
    families: Int[np.ndarray, " concepts"],
    k: int,
    near: Callable[[str, Labels], Int[np.ndarray, "concepts neighbours"]] | None = None,
) -> AlignResult:
    """Steps 1 to 10.

    Args:
        near: The nearest concepts at a view under some labels of the selection set; without it,
            those whose mean latents are nearest.
    """
    labels = sets.selection.labels
    by_view = {
        view: near(view, labels) if near else nearest(x, labels)
        for view, x in sets.selection.latents.items()
    }
    names = [f"concept {c}" for c in range(labels.n_concepts)]
    of = [f"family {f}" for f in families]
    return align(*sets, None, by_view, names, of, k=k, q=Q, verdicts_only=True)


def by_family(
    made: planted.World, seed: int
) -> Callable[[str, Labels], Int[np.ndarray, "concepts neighbours"]]:
    """The nearest concepts of a planted world under its own labels."""
    near = contrast.nearest(planted.vectors(made, seed), 5)
    return lambda _view, _labels: near


def nearest(x: csr_array, labels: Labels) -> Int[np.ndarray, "concepts neighbours"]:
    """The five nearest concepts by mean latents."""
    count = np.maximum(labels.counts, 1)[:, None]
    means = csr_array(labels.concepts.T.astype(np.float64) @ x).toarray() / count
    return contrast.nearest(means - means.mean(0), 5)


class Residuals(NamedTuple):
    """Pooled residuals of the selection set and of neutral texts of a run, by view."""

    selection: dict[str, Float[np.ndarray, "texts d_model"]]
    neutral: dict[str, Float[np.ndarray, "neutral_texts d_model"]]

    def nearest(self, view: str, labels: Labels) -> Int[np.ndarray, "concepts neighbours"]:
        """The five nearest concepts by contrastive vectors."""
        fitted = contrast.contrastive_vectors(self.selection[view], labels, self.neutral[view], 0.5)
        return contrast.nearest(fitted.vectors, 5)


@functools.cache
def captured_sets(run: str) -> tuple[Sets, Residuals, Int[np.ndarray, " concepts"]]:
    """The sets of a run folder's capture stage, and the family of each of its concepts.

    Families bear on no verdict, so all concepts are of one.
    """
    read = captured.load(Path(run) / "capture")
    names = sorted({c for row in read.texts for c in row.concepts})
    picked = {
        name: captured.pick(read.texts, name, names)
        for name in ("selection", "confirmation", "lexical", "neutral")
    }
    sets = [
        LabelledSet({v: csr_array(x[own.rows]) for v, x in read.latents.items()}, own.labels)
        if len(own.rows)
        else None
        for own in (picked["selection"], picked["confirmation"], picked["lexical"])
    ]
    first, second, lexical = sets
    assert first is not None, "no text of the selection set"
    assert second is not None, "no text of the confirmation set"
    stories, neutral = (
        {v: read.residuals[v][picked[name].rows] for v in read.latents}
        for name in ("selection", "neutral")
    )
    families = np.zeros(len(names), np.int64)
    return Sets(first, second, lexical), Residuals(stories, neutral), families


def _ground(
    setting: Setting, seed: int
) -> tuple[Sets, Int[np.ndarray, " concepts"], Residuals | None]:
    """What labels are shuffled on: a world of its own for each seed, or the captured run."""
    if setting.run:
        sets, residuals, families = captured_sets(setting.run)
        return sets, families, residuals
    made = planted.world(setting.design, seed)
    return Sets(made.selection, made.confirmation, made.lexical), made.family, None


def shuffled_trial(setting: Setting, seed: int) -> dict[str, Any]:
    """The whole protocol with all labels shuffled within topics: every rejection is an error."""
    sets, families, residuals = _ground(setting, seed)
    rng = np.random.default_rng([seed, 1])
    null = _relabelled(sets, lambda labels: labels.shuffled(rng))
    result = protocol(null, families, setting.k, residuals and residuals.nearest)
    p, smooth = _p_values(result, null.confirmation, rng)
    return {
        "verdicts": _verdicts(result),
        "rejected": result.rejected,
        "bins": [np.histogram(row, BINS, (0, 1))[0].tolist() for row in smooth],
        "below": [[int(np.sum(row <= level)) for level in LEVELS] for row in p],
        "tests": p.shape[1],
    }


def half_trial(setting: Setting, seed: int) -> dict[str, Any]:
    """The protocol with the labels of half of the concepts moved: only theirs are errors."""
    sets, families, residuals = _ground(setting, seed)
    rng = np.random.default_rng([seed, 2])
    moved = np.sort(rng.permutation(len(families))[: len(families) // 2])
    null = np.isin(np.arange(len(families)), moved)
    own = _relabelled(sets, lambda labels: planted.mixed(labels, moved, rng))
    result = protocol(own, families, setting.k, residuals and residuals.nearest)
    return _errors(result, null, null, null, null)


def planted_trial(setting: Setting, seed: int) -> dict[str, Any]:
    """The protocol on a planted world: verdicts by what was planted, and false discoveries."""
    made = planted.world(setting.design, seed)
    sets = Sets(made.selection, made.confirmation, made.lexical)
    result = protocol(sets, made.family, setting.k, by_family(made, seed))
    chosen = result.fit.selection
    heard = chosen.view == planted.HEARS
    concepts = np.arange(len(made.kind))
    own = made.signal if heard else np.zeros_like(made.signal)
    single = own[concepts, chosen.latent] if heard else np.zeros(len(concepts), bool)
    members = np.any(own[concepts[:, None], chosen.members], axis=1) if heard else single
    nothing = unheard(made)
    of_family = np.array([kind == "shared" for kind in made.kind])
    lexical = np.array([kind != "decoy" for kind in made.kind])
    table = Counter(
        (kind, round(float(strength), 3), row.verdict)
        for kind, strength, row in zip(made.kind, made.strength, result.alignments, strict=True)
    )
    right = Counter(
        round(float(s), 3)
        for kind, s, hit in zip(made.kind, made.strength, single, strict=True)
        if kind == "planted" and hit
    )
    errors = _errors(result, ~single, ~members, nothing, nothing | of_family, lexical)
    return {
        "table": [[*key, n] for key, n in table.items()],
        "right": list(right.items()),
        "heard": int(heard),
        **errors,
    }


def few_trial(setting: Setting, seed: int) -> dict[str, Any]:
    """A world where few concepts are represented: how many of those called found are not?

    By step 5 as it is, with concepts as the unit, and by Benjamini-Hochberg over all tests.
    """
    made = planted.world(setting.few, seed)
    sets = Sets(made.selection, made.confirmation, None)
    result = protocol(sets, made.family, setting.k, by_family(made, seed))
    null = unheard(made)
    usual = result.singles, result.sets
    rates: dict[str, Any] = {"concepts": int((~null).sum())}
    for name, parts in {"over concepts": usual, "over tests": over_tests(*usual)}.items():
        tests = np.stack([part.q <= Q for part in parts])
        passed = [np.stack([part.q <= Q, part.specific_q <= Q], 1).tolist() for part in parts]
        verdicts = [
            verdict((one[0], one[1]), (group[0], group[1]), lexical=False)
            for one, group in zip(*passed, strict=True)
        ]
        found = np.array([v.startswith("found") for v in verdicts])
        specific = np.array([v in ("found", "found as a set") for v in verdicts])
        rates[name] = {
            "tests": proportion(tests & null, tests),
            "found": proportion(found & null, found),
            "specific": proportion(specific & null, specific),
            "hits": int(found[~null].sum()),
        }
    return rates


def over_tests(singles: Confirmation, sets: Confirmation) -> tuple[Confirmation, Confirmation]:
    """Step 5 by another rule: the tests of singles and sets are the unit."""
    p = np.concatenate([singles.p, sets.p])
    return _specific(singles, sets, inference.benjamini_hochberg(p).reshape(2, -1))


def _specific(
    singles: Confirmation, sets: Confirmation, q: Float[np.ndarray, "2 concepts"]
) -> tuple[Confirmation, Confirmation]:
    """Step 6 on what step 5 rejects."""
    p = np.stack([singles.specific_p, sets.specific_p])
    specific_q = np.full(p.shape, np.nan)
    specific_q[q <= Q] = inference.benjamini_hochberg(p[q <= Q])
    return (
        singles._replace(q=q[0], specific_q=specific_q[0]),
        sets._replace(q=q[1], specific_q=specific_q[1]),
    )


def unheard(made: planted.World) -> Bool[np.ndarray, " concepts"]:
    """Concepts of which there is nothing to be found in the confirmation set."""
    return ~np.any(made.signal, axis=1)


def _relabelled(sets: Sets, change: Callable[[Labels], Labels]) -> Sets:
    """The sets under other labels, each changed by itself."""
    first, second, lexical = sets
    return Sets(
        first.relabelled(change(first.labels)),
        second.relabelled(change(second.labels)),
        lexical and lexical.relabelled(change(lexical.labels)),
    )


def _verdicts(result: AlignResult) -> dict[str, int]:
    counts = Counter(row.verdict for row in result.alignments)
    return {verdict: counts[verdict] for verdict in VERDICTS}


def _errors(
    result: AlignResult,
    single: Bool[np.ndarray, " concepts"],
    sets: Bool[np.ndarray, " concepts"],
    concept: Bool[np.ndarray, " concepts"],
    specific: Bool[np.ndarray, " concepts"],
    lexical: Bool[np.ndarray, " concepts"] | None = None,
) -> dict[str, Any]:
    """False-discovery proportions, where the arrays say which null hypotheses are true.

    `tests` are those of step 5; `verdicts` counts concepts of which something was found, which is
    what step 5 controls; `specific` those found, or as a set, after step 6; `lexical` is what step
    9 controls.
    """
    rejected = np.array([(a.q <= Q, a.set_q <= Q) for a in result.alignments]).T
    null = np.stack([single, sets])
    found = np.array([a.verdict.startswith("found") for a in result.alignments])
    own = np.array([a.verdict in ("found", "found as a set") for a in result.alignments])
    words = np.array([a.lexical_q is not None and a.lexical_q <= Q for a in result.alignments])
    return {
        "tests": proportion(rejected & null, rejected),
        "verdicts": proportion(found & concept, found),
        "specific": proportion(own & specific, own),
        "lexical": proportion(words & (concept if lexical is None else lexical), words),
    }


def proportion(false: Bool[np.ndarray, "..."], all_: Bool[np.ndarray, "..."]) -> tuple[int, int]:
    """False discoveries, and all."""
    return int(false.sum()), int(all_.sum())


def _p_values(
    result: AlignResult, confirmation: LabelledSet, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "kinds tests"], Float[np.ndarray, "kinds tests"]]:
    """Raw p-values of singles and sets, and the same smoothed.

    A rank test has few attainable values where many texts tie at zero. P(T > t) + u P(T = t) with
    u uniform is uniform under the null whatever the ties; P(T > t) is one minus the p-value of the
    negated scores.
    """
    alignments = result.alignments
    p = np.array([[a.p for a in alignments], [a.set_p for a in alignments]])
    labels = confirmation.labels
    chosen = result.fit.selection
    reverse = np.array(
        [
            [
                inference.rank_test(-values[:, c], labels.of(c), labels.topics).p
                for c in range(labels.n_concepts)
            ]
            for values in selection.score(chosen, confirmation.latents[chosen.view])
        ]
    )
    more = 1 - reverse
    return p, more + rng.random(p.shape) * (p - more)


TRIALS: dict[str, Callable[[Setting, int], dict[str, Any]]] = {
    "shuffled": shuffled_trial,
    "half": half_trial,
    "planted": planted_trial,
    "few": few_trial,
}

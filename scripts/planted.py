"""Planted worlds: pooled latents of texts whose answers are known. numpy and scipy only.

A latent's activation is `scale * max(0, u - threshold)`, where u is standard normal within a topic:
noise of its own, and factors that many latents share. Topics and writers move u for all of their
texts at once. A latent that stands for a concept has u raised by a shift in the concept's texts.
The shift is computed from the AUROC wanted: the true within-topic AUROC, in the mean over topics
and writers, ties at zero counted half.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy import special
from scipy.interpolate import RegularGridInterpolator
from scipy.sparse import csr_array

from discovery.labels import Labels, single
from discovery.selection import LabelledSet

HEARS = "blocks.5.hook_resid_post@rule"
DEAF = "blocks.1.hook_resid_post@rule"
"""Views of a world: one with the planted latents, and one of noise alone."""

COPIES = 2  # noisy copies of each planted latent
COPY = 0.8  # correlation of a copy with its latent, within topics
FACTORS = 8  # shared by latents at random
MOVES = 0.3  # sd over topics of a shift, as a part of the noise's sd
CUE = 0.98  # AUROC of a lexical decoy where its word is


@dataclass(frozen=True)
class Design:
    """What a world holds. Concepts that are given no kind have nothing to be found."""

    family: int = 9
    """Concepts of a family, one after another."""
    families: int = 19
    strengths: tuple[float, ...] = (0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95)
    """AUROCs of planted concepts."""
    each: int = 8
    """Planted concepts of each strength: one latent of their own, and noisy copies of it."""
    neighbours: int = 8
    """Concepts that have no latent but raise that of one planted concept of their family."""
    neighbour_auroc: float = 0.7
    shared: int = 1
    """Families whose concepts all raise the same latent."""
    spread: int = 8
    """Concepts that raise many weak latents each."""
    decoys: int = 16
    """Concepts with a latent for their word: it fires on mentions and, by worn-out cues, in the
    selection set, but not in the confirmation set."""
    latents: int = 2000
    deaf: int = 400
    """Latents of the view that hears nothing."""
    topics: tuple[int, int] = (12, 12)
    """Of the selection and of the confirmation set; each has one text of every concept."""
    writers: tuple[int, int] = (7, 7)
    mentions: int = 8
    """Texts a concept with its word alone; 0 gives no lexical set."""

    def __post_init__(self) -> None:
        if self.planted + self.decoys > self.concepts - self.shared * self.family:
            raise ValueError(f"{self.concepts} concepts are too few for what is to be planted")

    @property
    def concepts(self) -> int:
        return self.family * self.families

    @property
    def planted(self) -> int:
        return self.each * len(self.strengths) + self.neighbours + self.spread


class World(NamedTuple):
    """A planted world and its answers."""

    selection: LabelledSet
    confirmation: LabelledSet
    lexical: LabelledSet | None
    kind: list[str]
    """Of each concept: planted, neighbour, shared, spread, decoy, nothing."""
    strength: Float[np.ndarray, " concepts"]
    """The AUROC of the best latent for the concept; of a decoy where its word is."""
    signal: Bool[np.ndarray, "concepts latents"]
    """Which latents of `HEARS` stand for which concepts in the confirmation set."""
    family: Int[np.ndarray, " concepts"]


class _Plan(NamedTuple):
    """The latents of a world, and what concepts do to them."""

    kind: list[str]
    strength: Float[np.ndarray, " concepts"]
    stories: Float[np.ndarray, "concepts latents"]
    """AUROCs; one half where nothing is planted."""
    cues: Float[np.ndarray, "concepts latents"]
    """The same in texts that hold the concept's word."""
    source: Int[np.ndarray, " latents"]
    """The latent whose noise a copy shares; itself for the others."""
    threshold: Float[np.ndarray, " latents"]
    moves: Float[np.ndarray, "2 latents"]
    """Standard deviation over topics and over writers."""
    loading: Float[np.ndarray, "factors latents"]
    scale: Float[np.ndarray, " latents"]


def world(design: Design, seed: int) -> World:
    """A world of its own for every seed."""
    rng = np.random.default_rng(seed)
    plan = _plan(design, rng)
    n = design.concepts
    selection, confirmation = (
        _labelled(rng, design, plan, one_each(n, topics, writers), _shifts(plan, aurocs))
        for topics, writers, aurocs in zip(
            design.topics,
            design.writers,
            (np.maximum(plan.stories, plan.cues), plan.stories),
            strict=True,
        )
    )
    lexical = None
    if design.mentions:
        labels = one_each(n, design.mentions, design.mentions)
        lexical = _labelled(rng, design, plan, labels, _shifts(plan, plan.cues))
    family = np.arange(n) // design.family
    signal = plan.stories > 0.5
    return World(selection, confirmation, lexical, plan.kind, plan.strength, signal, family)


def vectors(made: World, seed: int) -> Float[np.ndarray, "concepts d_model"]:
    """Contrastive vectors for a world, which has no residuals: those of a family lie together."""
    rng = np.random.default_rng(seed)
    n = len(made.family)
    centre, own = rng.normal(size=(int(made.family.max()) + 1, 64)), rng.normal(size=(n, 64))
    return centre[made.family] + 0.7 * own


def one_each(n_concepts: int, topics: int, writers: int) -> Labels:
    """One text of every concept in every topic; writers take whole topics, in turn."""
    topic = np.repeat(np.arange(topics), n_concepts)
    return single(np.tile(np.arange(n_concepts), topics), n_concepts, topic, topic % writers)


def _plan(design: Design, rng: np.random.Generator) -> _Plan:
    n, d = design.concepts, design.latents
    kind, strength = ["nothing"] * n, np.full(n, 0.5)
    stories, cues = np.full((n, d), 0.5), np.full((n, d), 0.5)
    source = np.arange(d)
    free = iter(rng.permutation(d))
    shared = rng.choice(design.families, design.shared, replace=False)
    rest = rng.permutation(np.flatnonzero(~np.isin(np.arange(n) // design.family, shared)))
    queue = iter(rest)

    def plant(concept: int, own: str, auroc: float, where: Float[np.ndarray, "concepts latents"]):
        kind[concept], strength[concept] = own, auroc
        latent = next(free)
        where[concept, latent] = auroc
        return latent

    for f in shared:
        latent = next(free)
        for c in range(f * design.family, (f + 1) * design.family):
            kind[c], strength[c], stories[c, latent] = "shared", 0.92, 0.92
    owners = []
    for auroc in np.repeat(design.strengths, design.each):
        concept = next(queue)
        latent = plant(concept, "planted", auroc, stories)
        owners.append((concept, latent))
        for _ in range(COPIES):
            copy = next(free)
            source[copy] = latent
            stories[concept, copy] = 0.5 + COPY * (auroc - 0.5)
    for _ in range(design.spread):
        concept = next(queue)
        kind[concept], strength[concept] = "spread", 0.65
        stories[concept, [next(free) for _ in range(20)]] = 0.65
    for _ in range(design.decoys):
        plant(next(queue), "decoy", CUE, cues)
    left = list(queue)
    strong = [(c, latent) for c, latent in owners if strength[c] >= 0.9]
    for concept, latent in strong:
        mates = [c for c in left if c // design.family == concept // design.family]
        if mates and kind.count("neighbour") < design.neighbours:
            c = mates[0]
            left.remove(c)
            kind[c], strength[c], stories[c, latent] = (
                "neighbour",
                design.neighbour_auroc,
                design.neighbour_auroc,
            )
    density = np.exp(rng.uniform(np.log(0.01), np.log(0.3), d))
    used = (stories > 0.5).any(0) | (cues > 0.5).any(0)
    density[used] = np.exp(rng.uniform(np.log(0.03), np.log(0.2), np.count_nonzero(used)))
    moves = rng.gamma(2, 0.15, (2, d))
    distractors = rng.random(d) < 0.1
    moves[:, distractors & ~used] *= 5  # these tell topics and writers, not concepts
    moves = np.where(used, np.minimum(moves, 0.6), moves)
    total = np.sqrt(1 + (moves**2).sum(0))
    loading = rng.normal(0, 1, (FACTORS, d)) * (rng.random((FACTORS, d)) < 0.25)
    share = rng.uniform(0, 0.5, d)  # of the variance within topics
    loading *= np.sqrt(share / np.maximum((loading**2).sum(0), 1e-9))
    return _Plan(
        kind,
        strength,
        stories,
        cues,
        source,
        -special.ndtri(density) * total,
        moves,
        loading,
        np.exp(rng.normal(0, 0.5, d)),
    )


def _labelled(
    rng: np.random.Generator,
    design: Design,
    plan: _Plan,
    labels: Labels,
    shifts: csr_array,
) -> LabelledSet:
    """Texts with these labels; `shifts` are of concepts x latents."""
    u = _noise(rng, plan, len(labels.topics))
    for moves, groups in zip(plan.moves, (labels.topics, labels.units), strict=True):
        size = int(groups.max()) + 1
        u += (rng.standard_normal((size, u.shape[1]), dtype=np.float32) * moves)[groups]
    raised = csr_array(labels.concepts.astype(np.float64) @ shifts).tocoo()
    topic = labels.topics[raised.row]
    jitter = rng.normal(1, MOVES, (int(labels.topics.max()) + 1, u.shape[1]))
    u[raised.row, raised.col] += raised.data * jitter[topic, raised.col]
    x = (np.maximum(u - plan.threshold, 0) * plan.scale).astype(np.float32)
    deaf = rng.standard_normal((len(x), design.deaf), dtype=np.float32) - np.float32(1.2)
    return LabelledSet({HEARS: csr_array(x), DEAF: csr_array(np.maximum(deaf, 0))}, labels)


def _noise(rng: np.random.Generator, plan: _Plan, texts: int) -> Float[np.ndarray, "texts latents"]:
    """Standard normal, correlated through factors; copies follow their latent."""
    d = len(plan.threshold)
    u = rng.standard_normal((texts, d), dtype=np.float32)
    u *= np.sqrt(1 - (plan.loading**2).sum(0)).astype(np.float32)
    u += rng.standard_normal((texts, FACTORS), dtype=np.float32) @ plan.loading.astype(np.float32)
    copies = np.flatnonzero(plan.source != np.arange(d))
    u[:, copies] = COPY * u[:, plan.source[copies]] + np.sqrt(1 - COPY**2) * u[:, copies]
    return u


def _shifts(plan: _Plan, aurocs: Float[np.ndarray, "concepts latents"]) -> csr_array:
    """The shift of u that gives each AUROC above one half, [concepts, latents]."""
    concept, latent = np.nonzero(aurocs > 0.5)
    spread = np.sqrt((plan.moves[:, latent] ** 2).sum(0))
    values = shift_for(aurocs[concept, latent], plan.threshold[latent], spread)
    return csr_array((values, (concept, latent)), shape=aurocs.shape)


def shift_for(
    auroc: ArrayLike, threshold: ArrayLike, spread: ArrayLike, moves: float = MOVES
) -> Float[np.ndarray, " n"]:
    """The shift whose true AUROC, in the mean over topics, is `auroc`; the inverse of `true_auroc`.

    A shift differs over topics: its standard deviation is `moves` times itself. Elements are
    independent problems.

    Raises:
        ValueError: an AUROC that no shift up to `TOP` gives.
    """
    wanted, threshold, spread = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(a, np.float64)) for a in (auroc, threshold, spread))
    )
    low, high = np.zeros(wanted.shape), np.full(wanted.shape, TOP / (1 + 3 * moves))
    if (reached := true_auroc(high, threshold, spread, moves) < wanted).any():
        raise ValueError(f"no shift gives an AUROC of {wanted[reached][0]:.3f} at that density")
    for _ in range(40):
        middle = (low + high) / 2
        above = true_auroc(middle, threshold, spread, moves) > wanted
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


TOP = 20.0  # the largest shift of the table
CUTS = (-6.0, 8.0)  # its thresholds


def true_auroc(
    shift: ArrayLike, threshold: ArrayLike, spread: ArrayLike = 0.0, moves: float = MOVES
) -> Float[np.ndarray, " n"]:
    """The within-topic AUROC of max(0, u - threshold) for N(shift, 1) against N(0, 1).

    In the mean over topics: u is moved by N(0, spread) as a whole, and the shift is multiplied by
    N(1, moves).
    """
    shift, threshold, spread = (
        np.atleast_1d(np.asarray(a, np.float64)) for a in (shift, threshold, spread)
    )
    node, weight = np.polynomial.hermite_e.hermegauss(9)
    weight = weight / weight.sum()
    t = threshold[..., None, None] - spread[..., None, None] * node[:, None]
    s = shift[..., None, None] * (1 + moves * node)
    points = np.stack(np.broadcast_arrays(np.clip(s, -TOP, TOP), np.clip(t, *CUTS)), -1)
    return np.einsum("...ij,i,j->...", _table()(points), weight, weight)


@functools.cache
def _table() -> RegularGridInterpolator:
    """AUROC by shift and threshold, from the two normal distributions cut at the threshold."""
    shift, threshold = np.linspace(-TOP, TOP, 401), np.linspace(*CUTS, 141)
    u = np.arange(-6, TOP + 8, 0.01)
    density = np.exp(-((u - shift[:, None]) ** 2) / 2) * 0.01 / np.sqrt(2 * np.pi)
    pieces = density * special.ndtr(u)
    above = np.cumsum(pieces[:, ::-1], axis=1)[:, ::-1] - pieces / 2  # by trapezoids
    at = np.searchsorted(u, threshold - 0.005)
    tied = special.ndtr(threshold) * special.ndtr(threshold - shift[:, None]) / 2
    return RegularGridInterpolator((shift, threshold), above[:, at] + tied)


def flat(rng: np.random.Generator, texts: int, sizes: Int[np.ndarray, " concepts"]) -> Labels:
    """Labels of a corpus without topics and writers: texts have no, one or several concepts."""
    concept = np.repeat(np.arange(len(sizes)), sizes)
    text = np.concatenate([rng.choice(texts, size, replace=False) for size in sizes])
    matrix = csr_array((np.ones(len(text), bool), (text, concept)), shape=(texts, len(sizes)))
    return Labels(matrix, np.zeros(texts, np.int64), np.arange(texts))


def mixed(labels: Labels, concepts: Int[np.ndarray, " some"], rng: np.random.Generator) -> Labels:
    """The labels with those of some concepts moved to other texts of the same topic, at random.

    For these concepts nothing is left to be found; the labels of the others stay where they are,
    so that a text may come to have two.
    """
    kept, moved = labels.dense(), labels.shuffled(rng).dense()
    kept[:, concepts] = moved[:, concepts]
    return labels._replace(concepts=csr_array(kept))


def corpus(design: Design, seed: int, labels: Labels | None = None) -> World:
    """A world with one corpus only, which is its selection set; the confirmation set is empty.

    Args:
        labels: Of other texts than one of each concept in each topic.
    """
    rng = np.random.default_rng(seed)
    plan = _plan(design, rng)
    own = labels or one_each(design.concepts, sum(design.topics), sum(design.writers))
    texts = _labelled(rng, design, plan, own, _shifts(plan, plan.stories))
    family = np.arange(design.concepts) // design.family
    nothing = LabelledSet({v: x[:0] for v, x in texts.latents.items()}, own.rows(np.arange(0)))
    return World(texts, nothing, None, plan.kind, plan.strength, plan.stories > 0.5, family)


def replicates(
    rng: np.random.Generator,
    labels: Labels,
    auroc: float,
    n: int,
    density: float = 0.3,
    spread: float = 0.5,
    noise: Float[np.ndarray, "texts n"] | None = None,
) -> Float[np.ndarray, "texts n"]:
    """Activations of n latents, each for the same one concept and each in a corpus of its own.

    Args:
        auroc: True within-topic AUROC of every latent.
        density: Share of the other texts in which it fires.
        spread: How far topics move a latent, in standard deviations of the noise.
        noise: Standard normal; given twice, two latents are correlated.
    """
    topics = int(labels.topics.max()) + 1
    if topics == 1:
        spread = 0.0
    threshold = float(-special.ndtri(density) * np.sqrt(1 + spread**2))
    moves = MOVES if topics > 1 else 0.0
    shift = float(shift_for(auroc, threshold, spread, moves)[0])
    u = rng.standard_normal((len(labels.topics), n)) if noise is None else noise.copy()
    u += (spread * rng.standard_normal((topics, n)))[labels.topics]
    shifts = shift * rng.normal(1, moves, (topics, n))
    positive = labels.of(0)
    u[positive] += shifts[labels.topics[positive]]
    return np.maximum(u - threshold, 0)

"""A name for a feature, how sure it is, and why. No torch, and no language model as judge.

The confidence is a stated score between 0 and 1, not a probability:

    confidence = ceiling x (0.40 + 0.25 effect + 0.20 contexts + 0.10 tokens + 0.05 sparsity)

The ceiling says what the confirmation protocol showed (`CEILINGS`), so nothing but a confirmed
latent is ever named with high confidence; the four parts lie between 0 and 1, and the score never
falls when one of them rises:

- effect: 2 x (AUROC on the confirmation set - 0.5), 0 where the latent was not tested alone;
- contexts: share of top contexts that are about the concept (1) or another of its family (1/2),
  corrected for chance; mentions count for the word only, all other texts for the feeling only;
- tokens: 1 if the direction raises a word of the concept, 1/2 if only words of its family;
- sparsity: 1 - share of texts in which the latent fires.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from discovery.concepts import Concept
from discovery.records import Alignment, Context, Label, PromotedToken, SetMember
from labeling.words import number, probability

Role = Literal["concept", "family", "part", "word", "piece", "candidate", "member", "against"]

CEILINGS: dict[Role, float] = {
    "concept": 1.0,  # the latent alone was confirmed and is specific
    "family": 0.8,  # confirmed alone, but not against its nearest concepts
    "part": 0.6,  # the best single latent of a concept of which only the set was confirmed
    "word": 0.6,  # fires on mentions of the word, confirmed on other mentions
    "piece": 0.5,  # another latent of a confirmed set
    "candidate": 0.3,  # the best single latent, not confirmed
    "member": 0.2,  # in the set of a concept whose set was not confirmed
    "against": 0.2,  # in a set with a negative weight
}
NAMES: dict[Role, str] = {
    "concept": "{concept}",
    "family": "{family} (family of {concept})",
    "part": "part of {concept}",
    "word": "the word “{concept}”",
    "piece": "in the set for {concept}",
    "candidate": "candidate for {concept} (not confirmed)",
    "member": "in the set for {concept} (not confirmed)",
    "against": "counts against {concept}",
}
LEVELS = (("high", 0.75), ("medium", 0.5), ("low", 0.25), ("none", 0.0))
MIN_STEM = 4  # letters from which a cut-off word counts as a word of a concept


class Claim(NamedTuple):
    """What a latent may be named for: a concept and the role, with the AUROC if tested alone."""

    role: Role
    concept: str
    auroc: float | None
    single: bool  # the latent is the concept's best single one
    finding: str  # the figures of the confirmation, in words


class Parts(NamedTuple):
    """The four parts of the score, each from 0 to 1."""

    effect: float
    contexts: float
    tokens: float
    sparsity: float


def confidence(role: Role, parts: Parts) -> float:
    """The score of the module's docstring."""
    weighted = (
        0.40
        + 0.25 * parts.effect
        + 0.20 * parts.contexts
        + 0.10 * parts.tokens
        + 0.05 * parts.sparsity
    )
    return min(1.0, max(0.0, CEILINGS[role] * weighted))


def level(score: float) -> str:
    """The word for a confidence: high from 0.75, medium from 0.5, low from 0.25, else none."""
    return next(name for name, least in LEVELS if score >= least)


def claims(
    site: str,
    latent: int,
    alignments: Mapping[str, Alignment],
    members: Iterable[SetMember],
    held_out: str = "the confirmation set",
) -> list[Claim]:
    """Every concept that the latent may be named for, in alphabetical order.

    Args:
        alignments: the verdicts by concept.
        members: the rows of `site` and `latent` in the sets of any concept.
        held_out: the texts on which latents were tested.
    """
    found: list[Claim] = []
    for a in alignments.values():
        if a.site == site and a.latent == latent:
            found.append(_single(a, held_out))
        if a.verdict == "lexical only" and a.site == site and a.lexical_latent == latent:
            finding = f"Fires on mentions of the word {_figures(a.lexical_auroc, a.lexical_q)}"
            found.append(Claim("word", a.concept, a.lexical_auroc, False, finding))
    found += [_member(alignments[m.concept], m) for m in members]
    return sorted(found, key=lambda claim: (claim.concept, claim.role))


def _figures(auroc: float | None, q: float | None) -> str:
    return f"(AUROC {number(auroc)}, q = {probability(q)})"


def _single(a: Alignment, held_out: str) -> Claim:
    figures = _figures(a.auroc, a.q)
    word = "; it also fires on the bare word" if a.also_lexical else ""
    if a.verdict == "found":
        text = f"Confirmed for {a.concept} on {held_out} {figures}{word}"
        return Claim("concept", a.concept, a.auroc, True, text)
    if a.specific_q is not None:  # the latent alone passed the test of step 5
        text = (
            f"Confirmed on {held_out} for {a.concept} {figures} "
            f"but not against its nearest concepts{word}"
        )
        return Claim("family", a.concept, a.auroc, True, text)
    if a.verdict in ("found as a set", "found for the family"):
        text = (
            f"Best single latent for {a.concept}, confirmed only with its set "
            f"{_figures(a.set_auroc, a.set_q)}"
        )
        return Claim("part", a.concept, a.auroc, True, text)
    text = f"Best single latent for {a.concept}, not confirmed on {held_out} {figures}"
    return Claim("candidate", a.concept, a.auroc, True, text)


def _member(a: Alignment, m: SetMember) -> Claim:
    figures = _figures(a.set_auroc, a.set_q)
    if m.weight < 0:
        text = f"Weighs against {a.concept} in its set {figures}"
        return Claim("against", a.concept, None, False, text)
    if a.set_specific_q is not None:  # the set passed the test of step 5
        text = f"In the confirmed set for {a.concept} {figures}"
        return Claim("piece", a.concept, None, False, text)
    text = f"In the set for {a.concept}, which was not confirmed {figures}"
    return Claim("member", a.concept, None, False, text)


def context_share(
    role: Role, concept: Concept, contexts: Sequence[Context], concepts: Sequence[Concept]
) -> tuple[float, float]:
    """Mean credit of the top contexts, and the credit expected by chance.

    A context about the concept earns 1, about another of its family 1/2 (1 where the family is the
    name); of several concepts of a text the best counts. The chance level is the mean credit over
    all concepts.
    """
    families = {c.name: c.family for c in concepts}

    def credit(name: str) -> float:
        if name == concept.name:
            return 1.0
        same = families.get(name) == concept.family
        return (1.0 if role == "family" else 0.5) if same else 0.0

    chance = sum(credit(c.name) for c in concepts) / len(concepts)
    counted = [
        max(map(credit, c.concepts), default=0.0) if _of_words(c) == (role == "word") else 0.0
        for c in contexts
    ]
    return (sum(counted) / len(counted) if counted else 0.0), chance


def _of_words(context: Context) -> bool:
    return context.set == "lexical"


def is_word_of(token: str, concept: Concept) -> bool:
    """Whether a token is a word of the concept: an inflection, or most of one from its start on."""
    text = token.strip().lower()
    words = {concept.name.lower(), *(w.lower() for w in concept.inflections)}
    return text in words or any(
        len(text) >= MIN_STEM and len(text) > len(word) / 2 and word.startswith(text)
        for word in words
    )


def explain(
    site: str,
    latent: int,
    density: float,
    claims: Sequence[Claim],
    promoted: Sequence[PromotedToken],
    contexts: Sequence[Context],
    concepts: Sequence[Concept],
) -> Label:
    """Name one latent after the claim with the highest confidence (ties by alphabet).

    Args:
        density: share of texts in which the latent fires.
        claims: from `claims`; none makes the latent "unnamed" with confidence 0.
        promoted: the latent's promoted tokens.
        contexts: the latent's top contexts.
        concepts: all concepts of the run.
    """
    by_name = {c.name: c for c in concepts}
    raised = [p.token for p in promoted if p.sign > 0]
    best_for = tuple(c.concept for c in claims if c.single)
    if not claims:
        reason = f"No concept chose it; it fires in {number(100 * density, 0)} % of the texts."
        return Label(site, latent, "unnamed", 0.0, "none", reason, (), density)

    def judge(claim: Claim) -> tuple[float, str]:
        concept = by_name[claim.concept]
        share, chance = context_share(claim.role, concept, contexts, concepts)
        own = [t for t in raised if is_word_of(t, concept)]
        kin = [c for c in concepts if c.family == concept.family]
        near = [t for t in raised if any(is_word_of(t, c) for c in kin)]
        parts = Parts(
            effect=min(1.0, max(0.0, 2 * (claim.auroc - 0.5))) if claim.auroc is not None else 0.0,
            contexts=max(0.0, (share - chance) / (1 - chance)) if chance < 1 else 0.0,
            tokens=1.0 if own else 0.5 if near else 0.0,
            sparsity=1 - density,
        )
        words = ", ".join(f"“{t.strip()}”" for t in (own or near)[:3])
        reason = (
            f"{claim.finding}; top contexts score {number(share)} for it (chance "
            f"{number(chance)}); it raises {words or 'no word of its family'} and fires in "
            f"{number(100 * density, 0)} % of the texts."
        )
        return confidence(claim.role, parts), reason

    judged = [(*judge(claim), claim) for claim in claims]
    score, reason, claim = max(judged, key=lambda entry: entry[0])
    concept = by_name[claim.concept]
    name = NAMES[claim.role].format(concept=concept.name, family=concept.family)
    return Label(site, latent, name, score, level(score), reason, best_for, density)


def labels(
    features: Mapping[tuple[str, int], float],
    alignments: Sequence[Alignment],
    members: Sequence[SetMember],
    promoted: Sequence[PromotedToken],
    contexts: Sequence[Context],
    concepts: Sequence[Concept],
    held_out: str = "the confirmation set",
) -> list[Label]:
    """A label for each latent of `features` ((site, latent) → density), in that order.

    Args:
        held_out: the texts on which latents were tested.
    """
    verdicts = {a.concept: a for a in alignments}
    sets: dict[tuple[str, int], list[SetMember]] = defaultdict(list)
    tokens: dict[tuple[str, int], list[PromotedToken]] = defaultdict(list)
    shown: dict[tuple[str, int], list[Context]] = defaultdict(list)
    for m in members:
        sets[m.site, m.latent].append(m)
    for p in promoted:
        tokens[p.site, p.latent].append(p)
    for c in contexts:
        shown[c.site, c.latent].append(c)
    return [
        explain(
            *key,
            density,
            claims(*key, verdicts, sets[key], held_out),
            tokens[key],
            shown[key],
            concepts,
        )
        for key, density in features.items()
    ]

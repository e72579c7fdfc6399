"""The settings of the discovery stages; the concepts and texts of a run. Nothing heavy."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from discovery.concepts import Concept, load_concepts
from discovery.corpora.rows import Corpus
from discovery.corpora.source import Source
from saes.config import digest as config_digest
from saes.errors import UserError

if TYPE_CHECKING:
    from discovery.records import TextSet


@dataclass(frozen=True)
class ConceptsConfig:
    """Which concepts are looked for."""

    set: str = "emotions171"
    """A shipped set (`emotion-atlas concepts list`), or a YAML file of your own."""
    names: tuple[str, ...] = ()
    """A part of the set; empty means all of it."""
    missing: Literal["error", "leave out"] = "error"
    """What to do with concepts that the texts do not cover."""


@dataclass(frozen=True)
class CaptureConfig:
    """The pass of the model over the texts."""

    batch_tokens: int = 2048
    """Padded tokens in one forward pass."""
    poolings: tuple[str, ...] = ("rule",)
    """Ways to pool a text's tokens; with several, the selection set chooses."""
    sites: tuple[str, ...] = ()
    """Residual sites without an SAE, for the dense readers' curve over depth."""
    long: Literal["cut", "chunk"] = "cut"
    """Texts longer than the context are cut, or read in several windows."""
    controls: bool = True
    """Also pool an SAE of random weights, and one on a model of random weights."""

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, not {self.batch_tokens}")
        if not self.poolings or len(set(self.poolings)) < len(self.poolings):
            raise ValueError("poolings must name at least one way to pool, each once")
        from discovery.captured import check_pooling

        for pooling in self.poolings:
            check_pooling(pooling)


@dataclass(frozen=True)
class ContrastConfig:
    """Contrastive vectors."""

    neutral_variance: float = 0.5
    """Share of the neutral variance whose principal components are projected out."""
    halves: int = 50
    """Random halves of the topics behind the split-half reliability."""

    def __post_init__(self) -> None:
        if not 0 <= self.neutral_variance < 1:
            raise ValueError(f"neutral_variance must be in [0, 1), not {self.neutral_variance}")
        if self.halves < 1:
            raise ValueError(f"halves must be at least 1, not {self.halves}")


@dataclass(frozen=True)
class AlignConfig:
    """The verdict protocol."""

    k: int = 16
    """Latents in a set."""
    q: float = 0.05
    """False-discovery rate of steps 5, 6 and 9."""
    ks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Set sizes of the curve of AUROC against k; no verdict rests on it."""
    candidates: int = 10
    """Best latents of each concept whose figures are kept."""
    draws: int = 1000
    """Bootstrap samples of each interval."""
    shuffles: int = 40
    """With one corpus and cross-fitting: runs on shuffled labels, at least 40."""

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(
                f"k must be at least 2, not {self.k}: a set of one is the single latent"
            )
        if not 0 < self.q < 1:
            raise ValueError(f"q must be between 0 and 1, not {self.q}")
        if not self.ks or min(self.ks) < 1:
            raise ValueError("ks must be set sizes of 1 or more")
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, not {self.candidates}")
        if self.draws < 100:
            raise ValueError(f"draws must be at least 100, not {self.draws}")
        if self.shuffles < 40:
            raise ValueError(f"shuffles must be at least 40, not {self.shuffles}")


@dataclass(frozen=True)
class OutputConfig:
    """Output-side scores: what raising a candidate does to its concept's words."""

    candidates: int = 5
    """Best candidates of each concept that are raised."""
    prompts: int = 4
    """Openings of neutral texts."""
    prompt_tokens: int = 16
    """Most tokens of a prompt."""
    controls: int = 100
    """Random latents that show what chance does."""

    def __post_init__(self) -> None:
        for name in ("candidates", "prompts", "prompt_tokens", "controls"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class CausalConfig:
    """Dose-response experiments."""

    concepts: int = 24
    """At most so many concepts: confirmed ones first, best first."""
    doses: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    """Norms of the edit as fractions of the mean residual norm."""
    prompts: int = 10
    """Openings of neutral texts."""
    prompt_tokens: int = 16
    """Most tokens of a prompt."""
    words: int = 2
    """Word forms read per concept."""
    controls: int = 5
    """Random latents of like firing density, shared by all concepts."""
    max_tokens: int = 300_000
    """A plan that needs more is refused."""

    def __post_init__(self) -> None:
        for name in ("concepts", "prompt_tokens", "words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("prompts", "controls"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, for an interval")
        if not self.doses or min(self.doses) <= 0:
            raise ValueError("doses must be positive fractions of the mean residual norm")


class Texts(NamedTuple):
    """The concepts of a run and the texts for them."""

    concepts: list[Concept]
    corpus: Corpus
    sets: "list[TextSet]"
    """What each source gave to each set."""
    fingerprint: str
    """Identifies the texts, and all that is known of the concepts."""

    @property
    def names(self) -> list[str]:
        return [concept.name for concept in self.concepts]

    @property
    def families(self) -> list[str]:
        return [concept.family for concept in self.concepts]


def open_texts(sources: tuple[Source, ...], concepts: ConceptsConfig, seed: int = 0) -> Texts:
    """The concepts (all of the set when none is named) and the texts of all sources.

    Args:
        seed: of splits and samples.

    Raises:
        UserError: an unknown concept, too few concepts, or texts that do not fit.
    """
    from discovery.corpora.sources import load_corpora

    known = load_concepts(None, concepts.set)
    chosen = load_concepts(concepts.names or None, concepts.set)
    loaded = load_corpora(sources, chosen, known=known, seed=seed, missing=concepts.missing)
    if len(loaded.concepts) < 3:
        raise UserError(
            f"{len(loaded.concepts)} concepts are left; a concept is judged against others: name 3"
        )
    known_of = {"texts": loaded.digest, "concepts": loaded.concepts, "sets": loaded.sets}
    return Texts(loaded.concepts, loaded.corpus, loaded.sets, config_digest(known_of))

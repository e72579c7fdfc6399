"""The settings of the discovery stages; the concepts and texts of a run. Nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from discovery.concepts import Concept, load_concepts
from discovery.corpora import CORPUS, Corpus, digest, load_corpus
from saes.config import digest as config_digest
from saes.errors import UserError


@dataclass(frozen=True)
class CaptureConfig:
    """The pass of the model over the corpus."""

    batch_tokens: int = 2048
    """Padded tokens in one forward pass."""

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, not {self.batch_tokens}")


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

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(
                f"k must be at least 2, not {self.k}: a set of one is the single latent"
            )
        if not 0 < self.q < 1:
            raise ValueError(f"q must be between 0 and 1, not {self.q}")


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
    folder: Path

    @property
    def names(self) -> list[str]:
        return [concept.name for concept in self.concepts]

    @property
    def families(self) -> list[str]:
        return [concept.family for concept in self.concepts]


def open_texts(corpus: str, concepts: Sequence[str]) -> Texts:
    """The concepts (all when none is named) and the packaged or a user's corpus.

    Raises:
        UserError: an unknown concept, too few concepts, or a corpus that does not fit.
    """
    chosen = load_concepts(concepts or None)
    if len(chosen) < 3:
        raise UserError(f"concepts names {len(chosen)}; a concept is judged against others: name 3")
    folder = CORPUS if corpus == "packaged" else Path(corpus).expanduser()
    return Texts(chosen, load_corpus(folder, chosen), folder)


def texts_fingerprint(texts: Texts) -> str:
    """Identifies what `open_texts` gave: the files, and all that is known of the concepts."""
    return config_digest({"files": digest(texts.folder), "concepts": texts.concepts})

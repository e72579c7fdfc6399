"""The protocol, its controls and its baselines on pooled activations, and all that they find.

No torch: `discovery.discover` runs the model.
"""

import difflib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from discovery import align, baselines, contrast, probes, records, replicate, selection, tfidf
from discovery.align import AlignResult
from discovery.captured import EMBEDDING, Captured, pick, view
from discovery.corpora.rows import ROLES
from discovery.records import (
    VERDICTS,
    Alignment,
    Candidate,
    Control,
    Cross,
    CurvePoint,
    Depth,
    Difference,
    OutputScore,
    Score,
    SetMember,
    SiteChoice,
    TextSet,
)
from discovery.selection import LabelledSet
from discovery.settings import AlignConfig, ContrastConfig, Texts
from saes.errors import UserError
from saes.tables import markdown


@dataclass(frozen=True, repr=False)
class Discovery:
    """Everything that discovery found, as typed rows (`discovery.records` explains the columns).

    `save` and `load` keep it in a folder of its own; `load_run` reads that of a run.
    """

    alignments: list[Alignment]
    """The verdict on each concept and the figures behind it."""
    members: list[SetMember]
    """The latents of each concept's set."""
    site_choices: list[SiteChoice]
    """The views (site and pooling) that were tried, the chosen one first."""
    controls: list[Control]
    """Verdict counts under true labels, and under shuffled ones."""
    scores: list[Score]
    """AUROC of every method, baseline and control, for each concept and set."""
    differences: list[Difference]
    """Latents and sets less their baselines, paired."""
    candidates: list[Candidate]
    """The best latents of each concept, with every measure."""
    cross: list[Cross]
    """Each chosen latent on the texts of each other concept."""
    curve: list[CurvePoint]
    """Sets of other sizes."""
    depth: list[Depth]
    """Every view, with latents and dense readers."""
    outputs: list[OutputScore] = field(default_factory=list[OutputScore])
    """What raising the candidates does to the concepts' words."""
    sets: list[TextSet] = field(default_factory=list[TextSet])
    """What was read, and what was left out."""

    def alignment(self, concept: str) -> Alignment:
        """The verdict on one concept.

        Raises:
            UserError: it is not among the concepts of this discovery; the message names near ones.
        """
        rows = {row.concept: row for row in self.alignments}
        if concept not in rows:
            near = difflib.get_close_matches(concept.lower(), rows, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
            hint = hint or f"known: {', '.join(rows) or 'none'}"
            raise UserError(f"concept {concept!r} is not in this discovery; {hint}")
        return rows[concept]

    def __repr__(self) -> str:
        return f"Discovery({self._verdicts()})"

    def _verdicts(self) -> str:
        count = Counter(row.verdict for row in self.alignments)
        counts = ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS)
        return f"{len(self.alignments)} concepts: {counts}"

    def summary(self) -> str:
        """What was found, to print: verdict counts under true and under shuffled labels, a line for
        each confirmed concept, best first, and the mean AUROC of each method.

        Of a single latent the last column has the AUROC of the concept's set beside it.
        """
        lines = [self._verdicts()]
        for row in self.controls:
            if row.labels != "true":
                lines.append(f"{row.labels}: {_tallied(row)}")
        lines += [f"site {a.site}, pooling {a.pooling}" for a in self.alignments[:1]]
        tables = ((self._confirmed(), 2), (self._methods(), 1))
        parts = [markdown(cells, left=left) for cells, left in tables if len(cells) > 1]
        return "\n\n".join(["\n".join(lines), *(part.rstrip("\n") for part in parts)]) + "\n"

    def _methods(self) -> list[list[str]]:
        """A row for each method with its mean AUROC on both sets."""
        cells = [["mean AUROC", "selection set", "confirmation set"]]
        for method in dict.fromkeys(row.method for row in self.scores):
            own = [row for row in self.scores if row.method == method]
            values = [[s.auroc for s in own if s.set == name] for name in ROLES[:2]]
            cells.append([method, *(_mean(v) for v in values)])
        return cells

    def _confirmed(self) -> list[list[str]]:
        """A row for each confirmed concept, best first."""
        confirmed = [row for row in self.alignments if row.verdict in VERDICTS[:2]]
        cells = [["concept", "verdict", "latent", "AUROC", "95 % interval", "q", "set AUROC"]]
        for row in sorted(confirmed, key=lambda r: (VERDICTS.index(r.verdict), r.q, r.concept)):
            alone = row.verdict == "found"
            auroc, low, high, q = (
                (row.auroc, row.auroc_low, row.auroc_high, row.q)
                if alone
                else (row.set_auroc, row.set_auroc_low, row.set_auroc_high, row.set_q)
            )
            figures = f"{auroc:.2f}", f"{low:.2f} to {high:.2f}", f"{q:.2g}"
            latent = str(row.latent) if alone else "set"
            cells.append([row.concept, row.verdict, latent, *figures, f"{row.set_auroc:.2f}"])
        return cells

    def save(self, folder: Path | str) -> None:
        """Write every kind of row to FOLDER/KIND.parquet; the folder is made.

        Raises:
            UserError: the folder cannot be made or written.
        """
        folder = Path(folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
        for kind in KINDS:
            records.write(folder / f"{kind}.parquet", KINDS[kind], getattr(self, kind))

    @classmethod
    def load(cls, folder: Path | str) -> "Discovery":
        """Read back what `save` wrote.

        Raises:
            UserError: a file is missing or damaged.
        """
        folder = Path(folder).expanduser()
        return cls(**{k: records.read(folder / f"{k}.parquet", KINDS[k]) for k in KINDS})

    @classmethod
    def load_run(cls, run: Path | str) -> "Discovery":
        """Read what `emotion-atlas discover` or `run` left in a run folder.

        Raises:
            UserError: a stage is not done, or a file is damaged.
        """
        run = Path(run).expanduser()
        stages = {"outputs": "output", "sets": "capture"}
        return cls(
            **{
                kind: records.read(run / stages.get(kind, "align") / f"{kind}.parquet", record)
                for kind, record in KINDS.items()
            }
        )


KINDS: dict[str, type[Any]] = {
    "alignments": Alignment,
    "members": SetMember,
    "site_choices": SiteChoice,
    "controls": Control,
    "scores": Score,
    "differences": Difference,
    "candidates": Candidate,
    "cross": Cross,
    "curve": CurvePoint,
    "depth": Depth,
    "outputs": OutputScore,
    "sets": TextSet,
}
"""Kind of row: its record type."""
assert list(KINDS) == [f.name for f in fields(Discovery)]


def _tallied(row: Control) -> str:
    counts = (row.found, row.found_as_a_set, row.found_for_the_family, row.lexical_only,
              row.not_found)  # fmt: skip
    return ", ".join(f"{n} {verdict}" for n, verdict in zip(counts, VERDICTS, strict=True))


def _mean(values: Iterable[float]) -> str:
    """The mean of those that are finite; "" without any."""
    finite = [value for value in values if np.isfinite(value)]
    return f"{np.mean(finite):.2f}" if finite else ""


def check_texts(texts: Texts) -> None:
    """Refuse now what the protocol would refuse after a model has read the texts.

    Raises:
        UserError: too few texts of a concept; the message says how many show which effect.
    """
    everything = texts.corpus.texts()
    labels = {role: pick(everything, role, texts.names).labels for role in ROLES}
    selection.check_labels(labels["selection"], texts.names)
    if texts.corpus.confirmation:
        align.check_confirmation(labels["confirmation"], texts.names)
    align.check_lexical(labels["lexical"] if texts.corpus.lexical else None)


def evaluate(
    read: Captured, texts: Texts, config: AlignConfig, contrast_config: ContrastConfig, seed: int
) -> Discovery:
    """The protocol, its controls and its baselines, on pooled activations.

    Args:
        read: of all texts of `texts.corpus`, in their order.
        texts: the texts, and the concepts that they are labelled with.
        config: of the protocol.
        contrast_config: of the vectors that say which concepts are near.
        seed: of shuffles, random latents and bootstraps.

    Raises:
        UserError: texts on which the protocol cannot be run.
    """
    return _Evaluation(read, texts, config, contrast_config, seed).run()


class _Evaluation:
    """The sets of one corpus, and what is measured on them."""

    def __init__(
        self,
        read: Captured,
        texts: Texts,
        config: AlignConfig,
        contrast_config: ContrastConfig,
        seed: int,
    ) -> None:
        self.read, self.texts, self.config, self.seed = read, texts, config, seed
        self.variance = contrast_config.neutral_variance
        self.sets = {role: pick(read.texts, role, texts.names) for role in ROLES}
        self.neutral = self.sets["neutral"].rows
        self.crossfitted = not len(self.sets["confirmation"].rows)
        self.second = "selection" if self.crossfitted else "confirmation"

    def run(self) -> Discovery:
        selected, confirmation, lexical = (
            self.labelled(role) for role in ("selection", "confirmation", "lexical")
        )
        assert selected is not None, "texts.corpus has no selection set"
        result = self.protocol(selected, confirmation, lexical)
        # a cross-fit draws its own shuffles by the seed; these must be others
        rng = np.random.default_rng([self.seed, 1] if self.crossfitted else self.seed)
        null = self.protocol(
            align.shuffled(selected, rng),
            confirmation and align.shuffled(confirmation, rng),
            lexical and align.shuffled(lexical, rng),
            verdicts_only=True,
        )
        ours, others = self.methods(result)
        names = self.texts.names
        depth = baselines.depth(
            result.fits,
            self.read.latents,
            self.read.residuals,
            self.sets["selection"],
            self.sets[self.second],
            self.neutral,
            self.variance,
        )
        return Discovery(
            alignments=result.alignments,
            members=result.members,
            site_choices=result.sites,
            controls=[align.tally("true", result), align.tally("shuffled within topic", null)],
            scores=[row for own in (*ours, *others) for row in baselines.score_rows(own, names)],
            differences=[
                row
                for own in ours
                for other in others
                for row in baselines.difference_rows(own, other, names)
            ],
            candidates=result.candidates,
            cross=result.cross,
            curve=result.curve,
            # read on the texts that fitted them, dense readers know too much
            depth=[row for row in depth if not self.crossfitted or row.set == "selection"],
        )

    def labelled(self, role: str, prefix: str = "") -> LabelledSet | None:
        """The latents of one set, or those of a control; None where the set has no text."""
        own = self.sets[role]
        latents = self.read.controls if prefix else self.read.latents
        views = {
            name.removeprefix(prefix): x[own.rows]
            for name, x in latents.items()
            if name.startswith(prefix)
        }
        return LabelledSet(views, own.labels) if len(own.rows) and views else None

    def protocol(
        self,
        selected: LabelledSet,
        confirmation: LabelledSet | None,
        lexical: LabelledSet | None,
        *,
        verdicts_only: bool = False,
    ) -> AlignResult:
        config = self.config
        near = {name: self.neighbours(name, selected) for name in self.read.latents}
        names, families = self.texts.names, self.texts.families
        settings = {
            "k": config.k,
            "q": config.q,
            "candidates": config.candidates,
            "ks": config.ks,
            "draws": config.draws,
            "seed": self.seed,
            "verdicts_only": verdicts_only,
        }
        if confirmation is None:
            name = "shuffles of the null run" if verdicts_only else "shuffles"
            with tqdm(total=config.shuffles, desc=name, file=sys.stderr) as bar:
                return replicate.crossfit(
                    selected, lexical, near, names, families,
                    shuffles=config.shuffles, progress=bar.update, **settings,
                )  # fmt: skip
        neutral = {name: x[self.neutral] for name, x in self.read.latents.items()}
        return align.align(
            selected, confirmation, lexical, neutral, near, names, families, **settings
        )

    def neighbours(
        self, name: str, selected: LabelledSet
    ) -> Int[np.ndarray, "concepts neighbours"]:
        """The concepts nearest to each, by contrastive vectors of the selection set's labels."""
        residuals = self.read.residuals[name]
        own, neutral = residuals[self.sets["selection"].rows], residuals[self.neutral]
        fitted = contrast.contrastive_vectors(own, selected.labels, neutral, self.variance)
        return contrast.nearest(fitted.vectors)

    def methods(
        self, result: AlignResult
    ) -> tuple[list[baselines.Results], list[baselines.Results]]:
        """The single latent and the set; and what they are compared with, on the same texts."""
        read, sets, config = self.read, self.sets, self.config
        chosen = result.fit.selection
        situated = "situations" if len(sets["situations"].rows) else None

        def split(data: Any) -> tuple[Any, ...]:
            return tuple(
                (data[sets[role].rows], sets[role].labels) if role else None
                for role in ("selection", self.second, situated)
            )

        latents, residuals = read.latents[chosen.view], read.residuals[chosen.view]
        of_selection, of_confirmation, of_situations = split(latents)
        ours = baselines.latent_results(
            ("latent", "set"), result.fit, of_confirmation, of_situations
        )
        words = tfidf.term_counts(
            np.array([text.text for text in self.texts.corpus.texts()], dtype=object)
        )
        embedding = view(EMBEDDING, chosen.pooling)
        readers = (
            ("vector", probes.fit_vectors(residuals[self.neutral], self.variance), residuals),
            ("probe", probes.fit_probe, residuals),
            ("embedding", probes.fit_probe, read.residuals[embedding]),
            ("tfidf", tfidf.fit_tfidf, words),
        )
        others = [baselines.measure(name, fit, *split(data)) for name, fit, data in readers]
        with _left_out("random latents"):
            others.append(
                baselines.random_latents(
                    chosen.latent, of_selection, of_confirmation, of_situations, seed=self.seed
                )
            )
        for name in ("untrained", "randomised"):
            first, second = (self.labelled(role, f"{name}/") for role in ("selection", self.second))
            if first is not None and second is not None:
                with _left_out(f"{name} control"):
                    others += baselines.control_results(name, first, second, config.k)
        if self.crossfitted:
            others = [own._replace(confirmation=own.selection) for own in others]
            ours = [own._replace(confirmation=own.selection) for own in ours]
        return list(ours), others


@contextmanager
def _left_out(control: str) -> Iterator[None]:
    """Go on without a control that cannot be had, and say so: verdicts do not rest on it."""
    try:
        yield
    except UserError as error:
        sys.stderr.write(f"left out: {control}: {error}\n")

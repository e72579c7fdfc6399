"""The files of the capture stage: pooled residuals and latents of every text. numpy only, no torch.

Activations are pooled over the tokens of a text in one or several ways (`discovery.pooling`). A
*view* is a site and a pooling, `blocks.5.hook_resid_post@rule`.

texts.parquet                a `TextRow` for each text; its order is that of all arrays
residuals.safetensors        by view, float32 [texts, d_model]
latents/VIEW.safetensors     CSR of shape [texts, d_sae]: indptr, indices, data
controls/KIND/VIEW.safetensors   the same of a control (`discovery.controls`): untrained, randomised
norms.json                   by site, the mean residual norm
pooled.json                  by set, which tokens the poolings `rule` and `span` take, in words
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csc_array, csr_array

from discovery import records
from discovery.corpora.rows import Text
from discovery.labels import Labels, units_of
from saes.errors import UserError
from saes.files import write_text

EMBEDDING = "blocks.0.hook_resid_pre"  # the site of the token embeddings
RULE = "rule"  # the default pooling

_Value = TypeVar("_Value", float, str)


def view(site: str, pooling: str) -> str:
    """The name of a site's activations under one pooling.

    >>> view("blocks.5.hook_resid_post", "max")
    'blocks.5.hook_resid_post@max'
    """
    return f"{site}@{pooling}"


def site_of(view: str) -> str:
    """The site of a view.

    >>> site_of("blocks.5.hook_resid_post@max")
    'blocks.5.hook_resid_post'
    """
    return view.partition("@")[0]


def pooling_of(view: str) -> str:
    """The pooling of a view.

    >>> pooling_of("blocks.5.hook_resid_post@max")
    'max'
    """
    return view.partition("@")[2]


def check_pooling(pooling: str) -> None:
    """Refuse what is no way to pool the activations of a text's content tokens.

    rule            the mean from the 50th token on where the shortest text of a corpus has 100,
                    else of all tokens: as in "Emotion Concepts and their Function in a Large
                    Language Model" (Anthropic 2026, arXiv 2604.07729)
    mean, max       of all tokens; the maximum is taken of each dimension or latent by itself
    last            the last token
    from-K          the mean from the K-th token on, counted from 1
    span            the mean of the tokens of the labelled span; of all where a text has none
    position-K      the K-th token, counted from 1
    position-ROLE   the ":" after the last line that begins with a role, as in "Assistant: ..."

    Raises:
        UserError: another name.
    """
    if not re.fullmatch(r"rule|mean|max|last|span|from-[1-9]\d*|position-(?!0)\w[\w -]*", pooling):
        raise UserError(
            f"{pooling!r} is no pooling; choose rule, mean, max, last, span, from-K (from-50), "
            "position-K (position-1) or position-ROLE (position-Assistant)"
        )


@dataclass(frozen=True)
class TextRow:
    """What the capture stage records of a text; the text itself stays in the corpus."""

    id: str
    set: str  # selection, confirmation, situations, neutral, lexical
    concepts: tuple[str, ...]  # none for neutral texts
    topic: str  # "" where there are none, as in situations and lexical texts of the packaged corpus
    writer: str
    source: str
    language: str
    tokens: int  # content tokens that were read: neither special nor first in a window
    chunks: int  # windows of the context that it took; 1 for a text that fits or was cut
    truncated: bool  # cut to the model's context


class Captured(NamedTuple):
    """Pooled activations of texts (`discovery.pooling`)."""

    texts: list[TextRow]
    residuals: dict[str, Float[np.ndarray, "texts d_model"]]
    """By view: those of the SAEs, and of the token embeddings `blocks.0.hook_resid_pre`."""
    latents: dict[str, csr_array]
    """By view of an SAE's site: float32 [texts, d_sae]."""
    norms: dict[str, float]
    """By site: the mean norm of the residual over all content tokens, the unit of doses."""
    pooled: Mapping[str, str] = MappingProxyType({})
    """By set: the tokens that the pooling `rule` means over, in words (the selection and the
    confirmation set always have the same); and for `span`, how many texts have none."""
    controls: Mapping[str, csr_array] = MappingProxyType({})
    """Latents of controls, by `untrained/VIEW` and `randomised/VIEW`, with the rows of `texts`
    (`discovery.controls`); rows outside the selection and confirmation sets may be empty."""


class Sets(NamedTuple):
    """Where one set of the corpus is in the captured arrays, and how its texts are labelled."""

    rows: Int[np.ndarray, " texts"]
    labels: Labels


def firing(read: Captured, view: str) -> Float[np.ndarray, " d_sae"]:
    """Share of the selection and confirmation texts in which each latent fires."""
    at = [i for i, row in enumerate(read.texts) if row.set in ("selection", "confirmation")]
    return np.diff(csc_array(read.latents[view][at]).indptr) / max(len(at), 1)


NUMBERED = ("situations", "lexical")  # sets whose n-th texts of all concepts are compared


def pick(rows: Sequence[TextRow] | Sequence[Text], name: str, names: Sequence[str]) -> Sets:
    """The rows of one set, with their labels among the concepts `names`.

    In a set without topics all texts are compared with each other; but situations and lexical texts
    then have as topic their number in their concept, so that first is compared with first.
    """
    index = {concept: i for i, concept in enumerate(names)}
    at = [i for i, row in enumerate(rows) if row.set == name]
    pairs = [(n, index[c]) for n, i in enumerate(at) for c in rows[i].concepts if c in index]
    own, concept = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    shape = (len(at), len(names))
    concepts = csr_array((np.ones(len(own), dtype=bool), (own, concept)), shape=shape)
    topics = [rows[i].topic for i in at]
    units = units_of(topics, [rows[i].writer for i in at])
    if name in NUMBERED and not any(topics):
        seen = Counter[tuple[str, ...]]()
        for n, i in enumerate(at):
            topics[n] = f"{seen[rows[i].concepts]:06d}"
            seen[rows[i].concepts] += 1
    return Sets(
        np.array(at, dtype=np.int64),
        Labels(concepts, np.unique(topics, return_inverse=True)[1].astype(np.int64), units),
    )


def save(folder: Path, captured: Captured) -> None:
    """Write the files of the capture stage into a folder; the same arrays give the same bytes."""
    records.write(folder / "texts.parquet", TextRow, captured.texts)
    save_file(dict(captured.residuals), folder / "residuals.safetensors")
    for kind, arrays in (("latents", captured.latents), ("controls", captured.controls)):
        for name, latents in arrays.items():
            _write_csr(folder / kind / f"{name}.safetensors", latents)
    for file, content in (("norms.json", captured.norms), ("pooled.json", captured.pooled)):
        write_text(folder / file, json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n")


def load(folder: Path, *, controls: bool = True) -> Captured:
    """Read the files of the capture stage back.

    Args:
        controls: False leaves the controls on the disk.

    Raises:
        UserError: a file is missing or damaged, or the files do not belong together.
    """
    texts = records.read(folder / "texts.parquet", TextRow)
    residuals, _ = _read(folder / "residuals.safetensors")
    norms = _read_json(folder / "norms.json", float)
    pooled = _read_json(folder / "pooled.json", str)
    latents = _read_folder(folder / "latents")
    control = _read_folder(folder / "controls") if controls else {}
    captured = Captured(texts, residuals, latents, norms, pooled, control)
    sizes = {
        len(texts),
        *(len(r) for r in residuals.values()),
        *(z.shape[0] for z in (*latents.values(), *control.values())),
    }
    views = residuals.keys()
    belong = (
        len(sizes) == 1
        and norms.keys() == {site_of(name) for name in views}
        and latents.keys() <= views
        and {name.partition("/")[2] for name in control} <= latents.keys()
        and pooled.keys() <= {text.set for text in texts}
    )
    if not belong:
        raise UserError(f"the files of {folder} do not belong together; delete it to make it anew")
    return captured


def _read_folder(folder: Path) -> dict[str, csr_array]:
    """Every CSR below a folder, by its path from there."""
    suffix = ".safetensors"
    paths = sorted(folder.rglob(f"*{suffix}"))
    return {
        path.relative_to(folder).as_posix().removesuffix(suffix): _read_csr(path) for path in paths
    }


def _read_json(path: Path, kind: type[_Value]) -> dict[str, _Value]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): kind(value) for name, value in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(_damaged(path, error)) from None


def _write_csr(path: Path, latents: csr_array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(latents, name) for name in ("indptr", "indices", "data")}
    # one metadata key: several would be written in any order
    save_file(arrays, path, {"shape": json.dumps(latents.shape)})


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(_damaged(path, error)) from None


def _read_csr(path: Path) -> csr_array:
    arrays, metadata = _read(path)
    try:
        shape = tuple(json.loads(metadata["shape"]))
        latents = csr_array((arrays["data"], arrays["indices"], arrays["indptr"]), shape=shape)
        latents.check_format(full_check=True)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(_damaged(path, error)) from None
    return latents


def _damaged(path: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"cannot read {path} ({reason}); delete its stage folder to make it anew"

"""The files of the capture stage: pooled residuals and latents of every text. numpy only, no torch.

texts.parquet               a `TextRow` for each text; its order is that of all arrays
residuals.safetensors       by site, float32 [texts, d_model]
latents/SITE.safetensors    CSR of shape [texts, d_sae]: indptr, indices, data
norms.json                  by site, the mean residual norm
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_array

from discovery import records
from saes.errors import UserError
from saes.files import write_text

EMBEDDING = "blocks.0.hook_resid_pre"  # the site of the token embeddings


@dataclass(frozen=True)
class TextRow:
    """What the capture stage records of a text; the text itself stays in the corpus."""

    id: str
    set: str  # first, hard, situations, neutral, mentions
    concept: str  # "" for neutral texts
    topic: str  # "" in situations and mentions
    writer: str  # "" but for the story sets
    tokens: int  # content tokens: neither special nor first
    truncated: bool  # cut to the model's context


class Captured(NamedTuple):
    """Pooled activations: means over the pooled tokens of each text (`discovery.pooling`)."""

    texts: list[TextRow]
    residuals: dict[str, Float[np.ndarray, "texts d_model"]]
    """By site: those of the SAEs, and the token embeddings `blocks.0.hook_resid_pre`."""
    latents: dict[str, csr_array]
    """By site of an SAE: float32 [texts, d_sae]."""
    norms: dict[str, float]
    """By site: the mean norm of the residual over all content tokens, the unit of doses."""


class Sets(NamedTuple):
    """Where one set of the corpus is in the captured arrays, and how its texts are labelled."""

    rows: Int[np.ndarray, " texts"]
    labels: Int[np.ndarray, " texts"]
    """Index of the concept; -1 for neutral texts."""
    topics: Int[np.ndarray, " texts"]
    writers: Int[np.ndarray, " texts"]


def pick(rows: Sequence[TextRow], name: str, names: Sequence[str]) -> Sets:
    """The rows of one set; mentions and situations have as topic their number in the concept."""
    index = {concept: i for i, concept in enumerate(names)}
    at = [i for i, row in enumerate(rows) if row.set == name]
    seen: dict[str, int] = {}
    topics: list[str] = []
    for i in at:
        number = seen[rows[i].concept] = seen.get(rows[i].concept, -1) + 1
        topics.append(rows[i].topic or f"{number:06d}")
    return Sets(
        np.array(at, dtype=np.int64),
        np.array([index.get(rows[i].concept, -1) for i in at], dtype=np.int64),
        np.unique(topics, return_inverse=True)[1].astype(np.int64),
        np.unique([rows[i].writer for i in at], return_inverse=True)[1].astype(np.int64),
    )


def save(folder: Path, captured: Captured) -> None:
    """Write the files of the capture stage into a folder; the same arrays give the same bytes."""
    records.write(folder / "texts.parquet", TextRow, captured.texts)
    save_file(dict(captured.residuals), folder / "residuals.safetensors")
    (folder / "latents").mkdir(exist_ok=True)
    for site, latents in captured.latents.items():
        arrays = {name: getattr(latents, name) for name in ("indptr", "indices", "data")}
        # one metadata key: several would be written in any order
        save_file(arrays, _latents(folder, site), {"shape": json.dumps(latents.shape)})
    write_text(folder / "norms.json", json.dumps(captured.norms, indent=2) + "\n")


def load(folder: Path) -> Captured:
    """Read the capture stage back.

    Raises:
        UserError: a file is missing or damaged, or the files do not belong together.
    """
    texts = records.read(folder / "texts.parquet", TextRow)
    residuals, _ = _read(folder / "residuals.safetensors")
    try:
        norms = json.loads((folder / "norms.json").read_text(encoding="utf-8"))
        norms = {str(site): float(norm) for site, norm in norms.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(_damaged(folder / "norms.json", error)) from None
    latents = {
        path.name.removesuffix(".safetensors"): _read_csr(path)
        for path in sorted((folder / "latents").glob("*.safetensors"))
    }
    captured = Captured(texts, residuals, latents, norms)
    sizes = {
        len(texts),
        *(len(r) for r in residuals.values()),
        *(z.shape[0] for z in latents.values()),
    }
    if len(sizes) > 1 or norms.keys() != residuals.keys() or not latents.keys() <= norms.keys():
        raise UserError(f"the files of {folder} do not belong together; delete it to make it anew")
    return captured


def _latents(folder: Path, site: str) -> Path:
    return folder / "latents" / f"{site}.safetensors"


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

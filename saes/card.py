"""The card of an SAE: what it is, how good it is, and how to load it, in Markdown."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from saes.quality import Quality, quality_table
from saes.registry import NEURONPEDIA

ABOUT = {
    "model_name": "model",
    "hook_name": "site",
    "architecture": "architecture",
    "d_in": "width of the residual stream",
    "d_sae": "latents",
    "k": "k",
    "l0": "L0 in training",
    "dtype": "stored as",
    "context_size": "context in tokens",
    "prepend_bos": "BOS in front",
    "dataset_path": "trained on",
    "training_tokens": "training tokens",
    "training_architecture": "trained as",
    "seed": "seed",
}
"""Entries of cfg.json, its metadata among them, that a card shows, and what it calls them."""


def card(folder: Path, *, place: str, repo: tuple[str, str] | None, licence: str | None) -> str:
    """The README.md of an SAE folder in sae-lens's format.

    Args:
        folder: holds cfg.json, and quality.json or training.json if they are known.
        place: how `saes.pretrained` is to name it.
        repo: hub repository and folder in it; None for a folder on disk.
        licence: identifier as the hub knows it (`apache-2.0`), or None for none stated.
    """
    cfg = _read(folder / "cfg.json")
    about = {**(cfg.get("metadata") or {}), **cfg}
    load = (
        f"SAE.from_pretrained({_quoted(repo[0])}, {_quoted(repo[1])})"
        if repo
        else f'SAE.load_from_disk({_quoted(place)}, dtype="float32")'
    )
    named = str(about.get("model_name") or "")
    model = named if re.fullmatch(r"[\w./-]+", named) else "MODEL"
    parts = [
        _front_matter(about, licence),
        f"# SAE of {plain(about.get('model_name') or 'a language model')}\n",
        f"A sparse autoencoder of the residual stream at {plain(about['hook_name'])}.\n",
        _settings(about),
        _quality(folder, str(about["hook_name"])),
        _training(folder),
        f"""## Loading

In sae-lens:

```python
from sae_lens import SAE

sae = {load}
```

With a check against the model that it is for:

```python
from saes.lm.model import load_lm
from saes.pretrained import load_checked

dictionary, check = load_checked({_quoted(place)}, load_lm({_quoted(model)}))
```
""",
        f"Licence: {plain(licence)}.\n" if licence else "No licence is stated.\n",
    ]
    return "\n".join(part for part in parts if part)


def plain(value: object) -> str:
    """A value as text that Markdown and HTML leave alone, on one line.

    >>> plain("a_b <script>|x")
    '`a_b <script>\\\\|x`'
    >>> plain(16384)
    '16,384'
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = re.sub(r"[\s`]+", " ", str(value)).strip().replace("|", "\\|")
    return f"`{text}`"


def _quoted(text: str) -> str:
    """A string as Python and JSON write it alike."""
    return json.dumps(text, ensure_ascii=False)


def _front_matter(about: Mapping[str, Any], licence: str | None) -> str:
    """What the hub reads: library, licence, base model, tags."""
    model = str(about.get("model_name") or "")
    tree: dict[str, Any] = {"library_name": "saelens"}
    if licence:
        tree["license"] = licence
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("packaged/"):
        tree["base_model"] = model
    tree["tags"] = ["sparse-autoencoder", "interpretability"]
    return f"---\n{yaml.safe_dump(tree, sort_keys=False)}---\n"


def _settings(about: Mapping[str, Any]) -> str:
    shown = [(words, about[key]) for key, words in ABOUT.items() if about.get(key) is not None]
    lines = ["| | |", "|---|---|", *(f"| {words} | {plain(value)} |" for words, value in shown)]
    name = str(about.get("neuronpedia_id") or "")
    if re.fullmatch(r"[\w./-]+", name):
        lines.append(f"| Neuronpedia | [{name}]({NEURONPEDIA}{name}) |")
    return "\n".join(lines) + "\n"


def _quality(folder: Path, site: str) -> str:
    """The table of quality.json, and what its columns mean."""
    record = _read(folder / "quality.json")
    figures = record.get("held_out", record)
    if not isinstance(figures, dict) or "l0" not in figures:
        return ""
    known = {name: figures.get(name) for name in Quality._fields}
    numbers = {n: float(v) if isinstance(v, int | float) else math.nan for n, v in known.items()}
    table = quality_table({site: Quality(**numbers)})  # pyright: ignore[reportArgumentType]
    return f"""## Quality on held-out text

{table}
VE: variance explained. CE, KL: cross-entropy of the next token, and divergence from the clean
model's prediction, with the reconstruction in place of the residual; "rec." is the share of the gap
to mean or zero ablation that is closed. Dead latents never fire on these tokens, dense ones on more
than a tenth. Cosine: each latent's largest with another decoder row, median and 95th percentile.
± is one standard error over rows of text.
"""


def _training(folder: Path) -> str:
    """Settings that training.json or quality.json keep, as they are there."""
    record = _read(folder / "training.json") or _read(folder / "quality.json")
    settings = {key: record[key] for key in ("sae", "train", "stream", "about") if record.get(key)}
    if not settings:
        return ""
    text = yaml.safe_dump(settings, sort_keys=False).replace("`", "'")
    return f"## Training settings\n\n```yaml\n{text}```\n"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing when there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}

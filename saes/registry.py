"""Released SAEs: sae-lens's registry, read offline and without importing sae-lens or torch."""

import difflib
import importlib.util
import math
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import yaml

from saes.errors import UserError

if TYPE_CHECKING:
    from saes.latents import Origin

NEURONPEDIA = "https://www.neuronpedia.org/"
FORMATS = {
    None: "sae-lens",
    "gemma_2": "gemma-scope",
    "gemma_3": "gemma-scope-2",
    "llama_scope": "llama-scope",
    "llama_scope_r1_distill": "llama-scope",
    "dictionary_learning_1": "dictionary_learning",
    "sparsify": "sparsify",
    "qwen_scope": "qwen-scope",
    "goodfire": "goodfire",
    "deepseek_r1": "deepseek-r1",
}
"""The registry's conversion functions, by the name of the format that each reads."""
PER_TOKEN = ("layer_norm", "constant_norm_rescale")
"""Normalisations that differ from token to token, so that no fixed weights can hold them."""
SAME_MODEL = {
    "gpt2-small": "gpt2",
    "mistral-7b-v0.1": "mistral-7b",
    "meta-llama-3.1-8b": "llama-3.1-8b",
    "meta-llama-3.1-8b-instruct": "llama-3.1-8b-instruct",
    "meta-llama-3-8b-instruct": "llama-3-8b-instruct",
}
"""Other names of a model, owner left out and in lower case."""


class Listed(NamedTuple):
    """An SAE of the registry."""

    release: str
    id: str
    model: str
    """As the registry names it: a hub name, or one of TransformerLens."""
    site: str | None
    """Site of the residual stream; None where the SAE reads something else."""
    width: int | None
    """Number of latents, where the name tells it."""
    l0: float | None
    """Mean number of latents that fire on a token, as its makers report."""
    variance_explained: float | None
    neuronpedia: str | None
    """Neuronpedia id; `neuronpedia_link` makes the address."""
    repo: str
    """Hub repository."""
    format: str
    path: str
    """Folder or file inside the repository."""
    norm_scaling_factor: float | None
    """By what inputs are multiplied before encoding, where the format asks for it."""
    overrides: dict[str, Any]
    """Settings that replace those of its config file."""

    @property
    def source(self) -> str:
        """What `saes.pretrained` loads it by."""
        return f"{self.release}/{self.id}"

    @property
    def why_not(self) -> str | None:
        """Why this package cannot load it, as far as the registry tells; None if it can."""
        if self.format not in FORMATS.values():
            return f"it is of the kind {self.format}, not an SAE of single residuals"
        if self.site is None:
            return "it does not read the residual stream before or after a block"
        if (norm := self.overrides.get("normalize_activations")) in PER_TOKEN:
            return f"it normalises its inputs token by token ({norm})"
        return None

    @property
    def loadable(self) -> bool:
        """Whether this package can load it, as far as the registry tells."""
        return self.why_not is None


def list_saes(model: str | None = None) -> list[Listed]:
    """SAEs of sae-lens's registry, in its order.

    Args:
        model: only those for this model; any usual name (`gemma-2-2b`, `google/gemma-2-2b`,
            `gpt2`). None lists all.

    Raises:
        UserError: no SAE for that model; names like it are suggested.
    """
    releases = _releases()
    rows = [
        row
        for release, entry in releases.items()
        if model is None or _model_key(entry["model"]) == _model_key(model)
        for row in _rows(release, entry)
    ]
    if not rows:
        known = {_model_key(entry["model"]): entry["model"] for entry in releases.values()}
        near = difflib.get_close_matches(_model_key(str(model)), known, n=3, cutoff=0.5)
        names = [known[key] for key in near] or sorted(known.values())
        raise UserError(f"no released SAE for model {model!r}; there are some for {_some(names)}")
    return rows


def find(source: str) -> Listed | None:
    """The SAE that `RELEASE/ID` means, or None when RELEASE is not in the registry.

    Raises:
        UserError: the release has no SAE of that id; ids like it are suggested.
    """
    release, _, sae_id = source.partition("/")
    entry = _releases().get(release)
    if entry is None:
        return None
    rows = {row.id: row for row in _rows(release, entry)}
    if sae_id not in rows:
        near = difflib.get_close_matches(sae_id, rows, n=3, cutoff=0.4) or list(rows)
        raise UserError(
            f"release {release} has no SAE {sae_id!r}; it has {_some(near, of=len(rows))}"
        )
    return rows[sae_id]


def releases_like(name: str) -> list[str]:
    """Names of releases that look like `name`, the likest first."""
    return difflib.get_close_matches(name, _releases(), n=3, cutoff=0.6)


def neuronpedia_link(origin: "Origin | Listed", latent: int | None = None) -> str | None:
    """Address of an SAE, or of one of its latents, at Neuronpedia; None when it is not there.

    >>> row = find("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    >>> neuronpedia_link(row, 12)
    'https://www.neuronpedia.org/gpt2-small/8-res-jb/12'
    """
    if origin.neuronpedia is None:
        return None
    return NEURONPEDIA + origin.neuronpedia + ("" if latent is None else f"/{latent}")


@cache
def _releases() -> dict[str, dict[str, Any]]:
    """The registry's file. Found without importing sae-lens, which takes seconds."""
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None, "sae-lens is a dependency"
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is 5 to 10 times faster
    return cast("dict[str, dict[str, Any]]", yaml.load(file.read_text(encoding="utf-8"), loader))


def _rows(release: str, entry: dict[str, Any]) -> list[Listed]:
    conversion = entry.get("conversion_func")
    repo = str(entry["repo_id"])
    return [
        Listed(
            release=release,
            id=str(sae["id"]),
            model=str(entry["model"]),
            site=site_in(str(sae["id"]), str(sae["path"]), repo, conversion),
            width=width_in(sae.get("neuronpedia") or "", str(sae["id"]), str(sae["path"]), repo),
            l0=_number(sae.get("l0")) or l0_in(str(sae["path"])),
            variance_explained=_number(sae.get("variance_explained")),
            neuronpedia=sae.get("neuronpedia"),
            repo=repo,
            format=FORMATS.get(conversion, str(conversion)),
            path=str(sae["path"]),
            norm_scaling_factor=_number(sae.get("norm_scaling_factor")),
            overrides=dict(entry.get("config_overrides") or {}),
        )
        for sae in entry["saes"]
    ]


def site_in(sae_id: str, path: str, repo: str, conversion: str | None) -> str | None:
    """The residual-stream site that the names of a released SAE speak of, else None."""
    if conversion == "temporal":  # reads a whole text at a time
        return None
    text = f"{path} {sae_id}"
    if found := re.search(r"blocks\.(\d+)\.(hook_\w+?|attn\S*|mlp\S*)(?=__|[ ./]|$|_\d)", text):
        named = re.fullmatch(r"hook_resid_(pre|post)", found[2])
        return f"blocks.{found[1]}.{found[2]}" if named else None
    if re.search(r"transcoder|clt|attn|att[_-]|mlp|hook_z", f"{text} {repo}"):
        return None
    if "embedding" in text and conversion == "gemma_2":
        return "blocks.0.hook_resid_pre"
    if conversion and conversion.startswith("llama_scope"):
        found = re.fullmatch(r"l(\d+)r_\S+", sae_id)
        return f"blocks.{found[1]}.hook_resid_post" if found else None
    if conversion == "gemma_2" and not repo.endswith("-res"):
        return None
    if conversion is None and not re.search(r"res", repo):
        return None
    found = re.search(r"layer_?(\d+)", text)
    return f"blocks.{found[1]}.hook_resid_post" if found else None


def width_in(*names: str) -> int | None:
    """Number of latents that names speak of (`width_16k`, `2pow14`, `W32K`, `32k-oai`), or None.

    >>> width_in("layer_12/width_16k/average_l0_71"), width_in("x_width-2pow12_date")
    (16384, 4096)
    """
    text = " ".join(names).replace("Math-220k", "")  # a data set
    if found := re.search(r"2pow(\d+)", text):
        return 2 ** int(found[1])
    if re.search(r"width_1m", text):
        return 2**20
    if found := re.search(r"(?<![\d.])(\d+)[kK](?![a-zA-Z])", text):
        count = int(found[1]) * 1000
        power = 2 ** round(math.log2(count)) if count else 0
        return power if abs(power - count) < 0.05 * count else int(found[1]) * 1024
    found = re.search(r"(?<!\d)(4096|8192|16384|24576|32768|65536|131072)(?!\d)", text)
    return int(found[1]) if found else None


def l0_in(path: str) -> float | None:
    """Mean number of latents that fire, where a path of Gemma Scope tells it, else None."""
    found = re.search(r"average_l0_(\d+)", path)
    return float(found[1]) if found else None


def _model_key(name: str) -> str:
    """A model's name without its owner, so that the usual spellings of one model agree."""
    key = name.rpartition("/")[2].lower()
    return SAME_MODEL.get(key, key)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _some(names: list[str], most: int = 5, of: int | None = None) -> str:
    more = (of or len(names)) - min(len(names), most)
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")

"""Pooled residuals and latents of texts: all sites and all ways of pooling in one pass.

A pooling is one rule for a whole corpus (`discovery.captured.check_pooling` lists them); which
tokens it takes of each text is settled in `discovery.windows`. Special tokens never count.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, vstack
from torch import Tensor

from discovery.captured import EMBEDDING, RULE, Captured, TextRow, check_pooling, view
from discovery.corpora.rows import Text
from discovery.windows import (
    STORIES,
    Long,
    Windows,
    in_words,
    ranges,
    rule_starts,
    spans_in_words,
    windows,
)
from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.capture import capture
from saes.lm.model import LM
from saes.lm.tokens import Batch, batches

_DENSE = 2**25  # latents that are dense at a time: 128 MiB
_CHUNK = 2048  # tokens that are encoded at a time, if they are not too many for that


def pool_residuals(
    resid: Float[Tensor, "batch pos d_model"], pooled: Bool[Tensor, "batch pos"], how: str
) -> Float[Tensor, "batch d_model"]:
    """Sum or maximum of the residual over the pooled tokens of each text, in float32.

    Without any token the sum is 0 and the maximum -inf.

    Args:
        how: `sum` or `max`.
    """
    # values at padding mean nothing, and may be nan
    if how == "max":
        return resid.float().masked_fill(~pooled[..., None], -torch.inf).amax(1)
    clean = resid.float().masked_fill(~pooled[..., None], 0)
    return torch.einsum("bp,bpd->bd", pooled.float(), clean)


def pool_latents(
    dictionary: Dictionary,
    tokens: Float[Tensor, "tokens d_model"],
    bounds: Int[np.ndarray, "poolings texts 2"],
    how: Sequence[str],
    chunk: int | None = None,
) -> list[csr_array]:
    """Sums or maxima of latents over ranges of tokens: for each pooling, float32 [texts, d_sae].

    Args:
        bounds: of each text the tokens that are pooled, from and to; the same may be in several.
        how: for each pooling, `sum` or `max`.
        chunk: tokens whose latents are dense at a time (`chunk * d_sae * 4` bytes).
    """
    chunk = chunk or max(16, min(_CHUNK, _DENSE // dictionary.d_sae))
    least = torch.tensor([-torch.inf if way == "max" else 0.0 for way in how], device=tokens.device)
    empty = bounds[..., 0] >= bounds[..., 1]
    parts: list[list[csr_array]] = [[] for _ in how]
    for text in _groups((bounds[..., 1].max(0) - bounds[..., 0].min(0)).clip(0), chunk):
        inside = bounds[:, text]
        start, end = int(inside[..., 0].min()), int(inside[..., 1].max())
        pooled = least[:, None, None].repeat(1, len(text), dictionary.d_sae)
        for at in range(start, end, chunk):
            z = dictionary.encode(tokens[at : min(at + chunk, end)].float())
            for p, own in enumerate(inside.clip(at, at + len(z)) - at):
                for i, (low, high) in enumerate(own.tolist()):
                    if low < high and how[p] == "max":
                        pooled[p, i] = torch.maximum(pooled[p, i], z[low:high].amax(0))
                    elif low < high:
                        pooled[p, i] += z[low:high].sum(0)
        dense = pooled.cpu().numpy()
        dense[empty[:, text]] = 0
        for part, own in zip(parts, dense, strict=True):
            part.append(csr_array(own))
    return [csr_array(vstack(part, format="csr")) for part in parts]


def _groups(sizes: Int[np.ndarray, " texts"], most: int) -> list[Int[np.ndarray, " group"]]:
    """Neighbouring texts that have at most so many tokens together; a longer text goes alone."""
    groups: list[list[int]] = [[]]
    filled = 0
    for text, size in enumerate(sizes.tolist()):
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(text)
        filled += size
    return [np.array(group, dtype=np.int64) for group in groups]


@torch.no_grad()
def capture_texts(
    lm: LM,
    dictionaries: Sequence[Dictionary],
    texts: Sequence[Text],
    *,
    sites: Sequence[str] = (),
    poolings: Sequence[str] = (RULE,),
    long: Long = "cut",
    batch_tokens: int = 2048,
    progress: Callable[[int], object] = lambda _: None,
    extra: Mapping[str, Sequence[Dictionary]] = MappingProxyType({}),
) -> Captured:
    """Pooled residuals and latents of texts, in one pass of the model over all sites.

    Each set is a corpus with a pooling rule of its own, but the selection and the confirmation set
    share one: what is selected on the first is confirmed on the other. Neither the batch size nor
    the other texts of a batch change a result beyond rounding.

    Args:
        dictionaries: SAEs of this model, at most one a site, on its device.
        sites: further residual sites; those of the SAEs and the embeddings are always there.
        poolings: each gives a view of every site.
        long: texts longer than the context are `cut`, or read in several windows (`chunk`) that are
            pooled together as one text.
        batch_tokens: most tokens of a batch, padding included; on a CPU 1024 to 2048 are fastest
            (the activations of a batch stay in the cache), on a GPU many times more.
        progress: called after each batch with the number of texts that it finished
            (`tqdm(total=len(texts)).update` fits).
        extra: by name, control SAEs whose latents of the selection and confirmation texts go to
            `Captured.controls` as NAME/VIEW.

    Raises:
        UserError: no texts, two SAEs at one site, a site that the model lacks, a text without
            content or the tokens that a pooling takes, or activations that are not finite.
    """
    if not texts:
        raise UserError("there are no texts to read")
    for own in (dictionaries, *extra.values()):
        for site, n in Counter(d.site for d in own).items():
            if n > 1:
                raise UserError(f"{n} SAEs read {site}; take one SAE a site")
    for pooling in poolings:
        check_pooling(pooling)
    everywhere = list(dict.fromkeys([EMBEDDING, *sites, *(d.site for d in dictionaries)]))
    readers = [(name, d) for name, own in {"": dictionaries, **extra}.items() for d in own]
    needed = list(dict.fromkeys([*everywhere, *(d.site for _, d in readers)]))

    read = windows(lm, texts, long)
    bounds = np.stack([ranges(lm, texts, read, pooling) for pooling in poolings])
    how = ["max" if pooling == "max" else "sum" for pooling in poolings]
    story = np.array([text.set in STORIES for text in texts], dtype=bool)
    residuals = {site: _blank(how, len(texts), lm.d_model) for site in everywhere}
    latents: dict[tuple[str, str], list[list[csr_array]]] = {}
    norms = dict.fromkeys(everywhere, 0.0)
    order: list[int] = []
    last = np.append(read.text[1:] != read.text[:-1], True)  # whether a window ends its text
    for block in batches(lm, read.ids, batch_tokens=batch_tokens):
        rows = list(block.rows)
        text = read.text[rows]
        order += rows
        local = _local(block, bounds[:, text] - read.before[rows][:, None])
        activations = capture(lm, block, needed)
        for site, resid in activations.items():
            _check(lm, site, resid[block.content])
        for site in everywhere:
            resid = activations[site]
            norms[site] += float(resid[block.content].float().norm(dim=-1).sum())
            for own, way, inside in zip(residuals[site], how, local, strict=True):
                part = pool_residuals(resid, _mask(block, inside), way).cpu().numpy()
                (np.maximum if way == "max" else np.add).at(own, text, part)
        for name, dictionary in readers:
            own = local * story[text][:, None] if name else local
            tokens, inside = _needed(block, activations[dictionary.site], own)
            parts = pool_latents(dictionary, tokens, inside, how)
            latents.setdefault((name, dictionary.site), []).append(parts)
        progress(int(last[rows].sum()))

    views: dict[str, dict[str, csr_array]] = {name: {} for name in ("", *extra)}
    pooled: dict[str, Float[np.ndarray, "texts d_model"]] = {}
    for p, (pooling, way) in enumerate(zip(poolings, how, strict=True)):
        count = np.diff(bounds[p])[:, 0] if way == "sum" else np.ones(len(texts), np.int64)
        for site in everywhere:
            pooled[view(site, pooling)] = residuals[site][p] / count[:, None].astype(np.float32)
        for (name, site), batch in latents.items():
            merged = _merged([parts[p] for parts in batch], read.text[order], way, len(texts))
            merged.data /= np.repeat(count, np.diff(merged.indptr)).astype(np.float32)
            views[name][view(site, pooling)] = merged
    taken: dict[str, list[str]] = {}  # by set
    if RULE in poolings:
        for name, start in rule_starts(texts, read.tokens).items():
            taken.setdefault(name, []).append(in_words(start))
    if "span" in poolings:
        for name, spans in spans_in_words(texts).items():
            taken.setdefault(name, []).append(spans)
    return Captured(
        _rows(texts, read),
        pooled,
        views[""],
        {site: norm / int(read.tokens.sum()) for site, norm in norms.items()},
        {name: "; ".join(words) for name, words in taken.items()},
        {f"{name}/{key}": z for name in extra for key, z in views[name].items()},
    )


def _blank(how: Sequence[str], texts: int, width: int) -> list[Float[np.ndarray, "texts width"]]:
    least = {"sum": 0, "max": -np.inf}
    return [np.full((texts, width), least[way], np.float32) for way in how]


def _check(lm: LM, site: str, content: Float[Tensor, "tokens d_model"]) -> None:
    if not content.isfinite().all():
        raise UserError(
            f"{lm.name} gives infinite or undefined activations at {site}; "
            "run it in float32 or bfloat16"
        )


def _local(
    block: Batch, bounds: Int[np.ndarray, "poolings batch 2"]
) -> Int[np.ndarray, "poolings batch 2"]:
    """Ranges of each window's own content tokens; (0, 0) where none is pooled."""
    size = block.content.sum(-1).cpu().numpy()
    inside = np.minimum(bounds.clip(0), size[:, None])
    return inside * (inside[..., :1] < inside[..., 1:])


def _mask(block: Batch, inside: Int[np.ndarray, "batch 2"]) -> Bool[Tensor, "batch pos"]:
    """True at the content tokens of a range of each window."""
    low, high = torch.from_numpy(inside).to(block.content.device).split(1, dim=-1)
    number = block.content.cumsum(-1) - 1
    return block.content & (number >= low) & (number < high)


def _needed(
    block: Batch,
    resid: Float[Tensor, "batch pos d_model"],
    inside: Int[np.ndarray, "poolings batch 2"],
) -> tuple[Float[Tensor, "tokens d_model"], Int[np.ndarray, "poolings batch 2"]]:
    """The residuals that any pooling takes, one window after the other; and the ranges in these."""
    some = inside[..., 0] < inside[..., 1]
    high = inside[..., 1].max(0)
    low = np.where(some, inside[..., 0], high).min(0)
    tokens = resid[_mask(block, np.stack([low, high], axis=-1))]
    ends = (high - low).cumsum()
    return tokens, np.where(some[..., None], inside - low[:, None], 0) + (ends - high + low)[
        :, None
    ]


def _merged(
    parts: Sequence[csr_array], text: Int[np.ndarray, " windows"], way: str, n_texts: int
) -> csr_array:
    """Put the windows of each text together, and the texts in their order."""
    stacked = csr_array(vstack(parts, format="csr"))
    if way == "sum":
        ones = np.ones(len(text), np.float32)
        places = (ones, (text, np.arange(len(text))))
        merged = csr_array(csr_array(places, shape=(n_texts, len(text))) @ stacked)
    else:
        order = np.argsort(text, kind="stable")
        starts = np.searchsorted(text[order], np.arange(n_texts + 1))
        rows = [stacked[order[a:b]] for a, b in pairwise(starts)]
        rows = [own if own.shape[0] == 1 else _maximum(own) for own in rows]
        merged = csr_array(vstack(rows, format="csr"))
    merged.sort_indices()
    return merged


def _maximum(rows: csr_array) -> csr_array:
    return csr_array(cast("Any", rows).max(axis=0).reshape(1, -1))


def _rows(texts: Sequence[Text], read: Windows) -> list[TextRow]:
    chunks = np.bincount(read.text, minlength=len(texts))
    return [
        TextRow(
            id=text.id,
            set=text.set,
            concepts=text.concepts,
            topic=text.topic,
            writer=text.writer,
            source=text.source,
            language=text.language,
            tokens=int(read.tokens[i]),
            chunks=int(chunks[i]),
            truncated=bool(read.truncated[i]),
        )
        for i, text in enumerate(texts)
    ]

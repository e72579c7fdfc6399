"""Pooled residuals and latents of texts: means over the right tokens, all sites in one pass.

The rule is one a corpus: the mean over content tokens from the 50th on, as in "Emotion Concepts and
their Function in a Large Language Model" (Anthropic 2026, arXiv 2604.07729), if the corpus's
shortest text has at least 100 of them; else the mean over all content tokens.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, vstack
from torch import Tensor
from torch.nn.functional import one_hot

from discovery.captured import EMBEDDING, Captured, TextRow
from discovery.corpora import Text
from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.capture import capture
from saes.lm.model import LM
from saes.lm.tokens import batches, tokenize

FROM_TOKEN = 50  # counted from 1
IF_SHORTEST_HAS = 100
STORIES = ("first", "hard")  # sets that share one rule


def first_position(token_counts: Sequence[int]) -> int:
    """Index, from 0, of the first content token that is pooled.

    >>> first_position([120, 100]), first_position([120, 99])
    (49, 0)

    Args:
        token_counts: content tokens of each text of the corpus.
    """
    return FROM_TOKEN - 1 if min(token_counts) >= IF_SHORTEST_HAS else 0


def pooled_tokens(
    content: Bool[Tensor, "batch pos"], start: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch pos"]:
    """True at content tokens from each text's `start`-th on, counted from 0."""
    return content & (content.cumsum(-1) > start[:, None])


def pool_residuals(
    resid: Float[Tensor, "batch pos d_model"], pooled: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch d_model"]:
    """Mean residual over the pooled tokens of each text, in float32."""
    weights = pooled / pooled.sum(-1, keepdim=True)
    # values at padding mean nothing, and may be nan
    return torch.einsum("bp,bpd->bd", weights, resid.float().masked_fill(~pooled[..., None], 0))


def pool_latents(
    dictionary: Dictionary,
    resid: Float[Tensor, "batch pos d_model"],
    pooled: Bool[Tensor, "batch pos"],
    chunk: int = 1024,
) -> csr_array:
    """Mean latents over the pooled tokens of each text: float32 CSR of shape [batch, d_sae].

    Args:
        chunk: tokens whose latents are dense at a time (`chunk * d_sae * 4` bytes); only pooled
            tokens are encoded.
    """
    text_of = pooled.nonzero()[:, 0]
    sums = torch.zeros(len(pooled), dictionary.d_sae, device=resid.device)
    for tokens, text in zip(resid[pooled].split(chunk), text_of.split(chunk), strict=True):
        member = one_hot(text, len(pooled)).float()
        sums += member.T @ dictionary.encode(tokens.float())
    return csr_array((sums / pooled.sum(-1, keepdim=True)).cpu().numpy())


@torch.no_grad()
def capture_texts(
    lm: LM,
    dictionaries: Sequence[Dictionary],
    texts: Sequence[Text],
    *,
    sites: Sequence[str] = (),
    batch_tokens: int = 2048,
    progress: Callable[[int], object] = lambda _: None,
) -> Captured:
    """Pooled residuals and latents of texts, in one pass of the model over all sites.

    Each set is a corpus with a pooling rule of its own, but for the two story sets, which share
    one: what is selected on the first is confirmed on the hard set. Neither the batch size nor the
    other texts of a batch change a result beyond rounding.

    Args:
        dictionaries: SAEs of this model, at most one a site, on its device.
        sites: further residual sites; those of the SAEs and the embeddings are always there.
        batch_tokens: most tokens of a batch, padding included; on a CPU 1024 to 2048 are fastest
            (the activations of a batch stay in the cache), on a GPU many times more.
        progress: called after each batch with the number of texts that it held
            (`tqdm(total=len(texts)).update` fits).

    Raises:
        UserError: two SAEs at one site, a site that the model lacks, a text without content, or
            activations that are not finite.
    """
    sae_sites = [dictionary.site for dictionary in dictionaries]
    for site, n in Counter(sae_sites).items():
        if n > 1:
            raise UserError(f"{n} SAEs read {site}; take one SAE a site")
    everywhere = list(dict.fromkeys([EMBEDDING, *sites, *sae_sites]))
    ids = tokenize(lm, [text.text for text in texts]).ids
    blocks = list(batches(lm, ids, batch_tokens=batch_tokens))
    order = [row for block in blocks for row in block.rows]
    counts = np.zeros(len(texts), np.int64)
    counts[order] = torch.cat([block.content.sum(-1) for block in blocks]).cpu().numpy()
    starts = _starts(texts, counts)

    residuals = {site: np.zeros((len(texts), lm.d_model), np.float32) for site in everywhere}
    latents: dict[str, list[csr_array]] = {site: [] for site in sae_sites}
    norms = dict.fromkeys(everywhere, 0.0)
    for block in blocks:
        rows = list(block.rows)
        pooled = pooled_tokens(block.content, torch.from_numpy(starts[rows]).to(lm.device))
        read = capture(lm, block, everywhere)
        for site, resid in read.items():
            if not resid[block.content].isfinite().all():
                raise UserError(
                    f"{lm.name} gives infinite or undefined activations at {site}; "
                    "run it in float32 or bfloat16"
                )
            residuals[site][rows] = pool_residuals(resid, pooled).cpu().numpy()
            norms[site] += float(resid[block.content].float().norm(dim=-1).sum())
        for dictionary in dictionaries:
            latents[dictionary.site].append(pool_latents(dictionary, read[dictionary.site], pooled))
        progress(len(rows))
    back = np.argsort(order)
    return Captured(
        _rows(lm, texts, ids, counts),
        residuals,
        {site: csr_array(vstack(parts, format="csr")[back]) for site, parts in latents.items()},
        {site: norm / int(counts.sum()) for site, norm in norms.items()},
    )


def _starts(texts: Sequence[Text], counts: Int[np.ndarray, " texts"]) -> Int[np.ndarray, " texts"]:
    """The first pooled content token of each text, by the rule of its corpus."""
    corpora = np.array(["stories" if text.set in STORIES else text.set for text in texts])
    starts = np.zeros_like(counts)
    for corpus in np.unique(corpora):
        starts[corpora == corpus] = first_position(counts[corpora == corpus].tolist())
    return starts


def _rows(
    lm: LM, texts: Sequence[Text], ids: Sequence[Sequence[int]], counts: Int[np.ndarray, " texts"]
) -> list[TextRow]:
    return [
        TextRow(
            id=text.id,
            set=text.set,
            concept=text.concept,
            topic=text.topic,
            writer=text.writer,
            tokens=int(count),
            # a text that just fits is as long as one that was cut
            truncated=len(row) == lm.context and tokenize(lm, [text.text]).truncated == 1,
        )
        for text, row, count in zip(texts, ids, counts, strict=True)
    ]

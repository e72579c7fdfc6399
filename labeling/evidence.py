"""What a latent says for itself: the tokens its direction promotes, the texts that drive it.

Promoted tokens read the decoder row through the unembedding (logit lens; nostalgebraist 2020), so
they show what the feature writes. Contexts show what it reads.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from discovery.corpora.rows import Text
from discovery.records import Context, PromotedToken
from discovery.windows import Long, windows
from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.capture import capture
from saes.lm.model import LM
from saes.lm.tokens import batches

ROWS = 64  # decoder rows read through the unembedding at a time


def token_text(lm: LM, token: int) -> str:
    """The exact text of a token inside a text, a leading space kept ("�" for part of a character).

    It is decoded behind another token, because tokenizers drop the space of a text's first word.
    """
    anchor = lm.tokenizer.encode("a", add_special_tokens=False)[-1:]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before, both = (str(lm.tokenizer.decode(ids, **options)) for ids in (anchor, [*anchor, token]))
    return both[len(before) :]


@torch.no_grad()
def token_logits(
    lm: LM, directions: Float[Tensor, "rows d_model"]
) -> Float[Tensor, "rows vocab_size"]:
    """Direct effect of each direction on the logits, centred over the tokenizer's plain tokens.

    The direction is scaled to unit root mean square and goes through the final norm and the
    unembedding; what they give for a zero residual (the biases) is taken off. For an RMS norm and a
    layer norm alike that is the unembedding with the norm's scale folded in, so logits of several
    features are comparable whatever the norms of their rows. Special tokens and rows of the
    unembedding without a token are not plain: their logits are nan.
    """
    rms = directions.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    logits = lm.unembed(directions / rms) - lm.unembed(torch.zeros_like(directions[:1]))
    plain = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    plain[: len(lm.tokenizer)] = True
    plain[[i for i in lm.tokenizer.all_special_ids if i < len(plain)]] = False
    logits = logits.float() - logits[:, plain].float().mean(-1, keepdim=True)
    return logits.masked_fill(~plain, torch.nan)


def promoted_tokens(
    lm: LM, dictionary: Dictionary, latents: Sequence[int], n: int = 10
) -> list[PromotedToken]:
    """The `n` tokens that each latent's decoder row raises most and the `n` it lowers most.

    Args:
        latents: the latents to read; rows come back in this order, raised before lowered.
        n: tokens on either side.

    Returns:
        One row a token, rank 1 the strongest; `logit` as `token_logits` defines it.
    """
    texts: dict[int, str] = {}
    rows: list[PromotedToken] = []
    for start in range(0, len(latents), ROWS):
        part = list(latents[start : start + ROWS])
        logits = token_logits(lm, dictionary.W_dec[part].to(lm.device))
        sides = {
            sign: (sign * logits).nan_to_num(nan=-torch.inf).topk(n, dim=-1) for sign in (1, -1)
        }
        for row, latent in enumerate(part):
            for sign, top in sides.items():
                pairs = zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True)
                for rank, (token, value) in enumerate(pairs, start=1):
                    if token not in texts:
                        texts[token] = token_text(lm, token)
                    rows.append(
                        PromotedToken(
                            dictionary.site, latent, sign, rank, texts[token], sign * value
                        )
                    )
    return rows


def token_pieces(lm: LM, text: str, count: int) -> tuple[str, ...]:
    """The first `count` tokens of a text as strings that, joined, give the text back.

    Each piece ends where its token ends, so whatever lies between two tokens belongs to the later
    one; of a character made of several tokens the first holds it and the others are empty.

    Raises:
        UserError: the tokenizer gives no character offsets.
    """
    if not lm.tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {lm.name} gives no character offsets; "
            "use a model folder with a tokenizer.json"
        )
    encoded = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    special = set(lm.tokenizer.all_special_ids)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ends = [end for token, (_, end) in pairs if token not in special]
    assert count <= len(ends), "the text was tokenized otherwise than by saes.lm.tokens"
    if count == len(ends) and count:
        ends[-1] = len(text)
    pieces: list[str] = []
    cursor = 0
    for end in ends[:count]:
        pieces.append(text[cursor : max(cursor, end)])
        cursor = max(cursor, end)
    return tuple(pieces)


def top_texts(pooled: sparse.csr_array, latents: Sequence[int], n: int) -> dict[int, list[int]]:
    """For each latent the rows of the `n` largest non-zero pooled activations, ties by row."""
    columns = pooled[:, list(latents)].tocsc()
    columns.sort_indices()
    best: dict[int, list[int]] = {}
    for column, latent in enumerate(latents):
        span = slice(columns.indptr[column], columns.indptr[column + 1])
        values, rows = columns.data[span], columns.indices[span]
        order = np.argsort(-values, kind="stable")[:n]
        best[latent] = rows[order][values[order] > 0].tolist()
    return best


@torch.no_grad()
def contexts(
    lm: LM,
    dictionary: Dictionary,
    pooled: sparse.csr_array,
    texts: Sequence[Text],
    latents: Sequence[int],
    n: int = 4,
    long: Long = "cut",
) -> list[Context]:
    """The texts in which each latent fires most, with its activation at every token.

    The model runs once over the union of these texts; no matrix larger than one text's tokens by
    all latents is held.

    Args:
        pooled: pooled activation per text, shape [len(texts), d_sae].
        latents: the latents to show; rows come back in this order.
        n: texts a latent, fewer where it fires in fewer.
        long: how texts longer than the context were read when `pooled` was made.

    Returns:
        One row a latent and text, rank 1 the largest pooled activation. Special tokens are left
        out; the tokens joined give the text (its start, where the model's context cut it), whose
        activations are of the window that each token was read in.
    """
    assert pooled.shape == (len(texts), dictionary.d_sae), (pooled.shape, len(texts))
    best = top_texts(pooled, latents, n)
    readers: dict[int, list[int]] = {}  # text -> the latents that show it
    for latent, rows in best.items():
        for row in rows:
            readers.setdefault(row, []).append(latent)
    union = sorted(readers)
    read = windows(lm, [texts[row] for row in union], long)
    special = set(lm.tokenizer.all_special_ids)
    pieces: dict[int, tuple[str, ...]] = {}
    traces: dict[int, Float[np.ndarray, "tokens readers"]] = {}
    for row, ids in zip(union, read.rows, strict=True):
        pieces[row] = token_pieces(lm, texts[row].text, sum(i not in special for i in ids))
        traces[row] = np.zeros((len(pieces[row]), len(readers[row])), np.float32)
    for batch in batches(lm, read.ids):
        residual = capture(lm, batch, [dictionary.site])[dictionary.site]
        for i, window in enumerate(batch.rows):
            text = int(read.text[window])
            row = union[text]
            z = dictionary.encode(residual[i][batch.content[i]])[:, readers[row]]
            unread = len(pieces[row]) - int(read.tokens[text])  # a first token without BOS: 0
            start = unread + int(read.before[window])
            traces[row][start : start + len(z)] = z.float().cpu().numpy()
    return [
        _context(
            dictionary.site,
            latent,
            rank,
            texts[row],
            pieces[row],
            traces[row][:, readers[row].index(latent)],
        )
        for latent, rows in best.items()
        for rank, row in enumerate(rows, start=1)
    ]


def _context(
    site: str,
    latent: int,
    rank: int,
    text: Text,
    pieces: tuple[str, ...],
    trace: Float[np.ndarray, " tokens"],
) -> Context:
    return Context(
        site=site,
        latent=latent,
        rank=rank,
        text_id=text.id,
        set=text.set,
        concepts=text.concepts,
        topic=text.topic,
        peak=float(trace.max()),
        tokens=pieces,
        activations=tuple(trace.tolist()),
    )

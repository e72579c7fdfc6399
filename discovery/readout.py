"""What a model would say next: the log-probability of words, and how far an edit moved the rest.

A word counts whole, with the space before it if its script parts words by spaces: the sum over its
tokens, each given the prompt and the tokens before it (teacher-forced). Under an edit, the word's
own positions are edited as well.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from discovery.corpora.leaks import UNSPACED
from saes.clamp import Mask
from saes.errors import UserError
from saes.lm.capture import capture
from saes.lm.edit import Edit, edit
from saes.lm.model import LM
from saes.lm.tokens import batches

Word = tuple[int, ...]
"""Token ids of a word, with a space before it if its script parts words by spaces."""

Intervention = Callable[[Mask], Edit]
"""Makes the edit for a batch, given where its content tokens are (not BOS, not padding)."""

_BATCH_TOKENS = 4096  # bounds the logits held at once, which are vocabulary-wide


class Readout(NamedTuple):
    """Log-probabilities in nats, float32."""

    words: Float[Tensor, "prompts words"]
    """Of each whole word right after each prompt."""
    following: Float[Tensor, "prompts vocab"]
    """Of every next token at the prompt's last position."""


def word_tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> Word:
    """Token ids of ` word` as it stands inside a text; in Chinese, Japanese, Thai ... of `word`.

    Raises:
        UserError: the tokenizer joins words across a space, or with the mark before them, so that
            the word has no tokens of its own.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # Some tokenizers treat the start of a text apart, so the word is read off after another one;
    # where no space parts words, after a full stop, since it would join the letters of another one.
    opening, gap = ("。", "") if re.match(f"[{UNSPACED}]", word) else ("the", " ")
    before, both = ids(opening), ids(f"{opening}{gap}{word}")
    if both[: len(before)] != before or len(both) == len(before):
        raise UserError(
            f"the tokenizer has no tokens for {word!r} alone after {opening!r}; "
            "use a model whose tokenizer splits there"
        )
    return tuple(both[len(before) :])


def read(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    words: Sequence[Word],
    site: str = "",
    intervention: Intervention | None = None,
) -> Readout:
    """Log-probabilities of `words` after each prompt, with the residual at `site` edited or not.

    One pass reads, for every prompt, all words of one token; a longer word needs its opening (all
    tokens but the last) appended, in a sequence that it shares with words of the same opening.

    Args:
        lm: the model.
        prompts: token ids, BOS included, cut at the end of a word.
        words: token ids of the words.
        site: where to edit.
        intervention: the edit of all content positions; None reads the model as it is.
    """
    openings = _openings(words)
    sequences = [[*prompt, *opening] for prompt in prompts for opening in openings]
    home = [next(i for i, o in enumerate(openings) if o[: len(w) - 1] == w[:-1]) for w in words]
    last = f"blocks.{lm.n_layers - 1}.hook_resid_post"
    result = Readout(
        torch.empty(len(prompts), len(words)), torch.empty(len(prompts), lm.vocab_size)
    )
    for batch in batches(lm, sequences, batch_tokens=_BATCH_TOKENS):
        editing = edit(lm, site, intervention(batch.content)) if intervention else nullcontext()
        with editing:
            residual = capture(lm, batch, [last])[last]
        where = [divmod(sequence, len(openings)) for sequence in batch.rows]
        ends = [len(prompts[p]) - 1 for p, _ in where]
        lengths = [len(openings[o]) + 1 for _, o in where]
        spans = [residual[i, e : e + n] for i, (e, n) in enumerate(zip(ends, lengths, strict=True))]
        log_p = lm.unembed(torch.cat(spans)).float().log_softmax(-1).cpu()
        for (p, o), span in zip(where, log_p.split(lengths), strict=True):
            result.following[p] = span[0]
            for w, word in enumerate(words):
                if home[w] == o:
                    result.words[p, w] = span[range(len(word)), word].sum()
    return result


def n_tokens(prompts: Sequence[Sequence[int]], words: Sequence[Word]) -> int:
    """How many tokens one `read` runs through the model, padding not counted."""
    openings = _openings(words)
    return sum(len(prompt) + len(opening) for prompt in prompts for opening in openings)


def kl(
    clean: Float[Tensor, "prompts vocab"], edited: Float[Tensor, "prompts vocab"]
) -> Float[Tensor, " prompts"]:
    """KL(clean || edited) in nats of next-token distributions given as log-probabilities."""
    return functional.kl_div(edited, clean, reduction="none", log_target=True).sum(-1).clamp(min=0)


def _openings(words: Sequence[Word]) -> list[Word]:
    """What must follow the prompt so that every word can be read: openings that none extends."""

    def maximal(openings: set[Word]) -> Iterator[Word]:
        for opening in sorted(openings):
            if not any(o[: len(opening)] == opening for o in openings - {opening}):
                yield opening

    return list(maximal({word[:-1] for word in words}))

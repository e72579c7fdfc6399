"""Which tokens of a text are read, in which windows of the context, and which of them are pooled.

Content tokens of a text are numbered from 0 over all its windows: neither special tokens nor the
first position of a window are among them, since those carry residuals of outlier norm. A pooling is
then one range of numbers for each text.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Int

from discovery.captured import RULE
from discovery.corpora.rows import Text
from saes.errors import UserError
from saes.lm.model import LM
from saes.lm.positions import offsets, role_span
from saes.lm.tokens import with_bos

Long = Literal["cut", "chunk"]

FROM_TOKEN = 50  # counted from 1
IF_SHORTEST_HAS = 100
STORIES = ("selection", "confirmation")  # sets that share one rule
EVERY_TEXT = (RULE, "mean", "max", "last")  # poolings that any text with a content token can serve


class Windows(NamedTuple):
    """The tokens of some texts, cut into windows of the model's context."""

    ids: list[list[int]]
    """Token ids of each window: BOS, if there is one, opens them all."""
    text: Int[np.ndarray, " windows"]
    """Whose window it is; those of a text follow each other in order."""
    before: Int[np.ndarray, " windows"]
    """Content tokens of the same text in the windows before."""
    rows: list[list[int]]
    """Token ids of each text as far as it is read, BOS included once."""
    tokens: Int[np.ndarray, " texts"]
    """Content tokens of each text as far as it is read."""
    truncated: Bool[np.ndarray, " texts"]
    """Cut to the context."""


def windows(lm: LM, texts: Sequence[Text], long: Long = "cut") -> Windows:
    """Tokenize texts and cut them into windows.

    Without a BOS, the first token of a further window is the last one of the window before, so that
    each token is content once, but for the very first.

    Args:
        long: what becomes of texts longer than the context: `cut` reads their first window,
            `chunk` all of them.

    Raises:
        UserError: a text has no content token.
    """
    if not texts:
        empty = np.zeros(0, np.int64)
        return Windows([], empty, empty, [], empty, np.zeros(0, bool))
    special = lm.tokenizer.all_special_ids
    bos = cast("int | None", lm.tokenizer.bos_token_id)
    step = lm.context - 1
    ids: list[list[int]] = []
    owner: list[int] = []
    before: list[int] = []
    rows: list[list[int]] = []
    tokens = np.zeros(len(texts), np.int64)
    truncated = np.zeros(len(texts), bool)
    coded = lm.tokenizer([text.text for text in texts], verbose=False)["input_ids"]
    for i, whole in enumerate(coded):
        row = with_bos(lm, whole)
        truncated[i] = long == "cut" and len(row) > lm.context
        row = row[: lm.context] if long == "cut" else row
        rows.append(row)
        content = ~np.isin(row[1:], special)
        for start in range(0, len(content), step):
            if n := int(content[start : start + step].sum()):
                first = row[start] if bos is None else bos
                ids.append([first, *row[1 + start : 1 + start + step]])
                owner.append(i)
                before.append(int(tokens[i]))
                tokens[i] += n
        if not tokens[i]:
            raise UserError(
                f"text {texts[i].id} ({texts[i].text[:40]!r}) is too short: no token is left once "
                "special tokens and the first position are masked"
            )
    own, earlier = np.array([owner, before], dtype=np.int64)
    return Windows(ids, own, earlier, rows, tokens, truncated)


def first_position(token_counts: Sequence[int]) -> int:
    """Number, from 0, of the first content token that the pooling `rule` takes.

    >>> first_position([120, 100]), first_position([120, 99])
    (49, 0)

    Args:
        token_counts: content tokens of each text of the corpus.
    """
    return FROM_TOKEN - 1 if min(token_counts) >= IF_SHORTEST_HAS else 0


def rule_starts(texts: Sequence[Text], tokens: Int[np.ndarray, " texts"]) -> dict[str, int]:
    """By set, the first content token that the pooling `rule` takes.

    Each set is a corpus of its own, but the selection and the confirmation set share one rule: what
    is selected on the first is confirmed on the other.
    """
    counts: dict[str, list[int]] = {}
    for text, n in zip(texts, tokens.tolist(), strict=True):
        counts.setdefault(_corpus(text.set), []).append(n)
    return {text.set: first_position(counts[_corpus(text.set)]) for text in texts}


def in_words(start: int) -> str:
    """The tokens that are pooled from the `start`-th on, counted from 0.

    >>> in_words(49), in_words(0)
    ('tokens from number 50 on', 'all tokens')
    """
    return f"tokens from number {start + 1} on" if start else "all tokens"


def check_poolings(
    lm: LM, texts: Sequence[Text], poolings: Sequence[str], long: Long = "cut"
) -> None:
    """Refuse now the poolings that some text cannot serve; it takes a pass of the tokenizer.

    Raises:
        UserError: a text that lacks the tokens, or `span` where no text has a span to choose on.
    """
    asked = [pooling for pooling in poolings if pooling not in EVERY_TEXT]
    if "span" in asked and not any(text.span for text in texts if text.set in STORIES):
        raise UserError(
            "no text of the selection or confirmation set has a span, which the pooling 'span' "
            "takes; name span_columns of the source, or choose another pooling"
        )
    read = windows(lm, texts, long) if asked else None
    for pooling in asked:
        assert read is not None
        ranges(lm, texts, read, pooling)


def spans_in_words(texts: Sequence[Text]) -> dict[str, str]:
    """By set, what the pooling `span` takes.

    >>> spans_in_words([Text("a", "So sad.", ("sad",), "neutral")])
    {'neutral': 'the spans, all tokens of 1 of 1 texts that have none'}
    """
    every = Counter(text.set for text in texts)
    bare = Counter(text.set for text in texts if text.span is None)
    return {
        name: f"the spans, all tokens of {bare[name]} of {n} texts that have none"
        if bare[name]
        else "the spans"
        for name, n in every.items()
    }


def ranges(
    lm: LM, texts: Sequence[Text], read: Windows, pooling: str
) -> Int[np.ndarray, "texts 2"]:
    """Of each text the content tokens that are pooled: the first, and the one after the last.

    Args:
        pooling: as `discovery.captured.check_pooling` explains.

    Raises:
        UserError: a text that lacks the tokens, by its id.
    """
    n = read.tokens
    kind, _, rest = pooling.partition("-")
    if pooling == RULE:
        starts = rule_starts(texts, n)
        low, high = np.array([starts[text.set] for text in texts], dtype=np.int64), n
    elif pooling == "last":
        low, high = n - 1, n
    elif kind == "from":
        low, high = np.full_like(n, int(rest) - 1), n
    elif kind == "position" and rest.isdecimal():
        low, high = np.full_like(n, int(rest) - 1), np.full_like(n, int(rest))
    elif kind in ("span", "position"):
        pairs = [_hit(lm, text, row, rest) for text, row in zip(texts, read.rows, strict=True)]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)
    else:
        low, high = np.zeros_like(n), n
    if (short := np.flatnonzero(np.maximum(low + 1, high) > n)).size:
        i = int(short[0])
        raise UserError(
            f"text {texts[i].id} has {n[i]} content tokens, too few for the pooling {pooling!r}; "
            "choose another pooling, or leave the text out"
        )
    return np.stack([low, high], axis=1)


def _corpus(name: str) -> str:
    return STORIES[0] if name in STORIES else name


def _hit(lm: LM, text: Text, row: list[int], role: str) -> tuple[int, int]:
    """The content tokens that hold a character of the span, or the ":" after a role."""
    whole = text.span or (0, len(text.text))
    try:
        start, end = role_span(text.text, role, text.id) if role else whole
    except UserError as error:
        raise UserError(
            f"{error}; it is in the {text.set} set, and the pooling 'position-{role}' needs one in "
            "every text: choose another pooling, or leave the text out"
        ) from None
    if not 0 <= start < end <= len(text.text):
        raise UserError(
            f"text {text.id}: the span {start} to {end} is empty or outside its "
            f"{len(text.text)} characters; mend the columns of span_columns, or leave the text out"
        )
    content = ~np.isin(row, lm.tokenizer.all_special_ids)
    content[0] = False
    places = np.array(offsets(lm, text.text, row, text.id))
    inside = content & (places[:, 0] < end) & (places[:, 1] > start)
    if not inside.any():
        raise UserError(
            f"text {text.id}: no content token holds its characters {start} to {end} "
            f"({text.text[start:end][:40]!r}); a text longer than the context was cut "
            "before them, or they are its first token; set capture.long to chunk, choose another "
            "pooling, or leave the text out"
        )
    numbers = (content.cumsum() - 1)[inside]
    return int(numbers[0]), int(numbers[-1]) + 1

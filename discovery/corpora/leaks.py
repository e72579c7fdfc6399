"""Texts that name their own concept: what such a text shows may be the word and not the feeling."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from discovery.concepts import Concept
from discovery.corpora.rows import Text

# scripts that put no space between words: Thai, Lao, Myanmar, Khmer, kana, Han
UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Characters of scripts that do not part words by white space, as the inside of a class."""
_UNSPACED = re.compile(f"[{UNSPACED}]")


class Leak(NamedTuple):
    """A text that names its concept."""

    id: str
    form: str
    """The concept's name or an inflection of it."""
    concept: str
    set: str
    source: str


def leaks(texts: Iterable[Text], concepts: Iterable[Concept]) -> list[Leak]:
    """The texts that name a concept of theirs, each with the first form that does.

    Forms are matched as whole words in any case, and anywhere in scripts that put no space between
    words; white space or a hyphen parts the words of a form, and a hyphen after it does not hide it
    ("calm-faced" names calm).
    """
    forms = {concept.name: _composed(concept.inflections) for concept in concepts}
    # a cheap test that most texts fail: is the longest word of a form anywhere in the text?
    longest = {n: [max(re.split("[ -]", f), key=len) for f in of] for n, of in forms.items()}
    found: list[Leak] = []
    for text in texts:
        composed = unicodedata.normalize("NFC", text.text)
        lower = composed.lower()
        for name in text.concepts:
            if any(word in lower for word in longest.get(name, ())):
                form = _named(composed, tuple(forms[name]))
                if form is not None:
                    found.append(Leak(text.id, form, name, text.set, text.source))
                    break
    return found


def _composed(forms: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(unicodedata.normalize("NFC", form) for form in forms))


def _named(text: str, forms: tuple[str, ...]) -> str | None:
    """The first of the forms that stands in a text as whole words, as it is written there."""
    for hit in _pattern(forms).finditer(text):
        # vowel signs, as in Hindi, are parts of words that the pattern does not know of
        if hit.lastgroup is None or unicodedata.category(text[hit.end() :][:1] or " ")[0] != "M":
            return " ".join(hit[0].lower().split())
    return None


@cache
def _pattern(forms: tuple[str, ...]) -> re.Pattern[str]:
    """Whole words of scripts with spaces (the group `spaced`), and anything of the others."""
    ordered = sorted(forms, key=len, reverse=True)
    unspaced = [form for form in ordered if _UNSPACED.search(form)]
    spaced = [form for form in ordered if form not in unspaced]
    parts = [re.escape(form) for form in unspaced]
    if spaced:
        words = "|".join(re.sub(r"(\\ |\\-)", r"[\\s-]+", re.escape(form)) for form in spaced)
        parts.append(rf"(?P<spaced>(?<!\w)(?:{words})(?!\w))")
    return re.compile("|".join(parts), re.IGNORECASE)

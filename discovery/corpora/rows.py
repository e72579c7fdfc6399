"""The typed row of a labelled text, and the sets that such rows make up. No torch."""

import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Role = Literal["selection", "confirmation", "situations", "neutral", "lexical"]
ROLES: tuple[Role, ...] = typing.get_args(Role)


@dataclass(frozen=True)
class Text:
    """One text and all that is known of it; what is not known is empty."""

    id: str
    text: str = field(repr=False)
    concepts: tuple[str, ...]
    """Those it is labelled with: none for neutral texts, several where several apply."""
    set: str
    """Its role: one of `ROLES`."""
    topic: str = ""
    """Texts are compared with each other only within a topic (group); "" where there are none."""
    writer: str = ""
    source: str = ""
    """The corpus it is from."""
    language: str = "en"
    span: tuple[int, int] | None = None
    """Characters that the label is about, from and to; None for the whole text."""

    @property
    def concept(self) -> str:
        """The first of its concepts, or ""."""
        return self.concepts[0] if self.concepts else ""


class Corpus(NamedTuple):
    """The texts of a run by role, each in the order of its source."""

    selection: tuple[Text, ...]
    """Everything is chosen on these."""
    confirmation: tuple[Text, ...]
    """Verdicts are confirmed on these, once: other topics and other writers."""
    situations: tuple[Text, ...]
    """A further format, which decides nothing; may be empty."""
    neutral: tuple[Text, ...]
    """Texts without feeling."""
    lexical: tuple[Text, ...]
    """Texts that contain the concept's word while nobody feels it; may be empty."""

    def texts(self) -> list[Text]:
        """All texts, set after set."""
        return [text for texts in self for text in texts]


def by_role(texts: Iterable[Text]) -> Corpus:
    """Sort texts into their sets.

    Raises:
        KeyError: a set that is no role.
    """
    sets: dict[str, list[Text]] = {role: [] for role in ROLES}
    for text in texts:
        sets[text.set].append(text)
    return Corpus(*(tuple(sets[role]) for role in ROLES))

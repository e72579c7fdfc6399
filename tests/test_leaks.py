"""A text that names its concept is found in any script; one that names another word is not."""

from dataclasses import replace

import pytest

from discovery.concepts import Concept, load_concepts
from discovery.corpora.leaks import leaks
from discovery.corpora.rows import Text

CONCEPTS = load_concepts(["calm", "worn out"])
TEXT = Text("x", "", (), "selection", source="s")


def concept(*forms: str) -> Concept:
    return replace(CONCEPTS[0], name=forms[0], slug=forms[0], inflections=forms)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("She CALMLY left.", "calmly"),
        ("A calm-faced man.", "calm"),
        ("He was worn\nout by noon.", "worn out"),
        ("The worn-out coat.", "worn-out"),
        ("A becalmed ship; calmative tea.", None),
        ("His anger rose.", None),
        ("A sword, worn outside.", None),
    ],
)
def test_whole_words_of_the_own_concept(text: str, form: str | None) -> None:
    name = "worn out" if "worn" in text else "calm"
    found = leaks([replace(TEXT, text=text, concepts=(name,))], CONCEPTS)
    assert [leak.form for leak in found] == ([] if form is None else [form])


@pytest.mark.parametrize(
    ("forms", "text", "form"),
    [
        (("悲しみ",), "彼女の悲しみは深い。", "悲しみ"),
        (("愤怒",), "我感到愤怒和失望", "愤怒"),
        (("โกรธ",), "เขาโกรธมาก", "โกรธ"),
        (("गुस्सा", "गुस्से"), "वह गुस्से में था।", "गुस्से"),
        (("गुस्स",), "वह गुस्सा था।", None),  # a part of a word that ends in a vowel sign
        (("страх",), "Его СТРАХ прошёл", "страх"),  # noqa: RUF001
        (("страх",), "страховка", None),
        (("freude", "schöne"), "Scho\u0308ne Welt", "schöne"),  # letters and marks, composed or not
        (("l'amour",), "C'est L'amour.", "l'amour"),
        (("غضب",), "كان في غضب شديد", "غضب"),
        (("at ease", "at ease of"), "At ease often", "at ease"),
    ],
)
def test_any_script(forms: tuple[str, ...], text: str, form: str | None) -> None:
    found = leaks([replace(TEXT, text=text, concepts=(forms[0],))], [concept(*forms)])
    assert [leak.form for leak in found] == ([] if form is None else [form])


def test_each_text_is_listed_once_with_its_set_and_source() -> None:
    text = replace(TEXT, id="t", text="calm and worn out, calm", concepts=("worn out", "calm"))
    (leak,) = leaks([text, replace(text, concepts=())], CONCEPTS)
    assert leak == ("t", "worn out", "worn out", "selection", "s")

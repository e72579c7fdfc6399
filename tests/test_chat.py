"""`saes.lm.chat`: the tokenizer's own template, one BOS."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from saes.errors import UserError
from saes.lm.chat import chat, chat_text
from saes.lm.model import LM
from saes.lm.positions import role_colon, token_at
from saes.lm.tokens import pad

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ m.role | capitalize }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "Rain came in the night?"},
    {"role": "assistant", "content": "Yes: a river."},
    {"role": "user", "content": "Again"},
]


def with_template(lm: LM, template: str | None, **special: Any) -> LM:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=lm.tokenizer.backend_tokenizer,  # pyright: ignore
        **{"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, **special},
    )
    return replace(lm, tokenizer=tokenizer)


@pytest.mark.parametrize("opening", ["", "{{ bos_token }}"])
def test_ids_are_those_of_the_template_with_one_bos(tiny_lm: LM, opening: str) -> None:
    """Whether the template writes BOS itself or not; the tokenizer would add another one."""
    lm = with_template(tiny_lm, opening + TEMPLATE)
    template: Any = lm.tokenizer.apply_chat_template
    for prompt in (True, False):
        ids = chat(lm, MESSAGES, generation_prompt=prompt)
        own = template(MESSAGES, add_generation_prompt=prompt, return_dict=False)
        assert ids == ([] if opening else [1]) + own
        assert ids.count(1) == 1
        assert ids.count(2) == 3  # </s> of the template is one token, not its letters


def test_a_tokenizer_without_bos_gets_none(tiny_lm: LM) -> None:
    lm = with_template(tiny_lm, TEMPLATE, bos_token=None)
    assert 1 not in chat(lm, MESSAGES)


def test_text_and_the_last_prompt_token(tiny_lm: LM) -> None:
    lm = with_template(tiny_lm, TEMPLATE)
    text = chat_text(lm, MESSAGES)
    assert text == (
        "User: Rain came in the night?</s>\nAssistant: Yes: a river.</s>\nUser: Again</s>\n"
        "Assistant:"
    )
    for side in ("left", "right"):
        batch = pad(lm, [chat(lm, MESSAGES), chat(lm, MESSAGES[:1])], side=side)
        texts = [text, chat_text(lm, MESSAGES[:1])]
        assert (role_colon(lm, batch, texts) == token_at(batch, -1)).all()


def test_no_template(tiny_lm: LM) -> None:
    with pytest.raises(UserError, match="tiny_lm has no chat template"):
        chat(with_template(tiny_lm, None), MESSAGES)


def test_messages_that_the_template_refuses(tiny_lm: LM) -> None:
    lm = with_template(tiny_lm, TEMPLATE)
    with pytest.raises(UserError, match="refuses these messages: no system role"):
        chat(lm, [{"role": "system", "content": "Be brief."}, *MESSAGES])


def test_a_conversation_longer_than_the_context_is_not_cut(tiny_lm: LM) -> None:
    lm = with_template(tiny_lm, TEMPLATE)
    with pytest.raises(UserError, match=r"has \d+ tokens, more than the context of tiny_lm: 256"):
        chat(lm, [{"role": "user", "content": "x " * 300}])

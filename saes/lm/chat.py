"""Chat messages as the model's own template writes them."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from jinja2 import TemplateError

from saes.errors import UserError
from saes.lm.model import LM
from saes.lm.tokens import with_bos


def chat_text(
    lm: LM, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = True
) -> str:
    """A conversation as text, special tokens written out.

    Args:
        messages: each with a `role` (system, user, assistant) and its `content`.
        generation_prompt: end with the opening of the assistant's next turn.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the messages (some
            know no system role, some want user and assistant in turn).
    """
    if getattr(lm.tokenizer, "chat_template", None) is None:
        raise UserError(
            f"the tokenizer of {lm.name} has no chat template; write the dialogue out as plain "
            "text, or load a model that was tuned for chat"
        )
    try:
        text = lm.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the chat template of {lm.name} refuses these messages: {str(error) or type(error)}"
        ) from None
    return cast("str", text)


def chat(
    lm: LM, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation, with exactly one BOS in front if the tokenizer has one.

    The last token is the last of the prompt. Arguments and errors are those of `chat_text`.

    Raises:
        UserError: also if the conversation is longer than the model's context; its end, which
            matters most, is never cut off.
    """
    text = chat_text(lm, messages, generation_prompt=generation_prompt)
    # Templates write their special tokens themselves, BOS mostly among them.
    coded = cast("Any", lm.tokenizer)(text, add_special_tokens=False, verbose=False)
    ids = with_bos(lm, list(coded["input_ids"]))
    if len(ids) > lm.context:
        raise UserError(
            f"the conversation has {len(ids)} tokens, more than the context of {lm.name}: "
            f"{lm.context}; leave out its first messages"
        )
    return ids

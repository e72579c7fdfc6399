"""`saes.lm.edit`: what an edit does, and that nothing of it is left."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from saes.errors import UserError
from saes.lm.capture import capture
from saes.lm.edit import edit
from saes.lm.model import LM, load_lm
from saes.lm.tokens import pad

IDS = [[1, 40, 41, 42, 43], [1, 50, 51]]
SITE = "blocks.1.hook_resid_post"
LAST = "blocks.3.hook_resid_post"


def logits(lm: LM) -> torch.Tensor:
    batch = pad(lm, IDS)
    return lm.model(input_ids=batch.ids, attention_mask=batch.attention.long()).logits


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_the_identity_changes_nothing(tiny_lm: LM, kind: str) -> None:
    clean = logits(tiny_lm)
    with edit(tiny_lm, f"blocks.1.hook_resid_{kind}", lambda h: h.clone()):
        assert torch.equal(logits(tiny_lm), clean)


def test_the_model_goes_on_with_the_edited_residual(tiny_lm: LM) -> None:
    """Replace what block 1 leaves, and the rest is that of the other text."""
    batch, other = pad(tiny_lm, IDS[:1]), pad(tiny_lm, [[1, 60, 61, 62, 63]])
    there = capture(tiny_lm, other, [SITE, LAST])
    with edit(tiny_lm, SITE, lambda _: there[SITE]):
        found = capture(tiny_lm, batch, [LAST])[LAST]
    torch.testing.assert_close(found, there[LAST], rtol=0, atol=0)


def test_post_of_a_block_is_pre_of_the_next(tiny_lm: LM) -> None:
    with edit(tiny_lm, SITE, lambda h: h * 1.5):
        post = logits(tiny_lm)
    with edit(tiny_lm, "blocks.2.hook_resid_pre", lambda h: h * 1.5):
        pre = logits(tiny_lm)
    assert torch.equal(post, pre)
    assert not torch.allclose(post, logits(tiny_lm), atol=1e-2)


def test_outputs_are_bit_equal_after_the_edit(tiny_lm: LM) -> None:
    clean = logits(tiny_lm)
    with edit(tiny_lm, SITE, lambda h: h + 1):
        assert not torch.equal(logits(tiny_lm), clean)
    assert torch.equal(logits(tiny_lm), clean)


def test_restored_when_something_is_raised_inside_or_by_the_edit(tiny_lm: LM) -> None:
    clean = logits(tiny_lm)
    with pytest.raises(KeyError), edit(tiny_lm, SITE, lambda h: h + 1):
        raise KeyError

    def broken(_: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), edit(tiny_lm, SITE, broken):
        logits(tiny_lm)
    with pytest.raises(AssertionError, match="edit at"), edit(tiny_lm, SITE, lambda h: h[:1]):
        logits(tiny_lm)
    assert torch.equal(logits(tiny_lm), clean)


def test_edits_nest_in_order(tiny_lm: LM) -> None:
    batch = pad(tiny_lm, IDS)
    clean = capture(tiny_lm, batch, [SITE])[SITE]
    with edit(tiny_lm, SITE, lambda h: h + 1), edit(tiny_lm, SITE, lambda h: h * 2):
        both = capture(tiny_lm, batch, [SITE])[SITE]
        with edit(tiny_lm, "blocks.0.hook_resid_pre", lambda h: h * 0):
            pass
    assert torch.equal(both, (clean + 1) * 2)
    assert torch.equal(capture(tiny_lm, batch, [SITE])[SITE], clean)


class TupleBlock(nn.Module):
    """A block as some architectures write it: keyword input, tuple output."""

    def forward(self, *, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
        return hidden_states + 1, "cache"


def test_blocks_that_take_keywords_and_return_tuples(tiny_lm: LM) -> None:
    block = TupleBlock()
    lm = replace(tiny_lm, blocks=nn.ModuleList([block]))
    x = torch.ones(1, 2, 32)
    with edit(lm, "blocks.0.hook_resid_pre", lambda h: h * 5):
        assert torch.equal(block(hidden_states=x)[0], x * 6)
        with edit(lm, "blocks.0.hook_resid_post", lambda h: -h):
            residual, rest = block(hidden_states=x)
            assert torch.equal(residual, x * -6)
            assert rest == "cache"
    assert torch.equal(block(hidden_states=x)[0], x * 2)


def test_a_half_precision_model_stays_so(tiny_lm_folder: Path) -> None:
    lm = load_lm(tiny_lm_folder, dtype="bfloat16")
    with edit(lm, SITE, lambda h: h.float() * 1.0):
        assert capture(lm, pad(lm, IDS), [SITE])[SITE].dtype == torch.bfloat16


def test_an_unknown_site(tiny_lm: LM) -> None:
    with (
        pytest.raises(UserError, match="out of range"),
        edit(tiny_lm, "blocks.7.hook_resid_post", lambda h: h),
    ):
        pass

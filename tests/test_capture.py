"""`saes.lm.capture` against Hugging Face's own hidden states, for any padding and batch size."""

from typing import Any, Literal

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from saes.errors import UserError
from saes.lm.capture import capture
from saes.lm.model import LM, Site, load_lm
from saes.lm.tokens import batches, pad

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
FAMILIES: dict[str, Any] = {
    "gpt2": transformers.GPT2Config(**SMALL),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=48),
    "llama": transformers.LlamaConfig(**GATED),
    "gemma2": transformers.Gemma2Config(**GATED, sliding_window=8),
    "falcon": transformers.FalconConfig(**SMALL, ffn_hidden_size=48),
    "falcon-alibi": transformers.FalconConfig(**SMALL, ffn_hidden_size=48, alibi=True),
    "bloom": transformers.BloomConfig(
        vocab_size=300, hidden_size=32, n_layer=3, n_head=2, initializer_range=0.2
    ),
}
PRE = [str(Site(layer, "pre")) for layer in range(3)]
POST = [str(Site(layer, "post")) for layer in range(3)]
IDS = [[1, *((7 * i + 13 * j) % 290 + 5 for j in range(n))] for i, n in enumerate((3, 20, 9, 14))]


def build(name: str, tokenizer: PreTrainedTokenizerFast) -> LM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name])
    return load_lm(model, tokenizer=tokenizer)


@pytest.fixture(params=[f for f in FAMILIES if f != "bloom"])
def family(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast) -> LM:
    return build(request.param, tiny_tokenizer)


def test_equals_the_hidden_states_of_hugging_face(family: LM) -> None:
    batch = pad(family, [IDS[1], IDS[1][::-1]])
    hidden = family.model(input_ids=batch.ids, output_hidden_states=True).hidden_states
    found = capture(family, batch, [*POST, *PRE])
    for layer in range(3):
        torch.testing.assert_close(found[PRE[layer]], hidden[layer], rtol=0, atol=1e-5)
        if layer < 2:  # the last of Hugging Face's is behind the final norm
            torch.testing.assert_close(found[POST[layer]], hidden[layer + 1], rtol=0, atol=1e-5)
    normed = family.final_norm(found[POST[2]])
    torch.testing.assert_close(normed, hidden[3], rtol=1e-5, atol=1e-5)


def content_by_text(
    lm: LM, site: str, batch_tokens: int, side: Literal["left", "right"]
) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for batch in batches(lm, IDS, batch_tokens=batch_tokens, side=side):
        residual = capture(lm, batch, [site])[site]
        found |= {i: residual[r, batch.content[r]] for r, i in enumerate(batch.rows)}
    return [found[i] for i in range(len(IDS))]


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_side_and_batch_size_do_not_matter(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = build(name, tiny_tokenizer)
    alone = content_by_text(lm, POST[2], 1, "right")
    assert [len(x) for x in alone] == [len(row) - 1 for row in IDS]
    for side in ("left", "right"):
        for batch_tokens in (45, 1000):
            together = content_by_text(lm, POST[2], batch_tokens, side)
            for one, other in zip(alone, together, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone[1][3], alone[1][4], atol=0.1)  # positions do differ


def test_the_pass_stops_after_the_last_site(tiny_lm: LM) -> None:
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(tiny_lm.blocks)
    ]
    batch = pad(tiny_lm, IDS)
    capture(tiny_lm, batch, ["blocks.1.hook_resid_post", "blocks.0.hook_resid_pre"])
    assert ran == [0, 1]
    ran.clear()
    capture(tiny_lm, batch, ["blocks.2.hook_resid_pre"])
    assert ran == [0, 1]
    for handle in handles:
        handle.remove()


def test_hooks_are_gone_afterwards_and_several_sites_equal_one(tiny_lm: LM) -> None:
    batch = pad(tiny_lm, IDS)
    sites = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]
    together = capture(tiny_lm, batch, sites)
    assert list(together) == sites
    for site in sites:
        assert torch.equal(together[site], capture(tiny_lm, batch, [site])[site])
        assert not together[site].requires_grad
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in tiny_lm.blocks)
    assert capture(tiny_lm, batch, []) == {}


def test_the_embedding_is_the_first_pre_site(tiny_lm: LM) -> None:
    batch = pad(tiny_lm, IDS)
    found = capture(tiny_lm, batch, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    assert torch.equal(found, tiny_lm.model.get_input_embeddings()(batch.ids))


def test_an_unknown_site_leaves_no_hook(tiny_lm: LM) -> None:
    with pytest.raises(UserError, match="out of range"):
        capture(tiny_lm, pad(tiny_lm, IDS), ["blocks.0.hook_resid_pre", "blocks.9.hook_resid_pre"])
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in tiny_lm.blocks)

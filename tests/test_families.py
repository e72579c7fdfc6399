"""Every model family through both backends, against transformers' own hidden states and logits.

The reference is a second model of the same seed, given one text at a time without padding.
"""

from functools import cache
from typing import Any, Literal

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from saes.errors import UserError
from saes.lm.capture import capture, forward
from saes.lm.edit import edit
from saes.lm.model import LM, Site, load_lm
from saes.lm.tokens import Batch, batches, pad

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # so that blocks and tokens differ by far more than rounding
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1}
GATED = {**QWEN2, "head_dim": 16}
FALCON = {**SMALL, "ffn_hidden_size": 48}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 3,  # as deep as the text part, which must be told from it
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 28,
    "patch_size": 14,
}
FAMILIES: dict[str, Any] = {
    "gpt2": transformers.GPT2Config(**SMALL),
    "gpt-neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=48),  # Pythia
    "llama": transformers.LlamaConfig(**GATED),
    "llama-3": transformers.LlamaConfig(**GATED, rope_parameters=LLAMA3),
    "qwen2": transformers.Qwen2Config(**QWEN2),
    "qwen3": transformers.Qwen3Config(**GATED),
    "mistral": transformers.MistralConfig(**GATED, sliding_window=8),  # also Zephyr, OpenChat
    "falcon": transformers.FalconConfig(**FALCON),  # falcon-7b
    "falcon-new": transformers.FalconConfig(
        **FALCON, new_decoder_architecture=True, num_kv_heads=1
    ),
    "falcon-alibi": transformers.FalconConfig(  # falcon-rw-1b
        **FALCON, alibi=True, parallel_attn=False, multi_query=False, bias=True
    ),
    "gemma-2": transformers.Gemma2Config(
        **GATED, sliding_window=8, attn_logit_softcapping=1.0, final_logit_softcapping=2.0
    ),
    "gemma-3": transformers.Gemma3TextConfig(**GATED, sliding_window=8, layer_types=LAYER_TYPES),
    "gemma-3-multimodal": transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**GATED, sliding_window=8),
        vision_config=VISION,
        mm_tokens_per_image=4,
    ),
    "bloom": transformers.BloomConfig(
        vocab_size=300, hidden_size=32, n_layer=3, n_head=2, initializer_range=0.2
    ),
}
SUBJECTS = [
    (family, backend)
    for family in FAMILIES
    for backend in ("hf", "bridge")
    if (family, backend) != ("falcon-alibi", "bridge")  # refused, see test_bridge.py
]
PRE = [str(Site(layer, "pre")) for layer in range(3)]
POST = [str(Site(layer, "post")) for layer in range(3)]
IDS = [[1, *((7 * i + 13 * j) % 290 + 5 for j in range(n))] for i, n in enumerate((3, 20, 9, 14))]


def build(name: str) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(FAMILIES[name]).eval()


@cache
def reference(name: str) -> list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """Of each text, transformers' hidden states and logits."""
    model: Any = build(name)
    with torch.no_grad():
        out = [model(torch.tensor([row]), output_hidden_states=True) for row in IDS]
    return [(tuple(h[0] for h in o.hidden_states), o.logits[0]) for o in out]


@pytest.fixture(scope="module", params=SUBJECTS, ids=" ".join)
def loaded(
    request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast
) -> tuple[str, LM]:
    name, backend = request.param
    return name, load_lm(build(name), tokenizer=tiny_tokenizer, backend=backend)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def every_batch(lm: LM) -> list[Batch]:
    """The texts one by one, some together and all together, padded on either side."""
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    alone = list(batches(lm, IDS, batch_tokens=1))
    return alone + [
        batch
        for side in sides
        for size in (45, 1000)
        for batch in batches(lm, IDS, batch_tokens=size, side=side)
    ]


def test_every_site_is_transformers_hidden_state_whatever_the_batch(
    loaded: tuple[str, LM],
) -> None:
    name, lm = loaded
    for batch in every_batch(lm):
        found = capture(lm, batch, [*POST, *PRE])
        for row, text in enumerate(batch.rows):
            hidden, at = reference(name)[text][0], batch.attention[row]
            for layer in range(3):
                close(found[PRE[layer]][row, at], hidden[layer])
                if layer < 2:
                    close(found[POST[layer]][row, at], hidden[layer + 1])
            # the last of transformers' hidden states is behind the final norm
            close(lm.final_norm(found[POST[2]])[row, at], hidden[3])


def test_positions_and_blocks_differ(loaded: tuple[str, LM]) -> None:
    """Without this, the test above might compare nothing."""
    hidden = torch.stack(reference(loaded[0])[1][0][:3])
    assert (hidden[1:] - hidden[:-1]).norm(dim=-1).min() > 0.1
    assert (hidden[2, 1:] - hidden[2, :-1]).norm(dim=-1).min() > 0.1


def test_logits_whatever_the_batch(loaded: tuple[str, LM]) -> None:
    name, lm = loaded
    for batch in every_batch(lm):
        logits = forward(lm, batch).logits
        for row, text in enumerate(batch.rows):
            close(logits[row, batch.attention[row]], reference(name)[text][1])


def test_unembed_of_the_last_residual_is_the_models_logits(loaded: tuple[str, LM]) -> None:
    name, lm = loaded
    logits = lm.unembed(capture(lm, pad(lm, [IDS[1]]), [POST[2]])[POST[2]])
    close(logits[0], reference(name)[1][1])
    assert logits.std() > 0.01


@pytest.mark.parametrize("site", [POST[1], PRE[2], PRE[0]])
def test_the_model_goes_on_with_an_edited_residual(loaded: tuple[str, LM], site: str) -> None:
    """Replace one text's residual by another's, and the rest is that of the other text."""
    name, lm = loaded
    one, other = pad(lm, [IDS[1]]), pad(lm, [IDS[1][::-1]])
    there = capture(lm, other, [site, POST[2]])
    with edit(lm, site, lambda _: there[site]):
        found = capture(lm, one, [site, POST[2]])
        logits = forward(lm, one).logits
    close(found[site], there[site])
    close(found[POST[2]], there[POST[2]])
    close(logits, forward(lm, other).logits)
    close(forward(lm, one).logits[0], reference(name)[1][1])  # nothing of the edit is left


def test_properties(loaded: tuple[str, LM]) -> None:
    name, lm = loaded
    assert (lm.d_model, lm.n_layers, lm.vocab_size) == (32, 3, 300)
    unbounded = int(lm.tokenizer.model_max_length)  # ALiBi knows no last position
    assert lm.context == (unbounded if name == "bloom" else 64)
    assert (lm.device, lm.model.training) == (torch.device("cpu"), False)
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_early_stop(loaded: tuple[str, LM]) -> None:
    _, lm = loaded
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(lm.blocks)
    ]
    capture(lm, pad(lm, IDS), [PRE[1], PRE[0]])
    for handle in handles:
        handle.remove()
    assert ran == [0]


def test_a_site_out_of_range(loaded: tuple[str, LM]) -> None:
    _, lm = loaded
    with pytest.raises(UserError, match=r"blocks\.3\.hook_resid_pre is out of range"):
        capture(lm, pad(lm, IDS), ["blocks.3.hook_resid_pre"])

"""`saes.lm.bridge`: what TransformerLens itself reads through it, and what is refused.

That both backends agree at every site and for any padding is tested in test_families.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from saes.errors import UserError
from saes.lm.capture import capture, hook
from saes.lm.edit import edit
from saes.lm.model import LM, load_lm, weights_hash
from saes.lm.tokens import pad

IDS = [[1, 40, 41, 42, 43], [1, 50, 51]]
SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def bridged(tiny_lm_folder: Path) -> LM:
    return load_lm(tiny_lm_folder, backend="bridge")


def test_transformer_lens_caches_the_same_residual(bridged: LM) -> None:
    assert bridged.bridge is not None
    batch = pad(bridged, IDS, side="left")
    _, cache = bridged.bridge.run_with_cache(batch.ids, attention_mask=batch.attention.long())
    for site in (SITE, "blocks.0.hook_resid_pre", "blocks.3.hook_resid_post"):
        found = capture(bridged, batch, [site])[site]
        torch.testing.assert_close(found[batch.attention], cache[site][batch.attention])


def test_hooks_of_transformer_lens_are_seen_by_ours(bridged: LM) -> None:
    """A user's own hook and ours share a hook point, in the order they were put on."""
    assert bridged.bridge is not None
    batch = pad(bridged, IDS)
    clean = capture(bridged, batch, [SITE])[SITE]
    double = [("blocks.1.hook_out", lambda x, **_: x * 2)]
    with bridged.bridge.hooks(fwd_hooks=double), edit(bridged, SITE, lambda h: h + 1):
        found = capture(bridged, batch, [SITE])[SITE]
    torch.testing.assert_close(found, clean * 2 + 1)
    assert torch.equal(capture(bridged, batch, [SITE])[SITE], clean)


def test_no_hook_is_left(bridged: LM) -> None:
    point: Any = bridged.blocks[1]
    with edit(bridged, SITE, lambda h: h):
        assert len(point.hook_out._forward_hooks) == 1
    hook(bridged, bridged.site("blocks.1.hook_resid_pre"), lambda _: None).remove()
    assert not point.hook_out._forward_hooks
    assert not point.hook_in._forward_hooks


def test_text_goes_through_the_bridge_as_through_the_model(bridged: LM) -> None:
    assert bridged.bridge is not None
    expected = bridged.tokenizer("Rain came", return_tensors="pt")["input_ids"]
    assert torch.equal(bridged.bridge.to_tokens("Rain came"), expected)


def test_the_tokenizer_is_left_as_it_was(tiny_lm_folder: Path) -> None:
    """TransformerLens's own loading sets a BOS, a padding token and a padding side."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_lm_folder)
    tokenizer.bos_token = tokenizer.pad_token = None
    lm = load_lm(tiny_lm_folder, tokenizer=tokenizer, backend="bridge")
    assert lm.tokenizer is tokenizer
    assert (tokenizer.bos_token, tokenizer.pad_token) == (None, None)


def test_weights_are_not_processed(bridged: LM, tiny_lm_folder: Path) -> None:
    plain = load_lm(tiny_lm_folder).model.state_dict()
    lm: Any = bridged.model
    for path in ("model.layers.0.mlp.down_proj", "model.layers.2.input_layernorm", "lm_head"):
        module = lm.get_submodule(path)
        module = getattr(module, "original_component", module)
        assert torch.equal(module.weight, plain[f"{path}.weight"]), path


def test_half_precision(tiny_lm_folder: Path) -> None:
    lm = load_lm(tiny_lm_folder, dtype="bfloat16", backend="bridge")
    assert capture(lm, pad(lm, IDS), [SITE])[SITE].dtype == torch.bfloat16


def test_weights_hash_is_steady(tiny_lm_folder: Path) -> None:
    one, two = (weights_hash(load_lm(tiny_lm_folder, backend="bridge")) for _ in range(2))
    assert one == two


def small(kind: type[Any], **more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(
            kind(
                vocab_size=300,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                initializer_range=0.2,
                **more,
            )
        )


def test_an_architecture_that_the_bridge_lacks(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = small(transformers.DiffLlamaConfig, intermediate_size=48)
    with pytest.raises(UserError, match=r"does not know DiffLlamaForCausalLM.*backend='hf'"):
        load_lm(model, tokenizer=tiny_tokenizer, backend="bridge")
    assert load_lm(model, tokenizer=tiny_tokenizer).n_layers == 3  # untouched


def test_an_architecture_that_the_bridge_computes_otherwise(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = small(transformers.FalconConfig, ffn_hidden_size=48, alibi=True)
    with pytest.raises(UserError, match=r"other logits .*FalconForCausalLM.*backend='hf'"):
        load_lm(model, tokenizer=tiny_tokenizer, backend="bridge")
    with pytest.raises(UserError, match="TransformerBridge already"):  # its modules are replaced
        load_lm(model, tokenizer=tiny_tokenizer)


def test_a_model_that_is_wrapped_already(bridged: LM) -> None:
    for backend in ("hf", "bridge"):
        with pytest.raises(UserError, match="TransformerBridge already"):
            load_lm(bridged.model, tokenizer=bridged.tokenizer, backend=backend)


def test_an_unknown_backend(tiny_lm_folder: Path) -> None:
    with pytest.raises(UserError, match=r"'jax'.*hf or bridge"):
        load_lm(tiny_lm_folder, backend="jax")

"""`saes.lm.model`: loading, its errors, sites, and the unembedding of five architectures."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from saes.errors import UserError
from saes.files import locate
from saes.lm.capture import capture
from saes.lm.model import LM, Site, load_lm, parse_site
from saes.lm.tokens import pad

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
FAMILIES: dict[str, Any] = {
    "gpt2": transformers.GPT2Config(**SMALL),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=48),
    "llama": transformers.LlamaConfig(**GATED),
    "gemma2": transformers.Gemma2Config(
        **GATED, final_logit_softcapping=2.0, initializer_range=0.3
    ),
    "falcon": transformers.FalconConfig(**SMALL, ffn_hidden_size=48),
}


def build(config: Any) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast) -> LM:
    return load_lm(build(FAMILIES[request.param]), tokenizer=tiny_tokenizer)


def test_unembed_of_the_last_residual_is_the_models_logits(family: LM) -> None:
    batch = pad(family, [[1, 20, 30, 40, 50], [1, 60, 70, 80, 90]])
    last = str(Site(family.n_layers - 1, "post"))
    expected = family.model(input_ids=batch.ids).logits
    actual = family.unembed(capture(family, batch, [last])[last])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual.std() > 0.01


def test_properties(family: LM) -> None:
    assert (family.d_model, family.n_layers, family.vocab_size, family.context) == (32, 3, 300, 64)
    assert family.device == torch.device("cpu")
    assert not family.model.training
    assert not any(p.requires_grad for p in family.model.parameters())


def test_softcap_is_part_of_the_unembedding(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    lm = load_lm(build(FAMILIES["gemma2"]), tokenizer=tiny_tokenizer)
    logits = lm.unembed(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)))
    assert 1.5 < logits.abs().max() <= 2.0


def test_an_architecture_with_scaled_logits_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = build(transformers.GraniteConfig(**GATED, logits_scaling=4.0, initializer_range=0.3))
    with pytest.raises(UserError, match="logits"):
        load_lm(model, tokenizer=tiny_tokenizer)


def test_a_folder_loads_with_its_own_name(tiny_lm_folder: Path) -> None:
    lm = load_lm(tiny_lm_folder)
    assert lm.name == "tiny_lm"  # no path of this machine
    assert load_lm(str(tiny_lm_folder)).name == "tiny_lm"
    assert lm.model.dtype == torch.float32
    assert load_lm(tiny_lm_folder, dtype="bfloat16").model.dtype == torch.bfloat16


def test_sites_are_named_as_in_transformer_lens() -> None:
    assert parse_site("blocks.12.hook_resid_post") == Site(12, "post")
    assert str(Site(0, "pre")) == "blocks.0.hook_resid_pre"
    for name in ("blocks.1.hook_mlp_out", "blocks.x.hook_resid_post", "", "3"):
        with pytest.raises(UserError, match="site"):
            parse_site(name)


def test_a_site_out_of_range_is_refused(tiny_lm: LM) -> None:
    assert tiny_lm.site("blocks.3.hook_resid_pre") == Site(3, "pre")
    with pytest.raises(UserError, match=r"blocks\.4.*4 blocks"):
        tiny_lm.site("blocks.4.hook_resid_post")


def test_packaged_means_the_data_folder() -> None:
    import saes

    expected = Path(saes.__file__).parent / "data" / "demo_saes" / "blocks.3.hook_resid_post"
    assert locate("packaged/demo_saes/blocks.3.hook_resid_post") == expected
    with pytest.raises(UserError, match="packaged/no_such_model"):
        load_lm("packaged/no_such_model")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", Path("nowhere"), "a/b/c"])
def test_a_missing_folder(name: str | Path) -> None:
    with pytest.raises(UserError, match="no model folder"):
        load_lm(name)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "not a name!"])
def test_an_unknown_or_unreachable_hub_name(name: str) -> None:
    with pytest.raises(UserError, match=f"no model {name}"):
        load_lm(name)


def test_unknown_dtype_and_device(tiny_lm_folder: Path) -> None:
    with pytest.raises(UserError, match=r"int7.*float32"):
        load_lm(tiny_lm_folder, dtype="int7")
    with pytest.raises(UserError, match="no_such_device"):
        load_lm(tiny_lm_folder, device="no_such_device")


@pytest.fixture
def copy(tiny_lm_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_lm_folder, tmp_path / "copy")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_lm(tmp_path)


def test_a_model_without_a_tokenizer(copy: Path, tiny_lm: LM) -> None:
    for file in copy.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_lm(copy)
    with pytest.raises(UserError, match="tokenizer"):
        load_lm(tiny_lm.model)
    assert load_lm(copy, tokenizer=tiny_lm.tokenizer).n_layers == 4


def test_missing_and_damaged_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load model copy"):
        load_lm(copy)
    weights.unlink()
    with pytest.raises(UserError, match="cannot load model copy"):
        load_lm(copy)


def test_weights_that_lack_a_tensor_are_not_filled_with_noise(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack model\.layers\.2\.mlp\.up_proj"):
        load_lm(copy)


def test_a_tokenizer_larger_than_the_model(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(transformers.LlamaConfig(**{**GATED, "vocab_size": 200}))
    with pytest.raises(UserError, match=r"300 tokens.*200 embeddings"):
        load_lm(model, tokenizer=tiny_tokenizer)

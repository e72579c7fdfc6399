"""`saes.lm.model` and `saes.lm.loading`: placement, errors, sites, the hash of the weights.

Each model family is tested in test_families.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from saes.errors import UserError
from saes.files import locate
from saes.lm import loading
from saes.lm.capture import capture
from saes.lm.edit import edit
from saes.lm.model import LM, Site, load_lm, parse_site, weights_hash
from saes.lm.tokens import pad

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
LLAMA = transformers.LlamaConfig(**GATED)
GEMMA2 = transformers.Gemma2Config(**GATED, final_logit_softcapping=2.0, initializer_range=0.3)


def build(config: Any) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config)


def test_softcap_is_part_of_the_unembedding(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    lm = load_lm(build(GEMMA2), tokenizer=tiny_tokenizer)
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


def test_it_is_printed_on_one_line(tiny_lm: LM) -> None:
    assert repr(tiny_lm) == "LM('tiny_lm', LlamaForCausalLM, 4 blocks of width 32)"


def test_sites_are_named_as_in_transformer_lens() -> None:
    assert parse_site("blocks.12.hook_resid_post") == Site(12, "post")
    assert str(Site(0, "pre")) == "blocks.0.hook_resid_pre"
    for name in (
        "blocks.1.hook_mlp_out", "blocks.x.hook_resid_post", "", "3",
        "blocks.03.hook_resid_post", "blocks.\u0663.hook_resid_post", "blocks.1.hook_resid_post\n",
    ):  # fmt: skip
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


def test_a_tokenizer_file_that_is_json_but_no_tokenizer(copy: Path) -> None:
    tree = json.loads((copy / "tokenizer.json").read_text())
    for change in ({"pre_tokenizer": {"type": "Nonsense"}}, {"version": "9"}):  # no type of its own
        (copy / "tokenizer.json").write_text(json.dumps({**tree, **change}))
        with pytest.raises(UserError, match="model copy has no usable tokenizer"):
            load_lm(copy)


class Elsewhere(torch.Tensor):
    """A tensor on another device, as far as that can be had on one: it takes no part in sums."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.allclose, torch.Tensor.__getitem__):
            raise RuntimeError("Expected all tensors to be on the same device")
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) if func is torch.Tensor.to else out


@pytest.mark.parametrize("backend", ["hf", "bridge"])
def test_a_model_that_answers_on_another_device_than_its_last_block(
    tiny_tokenizer: PreTrainedTokenizerFast, backend: str
) -> None:
    model: Any = build(LLAMA)

    def answer(_module: Any, _args: Any, output: Any) -> Any:
        output.logits = output.logits.as_subclass(Elsewhere)
        return output

    model.register_forward_hook(answer)
    with pytest.raises(RuntimeError, match="same device"):
        torch.allclose(model(torch.tensor([[5]])).logits, torch.zeros(300))
    assert load_lm(model, tokenizer=tiny_tokenizer, backend=backend).n_layers == 3


def test_progress_bars_are_for_terminals(
    tiny_lm_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_lm(tiny_lm_folder)
    assert capsys.readouterr().err == ""
    before = transformers.utils.logging.set_tqdm_hook(None)
    assert before is None  # as it was
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    load_lm(tiny_lm_folder)
    assert "Loading weights" in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_model(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(transformers.LlamaConfig(**{**GATED, "vocab_size": 200}))
    with pytest.raises(UserError, match=r"300 tokens.*200 embeddings"):
        load_lm(model, tokenizer=tiny_tokenizer)


def test_a_model_object_stays_where_and_as_it_is(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = build(LLAMA).to(torch.float16)
    assert load_lm(model, tokenizer=tiny_tokenizer).model.dtype == torch.float16
    lm = load_lm(model, tokenizer=tiny_tokenizer, dtype="bfloat16", device="cpu")
    assert lm.model.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"'v1' is for a model that is loaded here"):
        load_lm(model, tokenizer=tiny_tokenizer, revision="v1")


MAP: dict[str, Any] = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.layers.3": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, MAP], ids=["auto", "cpu", "disk"])
def test_a_device_map_changes_nothing_but_the_place(
    tiny_lm: LM, tiny_lm_folder: Path, device_map: Any
) -> None:
    lm = load_lm(tiny_lm_folder, device_map=device_map)
    assert any(p.is_meta for p in lm.model.parameters()) == (device_map is MAP)
    assert lm.device == torch.device("cpu")
    batch = pad(lm, [[1, 40, 41, 42], [1, 50]], side="left")
    sites = [str(Site(layer, "post")) for layer in range(4)]
    for site, residual in capture(lm, batch, sites).items():
        assert torch.equal(residual, capture(tiny_lm, batch, [site])[site])
    assert torch.equal(lm.unembed(residual), tiny_lm.unembed(residual))
    with edit(lm, sites[1], lambda h: h * 2), edit(tiny_lm, sites[1], lambda h: h * 2):
        found, expected = (capture(x, batch, [sites[3]])[sites[3]] for x in (lm, tiny_lm))
    assert torch.equal(found, expected)
    assert weights_hash(lm) == weights_hash(lm)


def test_the_device_is_where_the_embedding_is_computed(tiny_lm_folder: Path) -> None:
    lm = load_lm(tiny_lm_folder, device_map={**MAP, "model.embed_tokens": "disk"})
    assert lm.device == torch.device("cpu")
    assert lm.model.get_input_embeddings().weight.is_meta  # pyright: ignore


def test_device_map_against_device(tiny_lm_folder: Path) -> None:
    with pytest.raises(UserError, match=r"either device='cpu' or device_map='auto'"):
        load_lm(tiny_lm_folder, device="cpu", device_map="auto")
    with pytest.raises(UserError, match="cannot load model tiny_lm"):
        load_lm(tiny_lm_folder, device_map="nowhere")


@pytest.mark.parametrize(
    ("option", "value", "package"),
    [("quantize", "4bit", "bitsandbytes"), ("device_map", "auto", "accelerate")],
)
def test_a_package_that_is_not_there(
    tiny_lm_folder: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, package: str
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == package else name)
    options: dict[str, Any] = {option: value}
    with pytest.raises(UserError, match=rf"{option}='{value}' needs the package {package}"):
        load_lm(tiny_lm_folder, **options)


def test_quantize_of_another_width(tiny_lm_folder: Path) -> None:
    with pytest.raises(UserError, match=r"unknown quantize '2bit'; choose 8bit or 4bit"):
        load_lm(tiny_lm_folder, quantize="2bit")


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantized_loading_hands_on_what_transformers_wants(
    tiny_lm: LM, tiny_lm_folder: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    """bitsandbytes is not installed here; the loader is replaced, the rest is as it would be."""
    given: dict[str, Any] = {}

    def loader(_source: str, **options: Any) -> tuple[Any, dict[str, list[str]]]:
        given.update(options)
        return tiny_lm.model, {"missing_keys": []}

    def moved(*_: Any, **__: Any) -> None:
        raise AssertionError("a quantised model may not be moved or cast")

    monkeypatch.setattr(loading, "find_spec", lambda name: name)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", loader)
    monkeypatch.setattr(tiny_lm.model, "to", moved)
    lm = load_lm(tiny_lm_folder, quantize=quantize, dtype="bfloat16", device="cuda:1")
    assert lm.model is tiny_lm.model
    assert given["dtype"] == torch.bfloat16
    assert given["device_map"] == {"": "cuda:1"}
    config = given["quantization_config"]
    assert (config.load_in_8bit, config.load_in_4bit) == (quantize == "8bit", quantize == "4bit")
    if quantize == "4bit":
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
    load_lm(tiny_lm_folder, quantize=quantize, device_map="auto")
    assert given["device_map"] == "auto"


def test_a_revision_goes_to_the_hub_and_nowhere_else(
    tiny_lm: LM, tiny_lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def model(_source: str, *, revision: str, **_: Any) -> tuple[Any, dict[str, list[str]]]:
        asked.append(revision)
        return tiny_lm.model, {"missing_keys": []}

    def tokenizer(_source: str, *, revision: str) -> Any:
        asked.append(revision)
        return tiny_lm.tokenizer

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", tokenizer)
    load_lm("owner/name", revision="step3000")
    load_lm("owner/name")
    assert asked == ["step3000", "step3000", "main", "main"]
    with pytest.raises(UserError, match=r"tiny_lm is a folder and has no revision 'v1'"):
        load_lm(tiny_lm_folder, revision="v1")


def test_an_unreachable_revision_is_named() -> None:
    with pytest.raises(UserError, match=r"no model nobody/no-such-model at revision v1"):
        load_lm("nobody/no-such-model", revision="v1")


def test_the_hash_tells_any_change_of_the_weights(
    tiny_lm_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = load_lm(tiny_lm_folder)
    whole = weights_hash(lm)
    assert weights_hash(load_lm(tiny_lm_folder)) == whole
    assert weights_hash(load_lm(tiny_lm_folder, dtype="bfloat16")) != whole
    weight = dict(lm.model.named_parameters())["model.layers.2.mlp.up_proj.weight"]
    for row, column in ((0, 0), (17, 3), (63, 31)):  # wherever it is
        before = weight[row, column].item()
        weight[row, column] += 1e-6
        assert weights_hash(lm) != whole
        weight[row, column] = before
    assert weights_hash(lm) == whole
    swapped = build(LLAMA)
    plain = weights_hash(load_lm(swapped, tokenizer=tiny_tokenizer))
    layers: Any = swapped.get_submodule("model.layers")
    layers[0], layers[1] = layers[1], layers[0]
    assert weights_hash(load_lm(swapped, tokenizer=tiny_tokenizer)) != plain


def test_the_hash_of_quantised_weights(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Bytes, as bitsandbytes holds them."""
    model: Any = build(LLAMA)
    model.model.layers[1].mlp.packed = torch.nn.Parameter(
        torch.arange(12, dtype=torch.uint8).reshape(3, 4), requires_grad=False
    )
    lm = load_lm(model, tokenizer=tiny_tokenizer)
    before = weights_hash(lm)
    model.model.layers[1].mlp.packed[2, 1] += 1
    assert weights_hash(lm) != before

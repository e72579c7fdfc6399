"""`saes.pretrained`: sae-lens folders, and each way in which one can be wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from saes.errors import UserError
from saes.pretrained import load_sae

X = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tiny_sae_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_sae_folder, tmp_path / "sae")


def rewrite(folder: Path, **changes: Any) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, **changes}))


def test_equals_plain_sae_lens(tiny_sae_folder: Path) -> None:
    ours, theirs = load_sae(tiny_sae_folder, d_model=32), SAE.load_from_disk(tiny_sae_folder)
    assert ours.site == "blocks.1.hook_resid_post"
    assert (ours.d_in, ours.d_sae) == (32, 128)
    assert torch.equal(ours.encode(X), theirs.encode(X))
    assert torch.equal(ours.decode(ours.encode(X)), theirs(X))
    assert torch.equal(ours.W_dec, theirs.W_dec)


def test_bfloat16_storage_is_computed_in_float32(folder: Path) -> None:
    weights = folder / "sae_weights.safetensors"
    half = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(half, weights)
    rewrite(folder, dtype="bfloat16")
    dictionary = load_sae(folder, d_model=32)
    assert dictionary.W_dec.dtype == dictionary.encode(X).dtype == torch.float32
    assert torch.equal(dictionary.W_dec, half["W_dec"].float())


def test_decoder_norms_are_folded_without_changing_latents(tmp_path: Path) -> None:
    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post")
    config = TopKSAEConfig(
        d_in=32, d_sae=64, k=5, rescale_acts_by_decoder_norm=True, metadata=metadata
    )
    sae = TopKSAE(config)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.1, 5, 64)[:, None]
        sae.b_enc.normal_()
    sae.save_model(tmp_path)
    dictionary = load_sae(tmp_path, d_model=32)
    z = sae.encode(X)
    torch.testing.assert_close(dictionary.encode(X), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.decode(z), sae.decode(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z @ dictionary.W_dec + sae.b_dec, sae.decode(z))
    assert not torch.allclose(z @ sae.W_dec + sae.b_dec, sae.decode(z), atol=0.1)


def test_width_of_another_model(folder: Path) -> None:
    with pytest.raises(UserError, match=r"width 32 .* 48"):
        load_sae(folder, d_model=48)


def test_missing_folder_and_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no SAE folder"):
        load_sae(tmp_path / "nowhere", d_model=32)
    with pytest.raises(UserError, match="packaged/demo_saes/none"):
        load_sae("packaged/demo_saes/none", d_model=32)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks sae_weights\.safetensors"):
        load_sae(folder, d_model=32)
    (folder / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"lacks cfg\.json"):
        load_sae(folder, d_model=32)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"d_in": "wide"}', "7"])
def test_damaged_config(folder: Path, content: str) -> None:
    (folder / "cfg.json").write_text(content)
    with pytest.raises(UserError, match=r"cfg\.json .* damaged"):
        load_sae(folder, d_model=32)


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for part in (whole[:-100], whole[:4], b""):
        weights.write_bytes(part)
        with pytest.raises(UserError, match="damaged"):
            load_sae(folder, d_model=32)


def test_weights_that_lack_a_tensor_or_have_another_shape(folder: Path) -> None:
    weights = folder / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "b_enc"}, weights)
    with pytest.raises(UserError, match="damaged"):
        load_sae(folder, d_model=32)
    save_file({**tensors, "W_dec": tensors["W_dec"].T.contiguous()}, weights)
    with pytest.raises(UserError, match="damaged"):
        load_sae(folder, d_model=32)


def test_unknown_architecture(folder: Path) -> None:
    rewrite(folder, architecture="crystal_ball")
    with pytest.raises(UserError, match="unknown kind"):
        load_sae(folder, d_model=32)


def test_no_site_or_another_kind_of_site(folder: Path) -> None:
    rewrite(folder, metadata={"sae_lens_version": "6.54.12"})
    with pytest.raises(UserError, match="hook_name"):
        load_sae(folder, d_model=32)
    rewrite(folder, metadata={"hook_name": "blocks.1.hook_mlp_out"})
    with pytest.raises(UserError, match="hook_mlp_out"):
        load_sae(folder, d_model=32)


def test_what_would_be_read_wrongly_is_refused(folder: Path) -> None:
    rewrite(folder, normalize_activations="expected_average_only_in")
    with pytest.raises(UserError, match="expected_average_only_in"):
        load_sae(folder, d_model=32)
    rewrite(folder, normalize_activations="none", architecture="transcoder")
    with pytest.raises(UserError, match="transcoder"):
        load_sae(folder, d_model=32)

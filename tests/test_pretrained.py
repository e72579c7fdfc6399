"""`saes.pretrained`, `saes.sources`: sae-lens folders and each way in which one can be wrong;
hub repositories and the registry, from a local cache laid out as huggingface_hub does.

Other formats: test_formats.py. The check on loading: test_check.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils
import numpy as np
import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from saes.errors import UserError
from saes.latents import SaeLens
from saes.pretrained import load_sae
from saes.registry import neuronpedia_link
from saes.sources import fingerprint, resolve

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
    with pytest.raises(UserError, match="no SAE of a known format"):
        load_sae(folder, d_model=32)
    (folder / "sae_weights.safetensors").touch()
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


# --------------------------------------------------------------------------------- where SAEs lie

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; the hub itself is off (HF_HUB_OFFLINE, set in conftest.py)."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, repo: str, folder: Path, at: str) -> Path:
    """Put a folder's files in the cache as huggingface_hub does: blobs, and links in a snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    for file in (f for f in folder.rglob("*") if f.is_file()):
        place = snapshot / at / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        blob = root / "blobs" / f"{len(list((root / 'blobs').iterdir())):064x}"
        shutil.copyfile(file, blob)
        place.symlink_to(blob)
    return snapshot


def same(ours: SaeLens, folder: Path) -> None:
    assert torch.equal(ours.encode(X), load_sae(folder, d_model=32).encode(X))


@pytest.mark.parametrize("at", ["", "saes/blocks.1"])
def test_hub_repository(at: str, cache: Path, tiny_sae_folder: Path) -> None:
    cached(cache, "someone/saes", tiny_sae_folder, at)
    name = f"someone/saes/{at}".rstrip("/")
    ours = load_sae(name, d_model=32)
    same(ours, tiny_sae_folder)
    assert ours.origin is not None
    assert (ours.origin.source, ours.origin.revision) == (name, COMMIT)
    assert ours.origin.release is None
    assert load_sae(f"{name}/", d_model=32).site == ours.site


class Hub:
    """A hub that lays in the cache what the patterns let through."""

    def __init__(self, files: dict[str, bytes], root: Path) -> None:
        self.files, self.root = files, root / "snapshots" / COMMIT

    def snapshot_download(self, repo: str, allow_patterns: list[str]) -> str:
        assert repo == "someone/saes"
        for name in huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns
        ):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(self.files[name])
        return str(self.root)

    def fetched(self) -> set[str]:
        return {f.relative_to(self.root).as_posix() for f in self.root.rglob("*") if f.is_file()}


def test_a_file_of_a_repository_is_fetched_with_its_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (64, 32), "encoder.bias": (64,), "decoder.weight": (32, 64)}
    state = {name: torch.randn(s, generator=generator) for name, s in shapes.items()}
    torch.save({**state, "bias": torch.ones(32)}, tmp_path / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "submodule_name": "resid_post_layer_3"}
    weights, config = (tmp_path / "ae.pt").read_bytes(), json.dumps({"trainer": trainer}).encode()
    at = "run/resid_post_layer_3/trainer_0"
    files = {f"{at}/ae.pt": weights, f"{at}/config.json": config, f"{at}/eval_results.json": b"{}"}
    hub = Hub({**files, "run/other/ae.pt": weights}, tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    ours = load_sae(f"someone/saes/{at}/ae.pt", d_model=32)
    assert hub.fetched() == {f"{at}/ae.pt", f"{at}/config.json"}
    assert ours.site == "blocks.3.hook_resid_post"
    assert torch.equal(ours.encode(X), load_sae(f"someone/saes/{at}", d_model=32).encode(X))


def test_what_lies_beside_an_sae_is_fetched_and_decides_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"one/{f.name}": f.read_bytes() for f in folder.iterdir()}
    plain = Hub(files, tmp_path / "plain")
    beside = {"one/origin.json": b"{}", "one/training.json": b"{}", "one/model.bin": b"x"}
    hub = Hub({**files, **beside}, tmp_path / "hub")
    marks: list[str] = []
    for each in (plain, hub):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", each.snapshot_download)
        marks.append(fingerprint("someone/saes/one"))
    assert hub.fetched() - plain.fetched() == {"one/origin.json", "one/training.json"}
    assert marks[0] == marks[1]


def test_hub_repository_that_is_not_cached(cache: Path, tiny_sae_folder: Path) -> None:
    with pytest.raises(UserError, match=r"someone/saes is not in the local cache, .* hub on"):
        load_sae("someone/saes/x", d_model=32)
    snapshot = cached(cache, "someone/saes", tiny_sae_folder, "one")
    with pytest.raises(UserError, match="no SAE at other of hub repository someone/saes"):
        load_sae("someone/saes/other", d_model=32)
    with pytest.raises(UserError, match="no SAE at the top of hub repository someone/saes"):
        load_sae("someone/saes", d_model=32)
    (snapshot / "one" / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match="not in the local cache"):
        load_sae("someone/saes/one", d_model=32)


def test_names_that_mean_nothing(cache: Path) -> None:
    for name in ("gpt2-small-res", "gpt2-small-res-jbb/blocks.8", "a/"):
        with pytest.raises(UserError, match=r"no SAE|local cache"):
            load_sae(name, d_model=32)
    with pytest.raises(UserError, match="releases like it: gpt2-small-res-jb"):
        load_sae("gpt2-small-res", d_model=32)
    with pytest.raises(UserError, match="not the name of a hub repository"):
        load_sae("some one/s*s", d_model=32)
    with pytest.raises(UserError, match=r"no SAE folder \./nowhere"):
        load_sae("./nowhere", d_model=32)
    with pytest.raises(UserError, match=r"without '\.\.'"):
        load_sae("someone/saes/../x", d_model=32)
    assert not cache.exists()


def test_registry_of_gemma_scope(cache: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    shapes = {"W_enc": (32, 64), "W_dec": (64, 32), "b_enc": 64, "b_dec": 32, "threshold": 64}
    (tmp_path / "sae").mkdir()
    arrays = {name: generator.random(shape, np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "sae" / "params.npz", **arrays)
    cached(cache, "google/gemma-scope-2b-pt-res", tmp_path / "sae", "layer_12/width_16k/average_l0_82")  # noqa: E501  # fmt: skip
    ours = load_sae("gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical", d_model=32)
    assert ours.site == "blocks.12.hook_resid_post"
    assert ours.origin is not None
    assert ours.origin == (
        "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical",
        "gemma-scope",
        "gemma-scope-2b-pt-res-canonical",
        "layer_12/width_16k/canonical",
        "gemma-2-2b/12-gemmascope-res-16k",
        COMMIT,
    )
    link = "https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/7"
    assert neuronpedia_link(ours.origin, 7) == link
    ours.sae.save_model(tmp_path / "again")
    again = load_sae(tmp_path / "again", d_model=32)
    assert torch.equal(again.encode(X), ours.encode(X))
    assert again.site == ours.site
    assert again.origin is not None
    assert again.origin.neuronpedia == ours.origin.neuronpedia
    assert again.sae.cfg.metadata.model_name == "gemma-2-2b"
    same_files = "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    by_repository = load_sae(same_files, d_model=32)
    assert torch.equal(by_repository.encode(X), ours.encode(X))
    assert by_repository.site == ours.site
    assert fingerprint(same_files) == fingerprint(ours.origin.source)
    by_repository = "google/gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_104"
    cached(cache, "google/gemma-scope-2b-pt-att", tmp_path / "sae", "layer_0/width_16k/average_l0_104")  # noqa: E501  # fmt: skip
    with pytest.raises(UserError, match="reads an attention layer"):
        load_sae(by_repository, d_model=32)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_104", "residual stream"),
        ("gpt2-small-resid-mid-v5-32k/blocks.3.hook_resid_mid", "residual stream"),
        ("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post", "temporal"),
        ("mistral-7b-res-wg/blocks.8.hook_resid_pre", "token by token"),
    ],
)
def test_registry_saes_that_cannot_be_loaded_are_not_fetched(
    source: str, said: str, cache: Path
) -> None:
    with pytest.raises(UserError, match=f"cannot be loaded: .*{said}"):
        load_sae(source, d_model=32)
    assert not cache.exists()


def test_registry_holds_the_scale_that_files_do_not(
    cache: Path, folder: Path, tiny_sae_folder: Path
) -> None:
    """expected_average_only_in: inputs times a constant, reconstructions divided by it."""
    metadata = {"hook_name": "blocks.12.hook_resid_post"}
    rewrite(folder, normalize_activations="expected_average_only_in", metadata=metadata)
    cached(cache, "jbloom/Gemma-2b-Residual-Stream-SAEs", folder, "gemma_2b_blocks.12.hook_resid_post_16384")  # noqa: E501  # fmt: skip
    ours = load_sae("gemma-2b-res-jb/blocks.12.hook_resid_post", d_model=32)
    listed = resolve("gemma-2b-res-jb/blocks.12.hook_resid_post").listed
    assert listed is not None
    scale = listed.norm_scaling_factor
    assert scale is not None
    assert abs(scale - 1) > 0.01
    plain = load_sae(tiny_sae_folder, d_model=32)
    torch.testing.assert_close(ours.encode(X), plain.encode(X * scale), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ours.decode(ours.encode(X)),
        plain.decode(plain.encode(X * scale)) / scale,
        rtol=1e-4,
        atol=1e-4,
    )


def test_registry_overrides(cache: Path, folder: Path) -> None:
    """GPT-2's were trained on the centred residual, which only the registry says."""
    cached(cache, "jbloom/GPT2-Small-SAEs-Reformatted", folder, "blocks.8.hook_resid_pre")
    ours = load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre", d_model=32)
    centred = X - X.mean(1, keepdim=True)
    torch.testing.assert_close(ours.encode(X), ours.encode(centred), rtol=1e-4, atol=1e-4)
    assert ours.origin is not None
    assert ours.origin.neuronpedia == "gpt2-small/8-res-jb"


def test_origin_of_a_folder_holds_no_path(tiny_sae_folder: Path) -> None:
    origin = load_sae(tiny_sae_folder, d_model=32).origin
    assert origin is not None
    assert origin == ("blocks.1.hook_resid_post", "sae-lens", None, None, None, None)
    packaged = "packaged/demo_saes/blocks.3.hook_resid_post"
    assert load_sae(packaged, d_model=256).origin == (packaged, "sae-lens", None, None, None, None)


def test_origin_of_an_sae_of_a_grid_says_its_site(tiny_sae_folder: Path, tmp_path: Path) -> None:
    """Else the SAEs of two sites had one name."""
    saes = tmp_path / "runs" / "x" / "saes"
    names = ["blocks.4.hook_resid_post/k16", "blocks.5.hook_resid_post/k16", "one/layers.5"]
    for name in names:
        shutil.copytree(tiny_sae_folder, saes / name)
    assert [resolve(saes / name).name for name in names] == [*names[:2], "layers.5"]
    assert (
        resolve(saes / names[0] / "sae_weights.safetensors").name == "k16/sae_weights.safetensors"
    )


def test_origin_holds_no_home_folder(
    tiny_sae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "someone"
    shutil.copytree(tiny_sae_folder, home / "mine")
    monkeypatch.setenv("HOME", str(home))
    for source in (home / "mine", "~/mine"):
        assert resolve(source).name == "mine"


def test_fingerprints(cache: Path, folder: Path) -> None:
    before = fingerprint(folder)
    cached(cache, "someone/saes", folder, "one")
    on_hub = fingerprint("someone/saes/one")
    (folder / "notes.txt").write_text("other")
    assert fingerprint(folder) != before
    cached(cache, "other/saes", folder, "elsewhere/two")
    assert fingerprint("other/saes/elsewhere/two") == on_hub  # what is not the SAE's is left out
    with (folder / "cfg.json").open("a") as file:
        file.write(" ")
    cached(cache, "third/saes", folder, "one")
    assert fingerprint("third/saes/one") != on_hub
    with pytest.raises(UserError, match="local cache"):
        fingerprint("nobody/saes")


def test_random_state_is_left_alone(tiny_sae_folder: Path) -> None:
    before = torch.random.get_rng_state()
    load_sae(tiny_sae_folder, d_model=32)
    assert torch.equal(before, torch.random.get_rng_state())

"""`saes.formats`: each format written as its own library writes it, then loaded, must give the
latents and reconstructions of that library's forward, written out here anew."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saes.errors import UserError
from saes.formats.build import read
from saes.formats.hooks import site_of
from saes.pretrained import load_sae

D, M, K = 12, 40, 5
X = 3 * torch.randn(60, D, generator=torch.Generator().manual_seed(1))


def parts(seed: int = 0, **more: tuple[int, ...]) -> dict[str, Tensor]:
    """Random weights in sae-lens's orientation; decoder rows differ in norm."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,), **more}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def top(h: Tensor, k: int) -> Tensor:
    values, index = h.relu().topk(k, dim=1)
    return torch.zeros_like(h).scatter(1, index, values)


def jump(h: Tensor, threshold: Tensor | float) -> Tensor:
    return h.relu() * (h > threshold)


def write_json(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def same(source: Path, z: Tensor, x_hat: Tensor, site: str, format: str) -> None:
    """The SAE at `source` gives these latents and reconstructions of X, and is affine."""
    ours = load_sae(source, d_model=D)
    assert ours.site == site
    assert ours.origin is not None
    assert ours.origin.format == format
    assert (ours.d_in, ours.d_sae) == (D, M)
    assert ours.W_dec.dtype == torch.float32
    got = ours.encode(X)
    torch.testing.assert_close(got, z, rtol=1e-4, atol=1e-4)
    assert torch.equal(got != 0, z != 0)
    assert 0 < (z != 0).sum() < z.numel()
    torch.testing.assert_close(ours.decode(got), x_hat, rtol=1e-4, atol=1e-4)
    constant = ours.decode(torch.zeros(1, M))
    torch.testing.assert_close(got @ ours.W_dec + constant, x_hat, rtol=1e-4, atol=1e-4)
    for name, tensor in ours.sae.state_dict().items():
        assert tensor.is_contiguous(), name


# ------------------------------------------------------------------------------------- sae-lens


def lens_architectures() -> dict[str, tuple[dict[str, Any], dict[str, Tensor], Callable[..., Any]]]:
    p = parts()
    threshold = torch.rand(M, generator=torch.Generator().manual_seed(2))
    gates = parts(3, b_gate=(M,), b_mag=(M,), r_mag=(M,))
    gated = {**{k: p[k] for k in ("W_enc", "W_dec", "b_dec")}, **{k: gates[k] for k in gates if "g" in k}}  # noqa: E501  # fmt: skip

    def h(x: Tensor) -> Tensor:
        return x @ p["W_enc"] + p["b_enc"]

    def gate(x: Tensor) -> Tensor:
        on = (x @ p["W_enc"] + gates["b_gate"] > 0).float()
        return on * (x @ p["W_enc"] * gates["r_mag"].exp() + gates["b_mag"]).relu()

    def absolute(x: Tensor) -> Tensor:
        index = h(x).abs().topk(K, dim=1).indices
        return torch.zeros(len(x), M).scatter(1, index, h(x).gather(1, index))

    return {
        "standard": ({}, p, lambda x: h(x).relu()),
        "topk": ({"k": K}, p, lambda x: top(h(x), K)),
        "abstopk": ({"k": K}, p, absolute),
        "jumprelu": ({}, {**p, "threshold": threshold}, lambda x: jump(h(x), threshold)),
        "gated": ({}, gated, gate),
    }


def write_lens(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    write_json(folder / "cfg.json", cfg)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae_weights.safetensors")  # noqa: E501  # fmt: skip
    return folder


@pytest.mark.parametrize("architecture", lens_architectures())
@pytest.mark.parametrize("subtract", [True, False])
def test_sae_lens(architecture: str, subtract: bool, tmp_path: Path) -> None:
    extra, tensors, encode = lens_architectures()[architecture]
    metadata = {"sae_lens_version": "6.1.0", "hook_name": "blocks.3.hook_resid_pre"}
    cfg = {"architecture": architecture, "d_in": D, "d_sae": M, "dtype": "float32", **extra}
    cfg |= {"apply_b_dec_to_input": subtract, "metadata": metadata}
    z = encode(X - tensors["b_dec"] * subtract)
    folder = write_lens(tmp_path, cfg, tensors)
    same(folder, z, z @ tensors["W_dec"] + tensors["b_dec"], "blocks.3.hook_resid_pre", "sae-lens")


@pytest.mark.parametrize("k", [None, K])
def test_sae_lens_before_version_6(k: int | None, tmp_path: Path) -> None:
    p = parts()
    cfg: dict[str, Any] = {
        "d_in": D,
        "d_sae": M,
        "dtype": "torch.float32",
        "model_name": "gpt2-small",
        "hook_point": "blocks.2.hook_resid_pre",
        "normalize_activations": False,
        "neuronpedia_id": "gpt2-small/2-x",
        "context_size": 128,
    }
    if k is not None:
        cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}}
    write_lens(tmp_path, cfg, {**p, "scaling_factor": torch.ones(M)})
    h = (X - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    z = h.relu() if k is None else top(h, k)
    same(tmp_path, z, z @ p["W_dec"] + p["b_dec"], "blocks.2.hook_resid_pre", "sae-lens")
    origin = load_sae(tmp_path, d_model=D).origin
    assert origin is not None
    assert origin.neuronpedia == "gpt2-small/2-x"


def test_finetuned_sae_of_before_version_6(tmp_path: Path) -> None:
    p, factor = parts(), torch.linspace(0.5, 2, M)
    cfg = {"d_in": D, "d_sae": M, "dtype": "float32", "hook_point": "blocks.2.hook_resid_pre"}
    cfg |= {"finetuning_scaling_factor": True}
    write_lens(tmp_path, cfg, {**p, "scaling_factor": factor})
    z = ((X - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
    same(tmp_path, z, (z * factor) @ p["W_dec"] + p["b_dec"], "blocks.2.hook_resid_pre", "sae-lens")


def test_matching_pursuit_equals_plain_sae_lens(tmp_path: Path) -> None:
    from sae_lens import SAE, MatchingPursuitSAE, MatchingPursuitSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post")
    sae = MatchingPursuitSAE(
        MatchingPursuitSAEConfig(d_in=D, d_sae=M, max_iterations=6, metadata=metadata)
    )
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(0))
    sae.save_model(tmp_path)
    plain: Any = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        z = plain.encode(X)
        same(tmp_path, z, plain.decode(z), "blocks.1.hook_resid_post", "sae-lens")


CENTRED = {"center_writing_weights": True}
SITE = "blocks.1.hook_resid_post"


def lens_cfg(architecture: str, about: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """As version 6 writes it.

    Args:
        about: more metadata.
    """
    metadata = {"sae_lens_version": "6.1.0", "hook_name": SITE, **(about or {})}
    return {"architecture": architecture, "d_in": D, "d_sae": M, "metadata": metadata, **more}


@pytest.mark.parametrize("architecture", lens_architectures())
@pytest.mark.parametrize("subtract", [True, False, None], ids=["subtract", "not", "default"])
def test_centred_models_see_the_residual_less_its_mean(
    architecture: str, subtract: bool | None, tmp_path: Path
) -> None:
    """TransformerLens takes the mean over dimensions out of the residual, not out of b_dec."""
    extra, tensors, encode = lens_architectures()[architecture]
    tensors["b_dec"] += 3
    if subtract is not None:
        extra["apply_b_dec_to_input"] = subtract
    about = {"model_from_pretrained_kwargs": CENTRED}
    folder = write_lens(tmp_path, lens_cfg(architecture, about, **extra), tensors)
    taken = 0 if subtract is False else tensors["b_dec"]
    z = torch.cat([encode((x - x.mean() - taken)[None]) for x in X + 2])
    z_same = torch.cat([encode((x - x.mean() - taken)[None]) for x in X])
    ours = load_sae(folder, d_model=D)
    torch.testing.assert_close(ours.encode(X + 2), z, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(z, z_same, rtol=1e-4, atol=2e-4)  # the mean changes nothing
    same(folder, z, z @ tensors["W_dec"] + tensors["b_dec"], ours.site, "sae-lens")


@pytest.mark.parametrize("scaled", [True, False])
def test_centred_before_version_6_takes_b_dec_from_the_input(scaled: bool, tmp_path: Path) -> None:
    """As gpt2-small-res-jb is stored: nothing is said of b_dec, which is then subtracted."""
    p = parts()
    p["b_dec"] += 3
    cfg = {"d_in": D, "d_sae": M, "dtype": "float32", "hook_point": "blocks.2.hook_resid_pre"}
    cfg |= {"model_from_pretrained_kwargs": CENTRED}
    if scaled:
        cfg |= {"finetuning_scaling_factor": True}
        p["scaling_factor"] = torch.linspace(0.5, 2, M)
    write_lens(tmp_path, cfg, p)
    factor = p["scaling_factor"] if scaled else 1.0
    z = ((X - X.mean(1, keepdim=True) - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
    x_hat = (z * factor) @ p["W_dec"] + p["b_dec"]
    same(tmp_path, z, x_hat, "blocks.2.hook_resid_pre", "sae-lens")


def test_centred_matching_pursuit_is_refused(tmp_path: Path) -> None:
    p = parts()
    cfg = lens_cfg("matching_pursuit", {"model_from_pretrained_kwargs": CENTRED})
    write_lens(tmp_path, cfg, {name: p[name] for name in ("W_dec", "b_dec")})
    with pytest.raises(UserError, match="centred residual"):
        load_sae(tmp_path, d_model=D)


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "standard"])
@pytest.mark.parametrize("k", [0, -1, M + 1, 2.5, 5.0, "x", True, [5], None])
def test_a_k_that_cannot_be_is_refused(architecture: str, k: Any, tmp_path: Path) -> None:
    write_lens(tmp_path, lens_cfg(architecture, k=k), parts())
    if architecture == "standard" and k is None:
        load_sae(tmp_path, d_model=D)
        return
    with pytest.raises(UserError, match=r"damaged: k is "):
        load_sae(tmp_path, d_model=D)


def test_every_latent_may_fire(tmp_path: Path) -> None:
    write_lens(tmp_path, lens_cfg("topk", k=M), parts())
    assert load_sae(tmp_path, d_model=D).encode(X).shape == (len(X), M)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": ["topk"]},
        {"architecture": None},
        {"d_in": True},
        {"d_in": 12.0},
        {"d_sae": "40"},
        {"d_sae": None},
        {"normalize_activations": ["x"]},
        {"metadata": {"hook_name": ["x"]}},
        {"architecture": "standard", "k": "x"},
        {"apply_b_dec_to_input": None},
        {"apply_b_dec_to_input": [1]},
        {"metadata": None, "hook_point": None},
        {"metadata": [1]},
    ],
)
def test_configs_of_the_wrong_types_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    write_lens(tmp_path, {**lens_cfg("topk", k=K), **change}, parts())
    with pytest.raises(UserError):
        load_sae(tmp_path, d_model=D)


def test_a_finetuning_factor_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    cfg = {"d_in": D, "d_sae": M, "dtype": "float32", "hook_point": "blocks.2.hook_resid_pre"}
    write_lens(tmp_path, cfg, {**parts(), "scaling_factor": torch.ones(M - 1)})
    with pytest.raises(UserError, match="scaling_factor does not fit"):
        load_sae(tmp_path, d_model=D)


@pytest.mark.parametrize("promised", [float("nan"), float("inf"), 10**400, True, "0.9", None])
def test_figures_beside_an_sae_that_are_no_numbers(promised: Any, tmp_path: Path) -> None:
    write_lens(tmp_path, lens_cfg("topk", k=K), parts())
    write_json(tmp_path / "quality.json", {"held_out": {"variance_explained": promised, "l0": promised}})  # noqa: E501  # fmt: skip
    stored = read(tmp_path, "", "x", "cpu")
    assert stored.variance_explained is None
    assert stored.l0 == K
    write_json(tmp_path / "quality.json", {"held_out": {"variance_explained": 0.8, "l0": 4.5}})
    stored = read(tmp_path, "", "x", "cpu")
    assert (stored.variance_explained, stored.l0) == (0.8, 4.5)


# ------------------------------------------------------------------------------------- sparsify


def write_sparsify(folder: Path, p: dict[str, Tensor], **cfg: Any) -> Path:
    """As `SparseCoder.save_to_disk` of sparsify 1.3 does."""
    base = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True}
    base |= {"num_latents": M, "k": K, "multi_topk": False, "skip_connection": False}
    write_json(folder / "cfg.json", {**base, "transcode": False, "d_in": D, **cfg})
    tensors = {
        "encoder.weight": p["W_enc"].T.contiguous(),
        "encoder.bias": p["b_enc"],
        "W_dec": p["W_dec"],
        "b_dec": p["b_dec"],
    }
    save_file(tensors, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("normalize_decoder", [True, False])
def test_sparsify(normalize_decoder: bool, tmp_path: Path) -> None:
    p = parts()
    folder = tmp_path / "run" / "layers.5"
    write_sparsify(folder, p, normalize_decoder=normalize_decoder)
    write_json(folder.parent / "config.json", {"model": "EleutherAI/pythia-70m", "ctx_len": 2048})
    z = top((X - p["b_dec"]) @ p["W_enc"] + p["b_enc"], K)
    same(folder, z, z @ p["W_dec"] + p["b_dec"], "blocks.5.hook_resid_post", "sparsify")
    metadata = load_sae(folder, d_model=D).sae.cfg.metadata
    assert (metadata.model_name, metadata.context_size) == ("EleutherAI/pythia-70m", 2048)


def test_sparsify_of_2024_with_signed_latents_and_a_square_decoder(tmp_path: Path) -> None:
    """Square, so that no shape tells which way round W_dec is."""
    generator = torch.Generator().manual_seed(0)
    w_enc, w_dec = torch.randn(2, D, D, generator=generator)
    folder = tmp_path / "layers.0"
    write_json(folder / "cfg.json", {"d_in": D, "num_latents": D, "k": 3, "signed": True})
    tensors = {"encoder.weight": w_enc, "encoder.bias": torch.zeros(D)}
    save_file({**tensors, "W_dec": w_dec, "b_dec": torch.ones(D)}, folder / "sae.safetensors")
    h = (X - 1) @ w_enc.T
    index = h.abs().topk(3, dim=1).indices
    z = torch.zeros_like(h).scatter(1, index, h.gather(1, index))
    ours = load_sae(folder, d_model=D)
    torch.testing.assert_close(ours.encode(X), z)
    torch.testing.assert_close(ours.decode(z), z @ w_dec + 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sparsify_equals_the_library_itself(tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify", reason="needs the bench extra")
    torch.manual_seed(0)
    coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=M, k=K))
    with torch.no_grad():
        coder.encoder.bias.normal_()
        coder.b_dec.normal_()
        coder.W_dec.normal_()
        coder.save_to_disk(tmp_path / "layers.2")
        out = coder.encode(X)
        z = torch.zeros(len(X), M).scatter(1, out.top_indices, out.top_acts)
        x_hat = coder.decode(out.top_acts, out.top_indices)
    same(tmp_path / "layers.2", z, x_hat, "blocks.2.hook_resid_post", "sparsify")


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "skip connection"),
        ({"activation": "groupmax"}, "groupmax"),
        ({"k": 0}, "k is 0"),
        ({"k": M + 1}, "k is 41, but it has 40 latents"),
        ({"k": 2.5}, r"k is 2\.5"),
        ({"k": "x"}, "k is 'x'"),
        ({"k": True}, "k is True"),
    ],
)
def test_sparsify_refused(cfg: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_sae(write_sparsify(tmp_path / "layers.1", parts(), **cfg), d_model=D)


@pytest.mark.parametrize("content", ["{", "[1]", "", "7"])
def test_sparsify_beside_a_file_of_something_else(content: str, tmp_path: Path) -> None:
    folder = write_sparsify(tmp_path / "layers.1", parts())
    (tmp_path / "config.json").write_text(content)
    assert load_sae(folder, d_model=D).sae.cfg.metadata.model_name is None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m"),
        ("gpt2", "gpt2"),
        ("/home/someone/models/pythia", "pythia"),
        ("~/pythia/", "pythia"),
        ("./pythia", "pythia"),
        ("C:\\Users\\someone\\pythia", "pythia"),
        ("mnt/models/pythia", "pythia"),
        ("/", None),
        ("", None),
        (7, None),
    ],
)
def test_a_model_that_was_a_path_keeps_its_last_part(
    model: Any, name: str | None, tmp_path: Path
) -> None:
    folder = write_sparsify(tmp_path / "layers.1", parts())
    write_json(tmp_path / "config.json", {"model": model, "ctx_len": "long"})
    assert load_sae(folder, d_model=D).sae.cfg.metadata.model_name == name


def test_sparsify_at_another_site_is_refused(tmp_path: Path) -> None:
    for name, said in (("layers.1.mlp", "MLP"), ("layers.1.attention", "attention"), ("x", "'x'")):
        with pytest.raises(UserError, match=said):
            load_sae(write_sparsify(tmp_path / name, parts()), d_model=D)


# -------------------------------------------------------------------------- dictionary_learning


def linear(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """The three tensors of an encoder and a decoder that are nn.Linear."""
    return {
        "encoder.weight": p["W_enc"].T.contiguous(),
        "encoder.bias": p["b_enc"],
        "decoder.weight": p["W_dec"].T.contiguous(),
    }


def dictionary_classes() -> dict[str, tuple[dict[str, Tensor], Tensor, Tensor]]:
    """By class of dictionary_learning/dictionary.py: state dict, latents, reconstructions."""
    p, theta = parts(), 1.5
    extra = parts(3, gate=(M,), mag=(M,), r=(M,), threshold=(M,))
    threshold = extra["threshold"].abs()
    k, scalar = torch.tensor(K, dtype=torch.int), torch.tensor(theta)
    plain, minus = X @ p["W_enc"], (X - p["b_dec"]) @ p["W_enc"]
    norm = p["W_dec"].norm(dim=1)
    gated = (minus + extra["gate"] > 0) * (extra["r"].exp() * minus + extra["mag"]).relu() * norm
    jumped = jump(plain + p["b_enc"], threshold) * norm
    states = {
        "AutoEncoderNew": (
            {**linear(p), "decoder.bias": p["b_dec"]},
            (plain + p["b_enc"]).relu(),
        ),
        "AutoEncoderTopK": (
            {**linear(p), "b_dec": p["b_dec"], "k": k, "threshold": scalar},
            top(minus + p["b_enc"], K),
        ),
        "BatchTopKSAE": (
            {**linear(p), "b_dec": p["b_dec"], "k": k, "threshold": scalar},
            jump(minus + p["b_enc"], theta),
        ),
        "MatryoshkaBatchTopKSAE": (
            {**p, "k": k, "threshold": scalar, "group_sizes": torch.tensor([10, M - 10])},
            jump(minus + p["b_enc"], theta),
        ),
    }
    out = {name: (s, z, z @ p["W_dec"] + p["b_dec"]) for name, (s, z) in states.items()}
    state = {"decoder_bias": p["b_dec"], "r_mag": extra["r"], "gate_bias": extra["gate"]}
    state |= {"mag_bias": extra["mag"], **{k: v for k, v in linear(p).items() if "bias" not in k}}
    for name, tensors, z in (
        ("AutoEncoder", {**linear(p), "bias": p["b_dec"]}, (minus + p["b_enc"]).relu() * norm),
        ("GatedAutoEncoder", state, gated),
        ("JumpReluAutoEncoder", {**p, "threshold": threshold}, jumped),
    ):
        out[name] = (tensors, z, (z / norm) @ p["W_dec"] + p["b_dec"])
    return out


def write_dictionary(folder: Path, kind: str, state: dict[str, Tensor], **more: Any) -> Path:
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": M, "layer": 3, "k": K}
    trainer |= {"lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3"}
    buffer = {"d_submodule": D, "io": "out", "ctx_len": 128}
    tree = {"trainer": trainer, "buffer": buffer}
    for key, value in more.items():
        tree["buffer" if key == "io" else "trainer"][key] = value
    write_json(folder / "config.json", tree)
    torch.save(state, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("kind", dictionary_classes())
def test_dictionary_learning(kind: str, tmp_path: Path) -> None:
    state, z, x_hat = dictionary_classes()[kind]
    folder = write_dictionary(tmp_path, kind, state)
    same(folder, z, x_hat, "blocks.3.hook_resid_post", "dictionary_learning")
    same(folder / "ae.pt", z, x_hat, "blocks.3.hook_resid_post", "dictionary_learning")


def test_dictionary_learning_as_its_own_loader_reads_it(tmp_path: Path) -> None:
    """`AutoEncoder.from_pretrained`: decoder rows to norm 1, the norms moved into the encoder."""
    state, _, _ = dictionary_classes()["AutoEncoder"]
    ours = load_sae(write_dictionary(tmp_path, "AutoEncoder", state), d_model=D)
    norms = state["decoder.weight"].norm(dim=0)
    assert norms.max() > 2 * norms.min()
    decoder = state["decoder.weight"] / norms
    encoder, bias = state["encoder.weight"] * norms[:, None], state["encoder.bias"] * norms
    z = ((X - state["bias"]) @ encoder.T + bias).relu()
    torch.testing.assert_close(ours.encode(X), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.W_dec, decoder.T)
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(M))


@pytest.mark.parametrize(
    "k", [torch.tensor(0), torch.tensor(M + 1), torch.tensor(2.5), torch.tensor([5, 5]), torch.nan]
)
def test_dictionary_learning_with_a_k_that_cannot_be(k: Any, tmp_path: Path) -> None:
    state, _, _ = dictionary_classes()["AutoEncoderTopK"]
    folder = write_dictionary(tmp_path, "AutoEncoderTopK", {**state, "k": torch.as_tensor(k)})
    with pytest.raises(UserError, match="damaged: k is"):
        load_sae(folder, d_model=D)
    del state["k"]
    folder = write_dictionary(tmp_path, "AutoEncoderTopK", state, k=True)
    with pytest.raises(UserError, match="damaged: k is True"):
        load_sae(folder, d_model=D)


def test_dictionary_learning_never_calibrated_is_a_relu(tmp_path: Path) -> None:
    state, _, _ = dictionary_classes()["BatchTopKSAE"]
    p = parts()
    z = ((X - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
    x_hat = z @ p["W_dec"] + p["b_dec"]
    state["threshold"] = torch.tensor(-1.0)
    folder = write_dictionary(tmp_path, "BatchTopKSAE", state)
    same(folder, z, x_hat, "blocks.3.hook_resid_post", "dictionary_learning")


def test_dictionary_learning_sites(tmp_path: Path) -> None:
    state = dictionary_classes()["AutoEncoder"][0]

    def site(name: str, **more: Any) -> str:
        folder = write_dictionary(tmp_path / name / "trainer_0", "AutoEncoder", state, **more)
        return load_sae(folder, d_model=D).site

    assert (
        site("run/resid_post_layer_7", submodule_name=None, layer=7) == "blocks.7.hook_resid_post"
    )
    assert site("resid_post_layer_5_checkpoints", submodule_name=None) == "blocks.5.hook_resid_post"
    assert site("a", submodule_name=None) == "blocks.3.hook_resid_post"
    assert site("b", io="in") == "blocks.3.hook_resid_pre"
    for more, said in (
        ({"submodule_name": "mlp_layer3"}, "MLP"),
        ({"submodule_name": "attn_out_layer3"}, "attention"),
        ({"io": "in_and_out"}, "transcoder"),
        ({"submodule_name": None, "layer": None}, "layer"),
    ):
        with pytest.raises(UserError, match=said):
            site("c", **more)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (self.mark.touch, ())


def test_pickles_of_more_than_tensors_are_refused(tmp_path: Path) -> None:
    state = dictionary_classes()["AutoEncoder"][0]
    mark = tmp_path / "mark"
    folder = write_dictionary(tmp_path, "AutoEncoder", {**state, "x": Evil(mark)})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="could run code"):
        load_sae(folder, d_model=D)
    assert not mark.exists()
    torch.load(folder / "ae.pt", weights_only=False)
    assert mark.exists()  # the mark does tell


def test_dictionary_learning_refused(tmp_path: Path) -> None:
    state = dictionary_classes()["AutoEncoder"][0]
    with pytest.raises(UserError, match="CrossCoder"):
        load_sae(write_dictionary(tmp_path, "CrossCoder", state), d_model=D)
    folder = write_dictionary(tmp_path, "GatedAutoEncoder", state)
    with pytest.raises(UserError, match="lack decoder_bias"):
        load_sae(folder, d_model=D)
    write_dictionary(tmp_path, "AutoEncoder", state)
    whole = (folder / "ae.pt").read_bytes()
    for part in (whole[:-200], b"", b"not a file"):
        (folder / "ae.pt").write_bytes(part)
        with pytest.raises(UserError, match=r"damaged|could run code"):
            load_sae(folder, d_model=D)
    write_json(folder / "config.json", {})
    with pytest.raises(UserError, match="no trainer"):
        load_sae(folder, d_model=D)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"lacks config\.json"):
        load_sae(folder, d_model=D)


# ---------------------------------------------------------------------------------- Gemma Scope


def gemma() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    p = parts(threshold=(M,))
    p["threshold"] = p["threshold"].abs()
    z = jump(X @ p["W_enc"] + p["b_enc"], p["threshold"])
    return p, z, z @ p["W_dec"] + p["b_dec"]


def test_gemma_scope(tmp_path: Path) -> None:
    p, z, x_hat = gemma()
    folder = tmp_path / "layer_12" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in p.items()})
    for source in (folder, folder / "params.npz"):
        same(source, z, x_hat, "blocks.12.hook_resid_post", "gemma-scope")


def test_gemma_scope_embedding(tmp_path: Path) -> None:
    """Trained on rows of the embedding; the residual is those times sqrt(d)."""
    p, _, _ = gemma()
    folder = tmp_path / "embedding" / "width_4k" / "average_l0_6"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in p.items()})
    z = jump((X / D**0.5) @ p["W_enc"] + p["b_enc"], p["threshold"])
    x_hat = D**0.5 * (z @ p["W_dec"] + p["b_dec"])
    same(folder, z, x_hat, "blocks.0.hook_resid_pre", "gemma-scope")


def test_gemma_scope_damage(tmp_path: Path) -> None:
    p, _, _ = gemma()
    file = tmp_path / "params.npz"
    np.savez(file, **{name: t.numpy() for name, t in p.items()})
    with pytest.raises(UserError, match="does not say its layer"):
        load_sae(tmp_path, d_model=D)
    (tmp_path / "layer_1").mkdir()
    file = file.rename(tmp_path / "layer_1" / "params.npz")
    whole = file.read_bytes()
    for part in (whole[:-300], whole[:3000], b""):
        file.write_bytes(part)
        with pytest.raises(UserError, match=r"params\.npz .* damaged"):
            load_sae(tmp_path / "layer_1", d_model=D)
    np.savez(file, W_enc=np.array([Evil(tmp_path / "mark")], dtype=object))
    with pytest.raises(UserError, match="damaged"):
        load_sae(tmp_path / "layer_1", d_model=D)
    assert not (tmp_path / "mark").exists()


def write_gemma_2(folder: Path, p: dict[str, Tensor], cfg: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name.lower() if name.startswith("W") else name: t for name, t in p.items()}
    save_file(tensors, folder / "params.safetensors")
    if cfg is not None:
        write_json(folder / "config.json", cfg)
    return folder


def test_gemma_scope_2(tmp_path: Path) -> None:
    p, z, x_hat = gemma()
    cfg = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "l0": 60}
    cfg |= {"hf_hook_point_in": "model.layers.9.output", "type": "sae"}
    folder = write_gemma_2(tmp_path / "resid_post" / "layer_9_width_16k_l0_big", p, cfg)
    same(folder, z, x_hat, "blocks.9.hook_resid_post", "gemma-scope-2")
    assert load_sae(folder, d_model=D).sae.cfg.metadata.model_name == "gemma-3-1b-pt"
    (folder / "config.json").unlink()  # some folders were published without
    same(folder, z, x_hat, "blocks.9.hook_resid_post", "gemma-scope-2")


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({"hf_hook_point_in": "model.layers.9.self_attn.o_proj.input"}, "attention"),
        ({"hf_hook_point_in": "model.layers.9.post_feedforward_layernorm.output"}, "MLP"),
        ({"hf_hook_point_in": "a", "hf_hook_point_out": "b"}, "transcoder"),
        ({"architecture": "matryoshka"}, "matryoshka"),
    ],
)
def test_gemma_scope_2_refused(cfg: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = write_gemma_2(tmp_path / "layer_9_width_16k", gemma()[0], cfg)
    with pytest.raises(UserError, match=said):
        load_sae(folder, d_model=D)


# ---------------------------------------------------------------------------------- Llama Scope

NORM = 6.3
SCALE = D**0.5 / NORM


def write_llama(folder: Path, p: dict[str, Tensor], **more: Any) -> Path:
    """As the checkpoints of fnlp/Llama3_1-8B-Base-LXR-8x lie on the hub."""
    hyper = {
        "d_model": D,
        "d_sae": M,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.4,
        "top_k": K,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": NORM, "out": NORM},
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": False,
        **more,
    }
    write_json(folder / "hyperparams.json", hyper)
    (folder / "checkpoints").mkdir(exist_ok=True)
    tensors = {**linear(p), "decoder.bias": p["b_dec"]}
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, folder / "checkpoints" / "final.safetensors")
    return folder


def half(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16().float() for name, tensor in p.items()}


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("act", ["jumprelu", "topk", "relu"])
def test_llama_scope(act: str, subtract: bool, with_norm: bool, tmp_path: Path) -> None:
    """`SparseAutoEncoder.encode` and `decode` of lm-saes with norm_activation dataset-wise."""
    p = half(parts())
    folder = write_llama(
        tmp_path,
        p,
        act_fn=act,
        apply_decoder_bias_to_pre_encoder=subtract,
        sparsity_include_decoder_norm=with_norm,
    )
    norm = p["W_dec"].norm(dim=1)
    h = (X * SCALE - p["b_dec"] * subtract) @ p["W_enc"] + p["b_enc"]
    score = h * norm if with_norm else h
    mask = {
        "jumprelu": score > 0.4 * SCALE,  # given for raw residuals
        "topk": top(score, K) > 0,
        "relu": score > 0,
    }[act]
    z = h * mask
    x_hat = (z @ p["W_dec"] + p["b_dec"]) / SCALE
    if act == "topk" and with_norm:  # sae-lens counts the decoder's norm into the latent
        z = z * norm
    same(folder, z, x_hat, "blocks.15.hook_resid_post", "llama-scope")


def test_llama_scope_in_raw_units_is_lm_saes_for_inference(tmp_path: Path) -> None:
    """Standardised as lm-saes does for inference, the scalar threshold applies unchanged."""
    p = half(parts())
    ours = load_sae(write_llama(tmp_path, p), d_model=D)
    h = X @ p["W_enc"] + p["b_enc"] / SCALE
    z = h * (h > 0.4)
    torch.testing.assert_close(ours.encode(X), z * SCALE, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ours.decode(ours.encode(X)), z @ p["W_dec"] + p["b_dec"] / SCALE, rtol=1e-4, atol=1e-4
    )


def test_llama_scope_with_norm_and_thresholds_in_the_weights(tmp_path: Path) -> None:
    """As in fnlp/Llama-Scope-R1-Distill."""
    p = parts(log=(M,))
    hook = "blocks.4.hook_resid_post"
    cfg = {"d_model": D, "expansion_factor": 4, "act_fn": "jumprelu", "hook_point_in": hook}
    write_json(tmp_path / "config.json", {**cfg, "norm_activation": "dataset-wise"})
    tensors = {**linear(p), "decoder.bias": p["b_dec"], "log_jumprelu_threshold": p["log"]}
    norms = {f"dataset_average_activation_norm.{hook}": torch.tensor(NORM)}
    save_file({**tensors, **norms}, tmp_path / "sae_weights.safetensors")
    z = jump(X * SCALE @ p["W_enc"] + p["b_enc"], p["log"].exp())
    same(tmp_path, z, (z @ p["W_dec"] + p["b_dec"]) / SCALE, hook, "llama-scope")
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="do not hold"):
        load_sae(tmp_path, d_model=D)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"hook_point_out": "blocks.15.hook_mlp_out"}, "hook_mlp_out"),
        ({"hook_point_in": "blocks.15.hook_attn_out", "hook_point_out": "blocks.15.hook_attn_out"}, "attention"),  # noqa: E501
        ({"use_glu_encoder": True}, "GLU"),
        ({"norm_activation": "token-wise"}, "token-wise"),
        ({"act_fn": "pswish"}, "pswish"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold"),
        ({"d_model": "wide"}, "d_model"),
        ({"act_fn": "topk", "top_k": M + 1}, "k is 41"),
        ({"act_fn": "topk", "top_k": "x"}, "top_k is 'x'"),
    ],
)  # fmt: skip
def test_llama_scope_refused(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_sae(write_llama(tmp_path, parts(), **more), d_model=D)


# ----------------------------------------------------------------------------- single torch files


def test_qwen_scope(tmp_path: Path) -> None:
    p = parts()
    folder = tmp_path / "SAE-Res-Qwen3-8B-Base-W64K-L0_5"
    folder.mkdir()
    turned = {name: t.T.contiguous() if name[0] == "W" else t for name, t in p.items()}
    torch.save(turned, folder / "layer7.sae.pt")
    z = top(X @ p["W_enc"] + p["b_enc"], 5)
    file = folder / "layer7.sae.pt"
    same(file, z, z @ p["W_dec"] + p["b_dec"], "blocks.7.hook_resid_post", "qwen-scope")
    more = folder.rename(tmp_path / f"SAE-Res-Qwen3-8B-Base-W64K-L0_{M + 1}")
    with pytest.raises(UserError, match=f"k is {M + 1}"):
        load_sae(more / "layer7.sae.pt", d_model=D)
    file = (more / "layer7.sae.pt").rename(tmp_path / "layer7.sae.pt")
    with pytest.raises(UserError, match="how many latents"):
        load_sae(file, d_model=D)


@pytest.mark.parametrize("format", ["goodfire", "deepseek-r1"])
def test_other_single_files(format: str, tmp_path: Path) -> None:
    p = parts()
    tensors = {**linear(p), "decoder.bias": p["b_dec"]}
    name = "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    if format == "goodfire":
        name = "Llama-3.1-8B-Instruct-SAE-l19.pth"
        tensors = {key.replace("coder.", "coder_linear."): t for key, t in tensors.items()}
    torch.save(tensors, tmp_path / name)
    z = (X @ p["W_enc"] + p["b_enc"]).relu()
    x_hat = z @ p["W_dec"] + p["b_dec"]
    same(tmp_path / name, z, x_hat, "blocks.19.hook_resid_post", format)


def test_a_torch_file_of_unknown_tensors(tmp_path: Path) -> None:
    torch.save({"weight": X}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"unknown format: model\.pt holds weight"):
        load_sae(tmp_path / "model.pt", d_model=D)
    torch.save([X], tmp_path / "model.pt")
    with pytest.raises(UserError, match="no state dict"):
        load_sae(tmp_path / "model.pt", d_model=D)


# ---------------------------------------------------------------------------- sites, recognition


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.4.hook_resid_post", "blocks.4.hook_resid_post"),
        ("blocks.4.hook_resid_pre", "blocks.4.hook_resid_pre"),
        ("blocks.4.hook_out", "blocks.4.hook_resid_post"),
        ("blocks.4.hook_in", "blocks.4.hook_resid_pre"),
        ("layers.4", "blocks.4.hook_resid_post"),
        ("h.4", "blocks.4.hook_resid_post"),
        ("transformer.h.4", "blocks.4.hook_resid_post"),
        ("gpt_neox.layers.3", "blocks.3.hook_resid_post"),
        ("model.layers.31.output", "blocks.31.hook_resid_post"),
        ("model.layers.31.input", "blocks.31.hook_resid_pre"),
        ("model.language_model.layers.2", "blocks.2.hook_resid_post"),
        ("resid_post_layer_12", "blocks.12.hook_resid_post"),
        ("resid_pre_layer_12", "blocks.12.hook_resid_pre"),
        ("resid_out_layer2", "blocks.2.hook_resid_post"),
        ("hook_embed", "blocks.0.hook_resid_pre"),
        ("embed_tokens", "blocks.0.hook_resid_pre"),
        ("gpt_neox.embed_in", "blocks.0.hook_resid_pre"),
    ],
)
def test_hook_names(hook: str, site: str) -> None:
    assert site_of(hook, "x") == site


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("blocks.4.hook_mlp_out", "reads an MLP"),
        ("blocks.4.attn.hook_z", "attention"),
        ("blocks.4.hook_attn_out", "attention"),
        ("blocks.4.hook_resid_mid", "between"),
        ("layers.4.mlp", "reads an MLP"),
        ("model.layers.4.self_attn.o_proj.input", "attention"),
        ("transcoder/layer_4", "replaces an MLP"),
        ("blocks.4.ln2.hook_normalized", "MLP"),
        ("wte", "not a residual-stream site"),
        ("", "not a residual-stream site"),
        ("blocks.x.hook_resid_post", "not a residual-stream site"),
    ],
)
def test_hooks_that_are_no_residual(hook: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        site_of(hook, "x")


def test_an_unknown_format_lists_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"looked for cfg\.json .*Llama Scope"):
        load_sae(tmp_path, d_model=D)
    with pytest.raises(UserError, match=r"unknown format; known are"):
        load_sae(tmp_path / "weights.bin", d_model=D)


def test_a_folder_of_saes_names_them(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "layers.1", parts())
    write_sparsify(tmp_path / "layers.2", parts())
    with pytest.raises(UserError, match=r"folder of SAEs; name one of them: layers\.1, layers\.2"):
        load_sae(tmp_path, d_model=D)
    with pytest.raises(UserError, match="give the folder"):
        load_sae(tmp_path / "layers.1" / "cfg.json", d_model=D)


def test_weights_that_are_transposed_or_not_finite(tmp_path: Path) -> None:
    folder = write_sparsify(tmp_path / "layers.1", parts())
    weights = load_file(folder / "sae.safetensors")
    save_file({**weights, "W_dec": weights["W_dec"].T.contiguous()}, folder / "sae.safetensors")
    with pytest.raises(UserError, match=r"W_dec is \[12, 40\] .* transposed"):
        load_sae(folder, d_model=D)
    save_file({**weights, "b_dec": torch.full((D,), torch.nan)}, folder / "sae.safetensors")
    with pytest.raises(UserError, match="b_dec is not finite"):
        load_sae(folder, d_model=D)

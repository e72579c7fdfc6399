"""`saes.hub`: what is pushed or pulled is whole, loads in sae-lens, and gives nothing away."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import saes.hub
import saes.sources
from saes.errors import UserError
from saes.files import tree_sha256
from saes.hub import pull, push
from saes.pretrained import load_sae
from saes.registry import find

SITE = "blocks.1.hook_resid_post"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REGISTERED = "gpt2-small-res-jb/blocks.8.hook_resid_pre"


class Recorder:
    """Stands in for `HfApi`: keeps every call, and a copy of what was uploaded under `root`."""

    def __init__(self, root: Path, error: Exception | None = None) -> None:
        self.root, self.error = root, error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", {"repo": repo_id, "private": private, "exist_ok": exist_ok}))
        if self.error is not None:
            raise self.error

    def file_exists(self, repo_id: str, filename: str) -> bool:
        self.calls.append(("exists", {"repo": repo_id, "name": filename}))
        return (self.root / filename).exists()

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        delete_patterns: list[str] | None,
    ) -> None:
        self.calls.append(("upload", {"repo": repo_id, "message": commit_message}))
        held = [p for p in self.root.rglob("*") if p.is_file()]
        for path in filter_repo_objects(
            held, allow_patterns=delete_patterns or [], key=self.in_repo
        ):  # as HfApi chooses them
            if not (Path(folder_path) / self.in_repo(path)).exists():
                path.unlink()
        shutil.copytree(folder_path, self.root, dirs_exist_ok=True)

    def in_repo(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the cache holds of hub repository `me/mine`; the hub itself is off."""
    repo = tmp_path / "cache" / "models--me--mine"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repo / "snapshots" / COMMIT


@pytest.fixture
def folder(tiny_sae_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny SAE with figures beside it, which may be changed."""
    copy = tmp_path / "mine"
    shutil.copytree(tiny_sae_folder, copy)
    record = {"held_out": {"l0": 8.0, "variance_explained": 0.7, "tokens": 999}, "train": {"k": 8}}
    (copy / "quality.json").write_text(json.dumps(record))
    return copy


def change(folder: Path, **metadata: Any) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"].update(metadata)
    (folder / "cfg.json").write_text(json.dumps(cfg))


def latents(path: Path) -> torch.Tensor:
    from sae_lens import SAE

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 32))).float()
    return SAE.load_from_disk(path, dtype="float32").encode(x).detach()


# ------------------------------------------------------------------------------------------- pull


def test_a_folder_of_sae_lens_keeps_its_weights(folder: Path, tmp_path: Path) -> None:
    change(folder, neuronpedia_id="tiny/1-res")
    assert pull(folder, tmp_path / "got") == tmp_path / "got"
    got = tmp_path / "got"
    name = "sae_weights.safetensors"
    assert (got / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(latents(got), latents(folder))
    assert {p.name for p in got.iterdir()} == {name, "cfg.json", "quality.json", "origin.json"}
    origin = json.loads((got / "origin.json").read_text())
    assert origin["source"] == f"{tmp_path.name}/mine"
    assert origin["neuronpedia"] == "tiny/1-res"
    dictionary = load_sae(got, d_model=32)
    assert dictionary.site == SITE
    assert dictionary.origin is not None
    assert dictionary.origin.neuronpedia == "tiny/1-res"
    assert str(tmp_path) not in "".join(p.read_text() for p in got.glob("*.json"))


def test_another_format_is_converted(folder: Path, tmp_path: Path) -> None:
    theirs, got = tmp_path / "layers.1", tmp_path / "got"
    theirs.mkdir()
    w = load_file(folder / "sae_weights.safetensors")
    tensors = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    save_file(tensors, theirs / "sae.safetensors")
    cfg = {"d_in": 32, "num_latents": 128, "k": 8, "expansion_factor": 4, "hookpoint": "layers.1"}
    (theirs / "cfg.json").write_text(json.dumps(cfg))
    pull(theirs, got)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    expected, found = (load_sae(path, d_model=32).encode(x) for path in (theirs, got))
    assert torch.equal(found, expected)
    from sae_lens import SAE

    plain = SAE.load_from_disk(got)
    assert plain.cfg.metadata.hook_name == SITE
    torch.testing.assert_close(plain.encode(x), expected)
    assert json.loads((got / "origin.json").read_text())["format"] == "sparsify"
    again = pull(got, tmp_path / "again")  # where it came from first is not forgotten
    assert json.loads((again / "origin.json").read_text())["format"] == "sparsify"


def test_a_registered_sae_keeps_its_neuronpedia_id(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = find(REGISTERED)
    assert listed is not None
    assert listed.neuronpedia == "gpt2-small/8-res-jb"
    found = saes.sources.Source(REGISTERED, REGISTERED, folder, "a/b", listed, COMMIT)
    monkeypatch.setattr(saes.hub, "resolve", lambda _: found)
    got = pull(REGISTERED, tmp_path / "got")
    monkeypatch.undo()
    assert json.loads((got / "origin.json").read_text()) == {
        "source": REGISTERED,
        "format": "sae-lens",
        "release": "gpt2-small-res-jb",
        "sae_id": "blocks.8.hook_resid_pre",
        "neuronpedia": "gpt2-small/8-res-jb",
        "revision": COMMIT,
    }
    origin = load_sae(got, d_model=32).origin
    assert origin is not None
    assert origin.neuronpedia == "gpt2-small/8-res-jb"
    push(got, tmp_path / "pushed")
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "https://www.neuronpedia.org/gpt2-small/8-res-jb" in card


def test_the_same_again_changes_nothing(folder: Path, tmp_path: Path) -> None:
    got = pull(folder, tmp_path / "got")
    before = [(p.name, p.stat().st_mtime_ns) for p in sorted(got.iterdir())]
    pull(folder, got)
    assert [(p.name, p.stat().st_mtime_ns) for p in sorted(got.iterdir())] == before


def test_another_sae_is_replaced_only_when_forced(
    folder: Path, tiny_sae_folders: dict[str, Path], tmp_path: Path
) -> None:
    other = tiny_sae_folders["blocks.2.hook_resid_post"]
    got = pull(other, tmp_path / "got")
    before = tree_sha256(got)
    with pytest.raises(UserError, match=r"holds something else; .*--force"):
        pull(folder, got)
    assert tree_sha256(got) == before
    pull(folder, got, force=True)
    assert torch.equal(latents(got), latents(folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["got", "mine"]


def test_a_folder_with_other_files_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.tex\)"):
        pull(folder, tmp_path / "home", force=True)
    with pytest.raises(UserError, match="is a file"):
        pull(folder, folder / "cfg.json", force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_an_interruption_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saes.hub, "_beside", stop)
        with pytest.raises(KeyboardInterrupt):
            pull(folder, tmp_path / "got")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    (tmp_path / ".got.part").mkdir()  # a SIGKILL leaves this
    (tmp_path / ".got.part" / "half").write_text("")
    pull(folder, tmp_path / "got")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["got", "mine"]
    assert not (tmp_path / "got" / "half").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "sae_weights.safetensors").unlink(), "lacks sae_weights.safetensors"),
        (lambda f: (f / "sae_weights.safetensors").write_bytes(b"x" * 99), "damaged"),
        (lambda f: (f / "cfg.json").write_text("{"), "damaged"),
    ],
)
def test_an_sae_that_does_not_load_is_refused(
    folder: Path, tmp_path: Path, damage: Any, words: str
) -> None:
    damage(folder)
    api = Recorder(tmp_path / "repo")
    with pytest.raises(UserError, match=words):
        pull(folder, tmp_path / "got")
    with pytest.raises(UserError, match=words):
        push(folder, "me/mine", api=api)
    assert api.calls == []
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# ------------------------------------------------------------------------------------------- push


def test_push_to_the_hub_and_load_it_from_there(folder: Path, cached: Path) -> None:
    from sae_lens import SAE

    api = Recorder(cached)
    folder = folder.rename(folder.with_name(SITE))
    assert push(folder, "me/mine", licence="apache-2.0", api=api) == f"me/mine/{SITE}"
    assert api.calls == [
        ("exists", {"repo": "me/mine", "name": f"{SITE}/cfg.json"}),
        ("create", {"repo": "me/mine", "private": True, "exist_ok": True}),
        ("exists", {"repo": "me/mine", "name": "README.md"}),
        ("upload", {"repo": "me/mine", "message": f"SAE {SITE}"}),
    ]
    plain = SAE.from_pretrained("me/mine", SITE)
    expected = latents(folder)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 32))).float()
    assert torch.equal(plain.encode(x).detach(), expected)
    ours = load_sae(f"me/mine/{SITE}", d_model=32)
    assert torch.equal(ours.encode(x), expected)
    assert (cached / "README.md").read_text().count("me/mine") == 1
    assert 'SAE.from_pretrained("me/mine", "' + SITE in (cached / SITE / "README.md").read_text()


def test_the_card_of_the_repository_is_written_once(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "repo"
    root.mkdir()
    (root / "README.md").write_text("their own words")
    place = push(folder, "me/mine/deep/er", public=True, api=(api := Recorder(root)))
    assert place == "me/mine/deep/er"
    assert api.calls[1][1]["private"] is False
    assert (root / "README.md").read_text() == "their own words"
    assert (root / "deep" / "er" / "cfg.json").exists()


def test_an_sae_of_the_repository_is_replaced_only_when_forced(
    folder: Path, tmp_path: Path
) -> None:
    api = Recorder(tmp_path / "repo")
    assert push(folder, "me/mine", api=api) == f"me/mine/{SITE}/mine"
    with pytest.raises(UserError, match=f"me/mine/{SITE}/mine holds an SAE"):
        push(folder, "me/mine", api=api)
    assert push(folder, "me/mine/other", api=api) == "me/mine/other"
    assert len([c for c in api.calls if c[0] == "upload"]) == 2
    push(folder, "me/mine", api=api, force=True)
    assert len([c for c in api.calls if c[0] == "upload"]) == 3


def test_nothing_of_a_replaced_sae_stays(
    folder: Path, tiny_sae_folders: dict[str, Path], tmp_path: Path
) -> None:
    api = Recorder(tmp_path / "repo")
    (folder / "training.json").write_text(json.dumps({"train": {"k": 8}}))
    for place in ("me/mine/sae", "me/mine/beside"):
        push(folder, place, api=api)
    (api.root / "sae" / "notes.txt").write_text("somebody's own")
    other = tiny_sae_folders["blocks.2.hook_resid_post"]
    push(other, "me/mine/sae", api=api, force=True)
    left = {path.name for path in (api.root / "sae").iterdir()}
    mine = {"cfg.json", "sae_weights.safetensors", "origin.json", "README.md"}
    assert left == {*mine, "notes.txt"}
    assert json.loads((api.root / "sae" / "cfg.json").read_text())["metadata"]["hook_name"] == (
        "blocks.2.hook_resid_post"
    )
    assert (api.root / "beside" / "quality.json").exists()
    assert (api.root / "README.md").exists()


def test_the_protocol_is_that_of_the_hub() -> None:
    for name in ("create_repo", "file_exists", "upload_folder"):
        theirs = inspect.signature(getattr(HfApi, name)).parameters
        assert set(inspect.signature(getattr(saes.hub.Api, name)).parameters) <= set(theirs)


def test_no_repository_is_made_for_an_sae_that_is_there(folder: Path, tmp_path: Path) -> None:
    api = Recorder(tmp_path / "repo")
    push(folder, "me/mine", api=api)
    api.calls.clear()
    with pytest.raises(UserError, match="holds an SAE"):
        push(folder, "me/mine", api=api)
    assert [name for name, _ in api.calls] == ["exists"]


@pytest.mark.parametrize("destination", ["me", "me/mine/..", "a b/c", "me//x", "hf://me/mine", ""])
def test_destinations_that_are_none(folder: Path, tmp_path: Path, destination: str) -> None:
    api = Recorder(tmp_path / "repo")
    with pytest.raises(UserError, match=r"OWNER/NAME"):
        push(folder, destination, api=api)
    assert api.calls == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalTokenNotFoundError("Token is required, but no token found"), "hf auth login"),
        (OSError("403 Forbidden: you may not\nsecond line"), "403 Forbidden: you may not; check"),
        (ConnectionError("offline mode is enabled"), "offline mode is enabled"),
        (httpx.ConnectError("[Errno -2] Name or service not known"), "service not known; check"),
        (httpx.ReadTimeout("The read operation timed out"), "timed out; check"),
    ],
)
def test_a_hub_that_refuses(folder: Path, tmp_path: Path, error: Exception, words: str) -> None:
    assert issubclass(RepositoryNotFoundError, OSError)  # as all of the hub's errors
    with pytest.raises(UserError, match=words):
        push(folder, "me/mine", api=Recorder(tmp_path / "repo", error))


def test_push_to_a_folder(folder: Path, tmp_path: Path) -> None:
    place = push(folder, str(tmp_path / "there"), licence="cc-by-4.0")
    assert place == str(tmp_path / "there")
    assert torch.equal(latents(tmp_path / "there"), latents(folder))
    assert "license: cc-by-4.0" in (tmp_path / "there" / "README.md").read_text()
    push(folder, place, licence="cc-by-4.0")
    with pytest.raises(UserError, match="--force"):
        push(folder, place, licence="mit")
    push(folder, place, licence="mit", force=True)
    assert "license: mit" in (tmp_path / "there" / "README.md").read_text()


def test_figures_of_the_run_that_trained_it_go_along(folder: Path, tmp_path: Path) -> None:
    (folder / "quality.json").unlink()
    mine = tmp_path / "run" / "saes" / "topk" / SITE
    shutil.copytree(folder, mine)
    (tmp_path / "run" / "quality").mkdir()
    figures = {f"topk/{SITE}": {"l0": 8.0, "variance_explained": 0.678}, "other": {"l0": 1.0}}
    (tmp_path / "run" / "quality" / "quality.json").write_text(json.dumps(figures))
    push(mine, tmp_path / "there")
    record = json.loads((tmp_path / "there" / "quality.json").read_text())
    assert record == {"held_out": {"l0": 8.0, "variance_explained": 0.678}}
    assert "0.678" in (tmp_path / "there" / "README.md").read_text()


@pytest.mark.parametrize("place", ["/home/me/llama", "~/llama", "C:\\models\\llama"])
def test_paths_of_a_machine_are_not_published(folder: Path, tmp_path: Path, place: str) -> None:
    change(folder, training={"paths": ["fine", place]})
    api = Recorder(tmp_path / "repo")
    for destination in ("me/mine", tmp_path / "there"):
        with pytest.raises(UserError, match=r"cfg\.json of the SAE names a path"):
            push(folder, destination, api=api)
    assert api.calls == []
    assert not (tmp_path / "there").exists()
    pull(folder, tmp_path / "kept")  # what stays on this machine may name it


SECRET = "hf_" + "aB3" * 8


@pytest.mark.parametrize(
    "place",
    [
        "see /home/me/x",
        "model=/mnt/llama",
        "['/data/llama']",
        "file:///home/me/x",
        "from file:///etc/x",
        "\\\\server\\share",
        "at \\\\server\\share",
        "$HOME/x",
        "in ${HOME}/x",
        "%USERPROFILE%\\x",
        "C:/models",
        "~me/llama",
        "/etc/llama",
    ],
)
@pytest.mark.parametrize("where", ["value", "key"])
def test_paths_inside_strings_and_keys(
    folder: Path, tmp_path: Path, place: str, where: str
) -> None:
    change(folder, notes=[{"fine": place} if where == "value" else {place: 1}])
    with pytest.raises(UserError, match=r"cfg\.json of the SAE names a path"):
        push(folder, tmp_path / "there")


@pytest.mark.parametrize("where", ["cfg.json", "quality.json", "sae_weights.safetensors"])
@pytest.mark.parametrize(
    ("text", "words"), [(f"token: {SECRET}", "holds an access token"), ("/home/me", "names a path")]
)
def test_tokens_and_paths_in_any_file(
    folder: Path, tmp_path: Path, where: str, text: str, words: str
) -> None:
    if where == "sae_weights.safetensors":
        weights = load_file(folder / where)
        save_file(weights, folder / where, metadata={"made with": text})
    elif where == "cfg.json":
        change(folder, notes=text)
    else:
        (folder / where).write_text(json.dumps({"about": {"text": text}}))
    with pytest.raises(UserError, match=words) as refused:
        push(folder, tmp_path / "there")
    assert where in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/datasets/me/data",
        "hf://datasets/home/me/x",
        "gemma-scope-2b-pt-res/layer_12/width_16k",
        "layer_5/home/x",
        "either/or, and 1 / 2 of \\alpha",
        "hf_transfer",
        "gpt2-small/8-res-jb",
        "10:30 ~ 5 tokens",
    ],
)
def test_what_only_looks_like_a_path(folder: Path, tmp_path: Path, text: str) -> None:
    change(folder, notes=text)
    push(folder, tmp_path / "there")


# ----------------------------------------------------------------------------------- on the disk


def test_files_are_on_the_disk_before_they_have_their_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    there: list[bool] = []

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        there.append((tmp_path / "got").exists())

    monkeypatch.setattr("os.fsync", fsync)
    pull(folder, tmp_path / "got")
    before = {name for name, late in zip(synced, there, strict=True) if not late}
    assert {path.name for path in (tmp_path / "got").iterdir()} <= before
    assert synced[-1] == tmp_path.name


@pytest.mark.parametrize("overrides", [{"dataset_path": "me/text", "model_name": "me/lm"}, {}])
def test_settings_of_the_registry_that_only_describe_keep_the_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, str]
) -> None:
    listed = find(REGISTERED)
    assert listed is not None
    listed = listed._replace(overrides=overrides)
    weights = load_file(folder / "sae_weights.safetensors")
    half = {name: w.to(torch.bfloat16) for name, w in weights.items()}  # conversion would widen it
    save_file(half, folder / "sae_weights.safetensors")
    found = saes.sources.Source(REGISTERED, REGISTERED, folder, "a/b", listed, COMMIT)
    monkeypatch.setattr(saes.hub, "resolve", lambda _: found)
    got = pull(REGISTERED, tmp_path / "got")
    name = "sae_weights.safetensors"
    assert (got / name).read_bytes() == (folder / name).read_bytes()
    about = json.loads((got / "cfg.json").read_text())["metadata"]
    assert overrides.items() <= about.items()


def test_a_setting_of_the_registry_that_changes_weights_converts_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = find(REGISTERED)
    assert listed is not None
    listed = listed._replace(
        overrides={"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    )
    found = saes.sources.Source(REGISTERED, REGISTERED, folder, "a/b", listed, COMMIT)
    monkeypatch.setattr(saes.hub, "resolve", lambda _: found)
    got = pull(REGISTERED, tmp_path / "got")
    name = "sae_weights.safetensors"
    assert (got / name).read_bytes() != (folder / name).read_bytes()

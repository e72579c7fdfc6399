"""`saes.subject`: model and SAEs of a run, checked against each other, and what identifies them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from saes.errors import UserError
from saes.files import tree_sha256
from saes.subject import SubjectConfig, fingerprint, fingerprints, load_model, load_subject

DEMO = "packaged/demo_saes/blocks.3.hook_resid_post"


def test_the_packaged_subject_passes_its_check() -> None:
    subject = load_subject(SubjectConfig("packaged/demo_lm", (DEMO,), threads=1))
    assert [d.site for d in subject.dictionaries] == ["blocks.3.hook_resid_post"]
    assert subject.dictionary("blocks.3.hook_resid_post").d_sae == 4096


def test_random_saes_need_trust(tiny_lm_folder: Path, tiny_sae_folders: dict[str, Path]) -> None:
    saes = tuple(str(folder) for folder in tiny_sae_folders.values())
    with pytest.raises(UserError, match=r"no simple cause found.*subject\.trust: true"):
        load_subject(SubjectConfig(str(tiny_lm_folder), saes, threads=1))
    trusted = load_subject(SubjectConfig(str(tiny_lm_folder), saes, trust=True, threads=1))
    assert [d.site for d in trusted.dictionaries] == list(tiny_sae_folders)


def test_two_saes_at_one_site(tiny_lm_folder: Path, tiny_sae_folder: Path, tmp_path: Path) -> None:
    again = shutil.copytree(tiny_sae_folder, tmp_path / "again")
    saes = (str(tiny_sae_folder), str(again))
    with pytest.raises(UserError, match=r"two SAEs sit at blocks\.1\.hook_resid_post"):
        load_subject(SubjectConfig(str(tiny_lm_folder), saes, trust=True, threads=1))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="name at least one SAE"):
        SubjectConfig("packaged/demo_lm", ())
    with pytest.raises(ValueError, match="threads must be at least 1"):
        SubjectConfig("packaged/demo_lm", (DEMO,), threads=0)


def test_an_unknown_device() -> None:
    with pytest.raises(UserError, match="device 'abacus' cannot be used"):
        load_subject(SubjectConfig("packaged/demo_lm", (DEMO,), device="abacus"))


def test_fingerprints(tiny_lm_folder: Path, tiny_sae_folder: Path, tmp_path: Path) -> None:
    sae = shutil.copytree(tiny_sae_folder, tmp_path / "sae")
    config = SubjectConfig(str(tiny_lm_folder), (str(sae),))
    before = fingerprints(config)
    assert before == {
        str(tiny_lm_folder): tree_sha256(tiny_lm_folder),
        str(sae): tree_sha256(tiny_sae_folder),
    }
    (sae / "cfg.json").write_text("{}")
    after = fingerprints(config)
    assert after[str(sae)] != before[str(sae)]
    assert after[str(tiny_lm_folder)] == before[str(tiny_lm_folder)]
    assert fingerprint("EleutherAI/pythia-70m") == "hub:EleutherAI/pythia-70m"
    with pytest.raises(UserError, match="nowhere"):
        fingerprints(SubjectConfig(str(tiny_lm_folder), (str(tmp_path / "nowhere"),)))


COMMITS = ("0" * 40, "1" * 40)


@pytest.fixture
def cached(tiny_lm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of hub model `me/tiny` with two commits, the first of which is main."""
    repo = tmp_path / "cache" / "models--me--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMITS[0])
    (repo / "refs" / "v2").write_text(COMMITS[1])
    for commit in COMMITS:
        shutil.copytree(tiny_lm_folder, repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return repo


def test_a_hub_model_is_known_by_its_commit(cached: Path) -> None:
    assert fingerprint("me/tiny") == f"hub:me/tiny@{COMMITS[0]}"
    assert fingerprint("me/tiny", "v2") == f"hub:me/tiny@{COMMITS[1]}"
    assert fingerprint("me/tiny", COMMITS[1]) == f"hub:me/tiny@{COMMITS[1]}"
    assert fingerprint("me/tiny", "v3") == "hub:me/tiny@v3"  # not in the cache, and the hub is off
    config = SubjectConfig("me/tiny", (DEMO,), revision="v2")
    assert fingerprints(config)["me/tiny"].endswith(COMMITS[1])
    (cached / "refs" / "main").write_text(COMMITS[1])
    assert fingerprint("me/tiny") == f"hub:me/tiny@{COMMITS[1]}"


def test_a_model_that_is_not_cached_is_asked_for_before_anything_is_computed(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the start that downloads it would know it by another name than the next."""
    whole = cached.rename(cached.with_name("whole"))
    asked: list[tuple[str, str, str | None]] = []

    def download(repo: str, file: str, *, revision: str | None) -> str:
        asked.append((repo, file, revision))
        whole.rename(cached)
        return str(cached / "snapshots" / COMMITS[0] / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    first = fingerprint("me/tiny")
    assert asked == [("me/tiny", "config.json", None)]
    assert fingerprint("me/tiny") == first == f"hub:me/tiny@{COMMITS[0]}"
    assert len(asked) == 1


def test_what_is_loaded_is_the_commit_of_the_fingerprint(cached: Path) -> None:
    shutil.rmtree(cached / "snapshots" / COMMITS[0])
    shutil.copytree(cached / "snapshots" / COMMITS[1], cached / "snapshots" / COMMITS[0])
    (cached / "snapshots" / COMMITS[0] / "model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=f"me/tiny at revision {COMMITS[0]}"):
        load_model("me/tiny")
    assert load_model("me/tiny", revision="v2").name == "me/tiny"
    with pytest.raises(UserError, match="revision v3"):
        load_model("me/tiny", revision="v3")


def test_how_the_model_is_loaded(tiny_lm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def load_lm(_name: str, **options: object) -> None:
        given.update(options)
        raise UserError("far enough")

    monkeypatch.setattr("saes.lm.model.load_lm", load_lm)
    config = SubjectConfig(str(tiny_lm_folder), (DEMO,), quantize="4bit", device_map="auto")
    with pytest.raises(UserError, match="far enough"):
        load_subject(config)
    assert given == {
        "device": None,
        "dtype": "float32",
        "quantize": "4bit",
        "device_map": "auto",
        "revision": None,
    }
    monkeypatch.undo()
    with pytest.raises(UserError, match="is a folder and has no revision 'v1'"):
        load_subject(SubjectConfig(str(tiny_lm_folder), (DEMO,), revision="v1", threads=1))


def test_torch_is_not_imported_to_recognise_a_subject() -> None:
    code = (
        "import sys; from saes.subject import SubjectConfig, fingerprints;"
        f"assert fingerprints(SubjectConfig('packaged/demo_lm', ('{DEMO}',)));"
        "assert not {'torch', 'sae_lens', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])

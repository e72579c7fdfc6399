"""`saes.commands`: the sub-commands of `emotion-atlas saes`, as they are typed."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from saes.commands import add_parsers, dispatch
from saes.errors import UserError
from saes.registry import list_saes

SITE = "blocks.5.hook_resid_post"
DEMO = f"packaged/demo_saes/{SITE}"
LM = "packaged/demo_lm"
TEXT = (
    "The river came up in the night, and by morning the lower road was gone. Old Marten said that "
    "he had seen worse, but nobody could remember when. They carried the sheep across two at a "
    "time, and the children held the lantern, though it was already light. "
)
Command = Callable[..., str]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="emotion-atlas")
    add_parsers(top.add_subparsers(dest="command", required=True))
    return top


@pytest.fixture
def saes(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `emotion-atlas saes ...` and return what it prints."""

    def run(*words: str | Path) -> str:
        capsys.readouterr()
        dispatch(parser().parse_args(["saes", *map(str, words)]))
        return capsys.readouterr().out

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "flood.txt"
    path.write_text(TEXT * 4)
    return path


def cells(table: str) -> list[list[str]]:
    """The rows of a Markdown table in some output, head first."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [rows[0], *rows[2:]]


def test_the_commands_of_the_page_on_saes_are_understood() -> None:
    page = (Path(__file__).parents[1] / "docs" / "saes.md").read_text()
    lines = re.findall(r"^    emotion-atlas (saes .*)$", page, re.M)
    actions = [parser().parse_args(shlex.split(line)).action for line in lines]
    assert set(actions) == {"list", "check", "quality", "push", "pull"}


# -------------------------------------------------------------------------------------------- list


def test_help_and_list_need_no_torch() -> None:
    code = (
        "import argparse, sys\n"
        "from saes.commands import add_parsers, dispatch\n"
        "parser = argparse.ArgumentParser()\n"
        "add_parsers(parser.add_subparsers(dest='command'))\n"
        "dispatch(parser.parse_args(['saes', 'list', '--model', 'gpt2']))\n"
        "heavy = {'torch', 'sae_lens', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gpt2-small-res-jb" in done.stdout


def test_the_models_of_the_registry(saes: Command) -> None:
    out = saes("list")
    head, *rows = cells(out)
    assert head == ["model", "releases", "SAEs", "of the residual stream"]
    listed = list_saes()
    assert sum(int(row[2].replace(",", "")) for row in rows) == len(listed)
    assert {row[0] for row in rows} == {sae.model for sae in listed}
    assert f"{len(listed):,} SAEs in {len({sae.release for sae in listed})} releases" in out
    assert "saes list --model NAME" in out


def test_the_saes_of_a_model(saes: Command) -> None:
    out = saes("list", "--model", "gpt2", "--site", "blocks.8.hook_resid_pre")
    head, *rows = cells(out)
    assert head == ["SAE", "site", "latents", "L0", "VE", "Neuronpedia"]
    usable = [s for s in list_saes("gpt2") if s.site == "blocks.8.hook_resid_pre" and s.loadable]
    assert sorted(row[0] for row in rows) == sorted(sae.source for sae in usable)
    row = next(row for row in rows if row[0] == "gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert row[1:] == ["blocks.8.hook_resid_pre", "?", "60", "0.900", "gpt2-small/8-res-jb"]
    assert "24,576" in [row[2] for row in rows]
    assert f"{len(rows):,} SAEs of the residual stream" in out


def test_sites_are_in_order_of_depth_and_json_has_all(saes: Command) -> None:
    rows = cells(saes("list", "--model", "gpt2"))[1:]
    jb = [row[1] for row in rows if row[0].startswith("gpt2-small-res-jb/")]
    assert jb[:11] == [f"blocks.{i}.hook_resid_pre" for i in range(11)]
    everything = json.loads(saes("list", "--model", "gpt2", "--json"))
    assert len(everything) == len(list_saes("gpt2"))
    assert sum(row["loadable"] for row in everything) == len(rows)


def test_a_site_of_all_models(saes: Command) -> None:
    head, *rows = cells(saes("list", "--site", "blocks.20.hook_resid_post"))
    assert head[1] == "model"
    assert len({row[1] for row in rows}) > 3
    assert {row[2] for row in rows} == {"blocks.20.hook_resid_post"}


def test_models_without_saes_of_the_residual_stream(saes: Command) -> None:
    assert "None of these 36 SAEs reads the residual stream" in saes("list", "--model", "qwen3-4b")
    with pytest.raises(UserError, match="some at no site"):
        saes("list", "--model", "qwen3-4b", "--site", SITE)
    with pytest.raises(UserError, match=r"no SAE at 'blocks\.99'; there are some at blocks\.0\."):
        saes("list", "--model", "gpt2", "--site", "blocks.99")
    with pytest.raises(UserError, match="no released SAE for model 'gpt-5'"):
        saes("list", "--model", "gpt-5")


# ------------------------------------------------------------------------------------------- check


def test_check_an_sae_that_fits(saes: Command) -> None:
    out = saes("check", DEMO, "--model", LM)
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert lines["SAE"] == DEMO
    assert lines["site"] == SITE
    assert float(lines["variance explained"].split()[0]) > 0.8
    assert lines["L0"].startswith("32.0")
    assert lines["verdict"] == "fits"
    assert "probable cause" not in lines


def test_check_an_sae_at_the_wrong_site(
    saes: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from saes.files import locate

    shutil.copytree(locate(DEMO), tmp_path / "moved")
    cfg = json.loads((tmp_path / "moved" / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "blocks.0.hook_resid_post"
    (tmp_path / "moved" / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(UserError, match=r"Probable cause: other site .*--trust"):
        saes("check", tmp_path / "moved", "--model", LM)
    printed = capsys.readouterr().out
    assert re.search(r"^verdict +does not fit$", printed, re.M)
    assert re.search(r"^probable cause +other site \(at blocks\.5\.", printed, re.M)
    tried = cells(printed)
    assert tried[0] == ["tried", "how", "VE", "L0"]
    assert "transposed decoder" in [row[0] for row in tried]
    assert "does not fit" in saes("check", tmp_path / "moved", "--model", LM, "--trust")


def test_a_name_that_means_nothing_costs_no_model(saes: Command) -> None:
    for action in (("check",), ("quality", "--text", "x.txt")):
        with pytest.raises(UserError, match="no SAE nonsense"):
            saes(*action, "nonsense", "--model", "no/model")


# ----------------------------------------------------------------------------------------- quality


def test_quality_of_the_packaged_saes(saes: Command, text: Path, tmp_path: Path) -> None:
    other = "packaged/demo_saes/blocks.3.hook_resid_post"
    file = tmp_path / "figures.json"
    out = saes(
        "quality", DEMO, other, "--model", LM, "--text", text,
        "--rows", "4", "--context", "32", "--json", file,
    )  # fmt: skip
    assert out.startswith("Held-out text: flood.txt")
    assert str(tmp_path) not in out
    first, second = out.split("\n\n")[1:3]
    assert [row[0] for row in cells(first)] == ["SAE", DEMO, other]
    assert cells(second)[1][-1] == "4"
    record = json.loads(file.read_text())
    assert (record["model"], record["context"]) == (LM, 32)
    assert list(record["saes"]) == [DEMO, other]
    figures = record["saes"][DEMO]["held_out"]
    assert (figures["l0"], figures["rows"], figures["tokens"]) == (32, 4, 4 * 31)
    assert cells(first)[1][2].startswith(f"{figures['variance_explained']:.3f} ± ")
    assert 0.5 < figures["recovered_zero"] < 1.2


def test_quality_on_the_tokens_of_a_training_run(
    saes: Command, tiny_lm_folder: Path, tiny_sae_folder: Path, tmp_path: Path
) -> None:
    from saes.lm.model import load_lm
    from saes.lm.tokens import pad
    from saes.pretrained import load_sae
    from saes.quality import quality
    from saes.text.prepare import TextConfig, write_tokens

    for i in range(6):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i}.txt").write_text(TEXT[i:] * 3)
    lm = load_lm(tiny_lm_folder)
    config = TextConfig(str(tmp_path / "texts"), tokens=300, held_out_tokens=100, context=16)
    tokens = write_tokens(tmp_path / "tokens", lm, config)
    words = ("quality", tiny_sae_folder, "--model", tiny_lm_folder, "--text", tmp_path / "tokens")
    file = tmp_path / "figures.json"
    with pytest.raises(UserError, match="--trust"):  # its weights are random
        saes(*words)
    out = saes(*words, "--rows", "5", "--trust", "--json", file)
    spread = np.linspace(0, len(tokens.held_out) - 1, 5).astype(int)
    assert len(tokens.held_out) > 5
    rows = np.concatenate([np.full((5, 1), 1), tokens.held_out[spread]], axis=1)
    expected = quality(lm, load_sae(tiny_sae_folder, d_model=32), rows)
    (found,) = json.loads(file.read_text())["saes"].values()
    found = found["held_out"]
    assert found == pytest.approx(expected._asdict())
    assert int(pad(lm, rows).content.sum()) == found["tokens"]
    assert tiny_sae_folder.name in out
    with pytest.raises(UserError, match="have 16 tokens; leave out --context"):
        saes(*words, "--trust", "--context", "32")
    # another vocabulary, the same BOS, and ids that fit
    other = shutil.copytree(tiny_lm_folder, tmp_path / "other_lm")
    tree = json.loads((other / "tokenizer.json").read_text())
    vocab = tree["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tree))
    assert load_lm(other).tokenizer.bos_token_id == lm.tokenizer.bos_token_id
    words = ("quality", tiny_sae_folder, "--model", other, "--text", tmp_path / "tokens")
    with pytest.raises(UserError, match="written with another tokenizer than that of other_lm"):
        saes(*words, "--trust")


def test_names_of_saes_are_no_paths_of_this_machine(
    saes: Command, tiny_lm_folder: Path, tiny_sae_folder: Path, text: Path, tmp_path: Path
) -> None:
    mine = [shutil.copytree(tiny_sae_folder, tmp_path / run / "saes" / "a") for run in "xy"]
    file = tmp_path / "figures.json"
    out = saes(
        "quality", *mine, "--model", tiny_lm_folder, "--text", text,
        "--rows", "2", "--context", "16", "--trust", "--json", file,
    )  # fmt: skip
    assert [row[0] for row in cells(out.split("\n\n")[1])] == ["SAE", "saes/a", "saes/a (2)"]
    assert list(json.loads(file.read_text())["saes"]) == ["saes/a", "saes/a (2)"]
    assert str(tmp_path) not in out + file.read_text()


def test_an_sae_given_twice(saes: Command, text: Path, tmp_path: Path) -> None:
    from saes.files import locate

    (tmp_path / "link").symlink_to(locate(DEMO))
    for again in (DEMO, locate(DEMO), tmp_path / "link"):
        with pytest.raises(UserError, match=rf"is given twice \(also as {DEMO}\)"):
            saes("quality", DEMO, again, "--model", "no/model", "--text", text)


def test_how_the_model_is_loaded(saes: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def load_lm(_name: str, **options: object) -> None:
        given.update(options)
        raise UserError("far enough")

    monkeypatch.setattr("saes.lm.model.load_lm", load_lm)
    options = ("--quantize", "4bit", "--device-map", "auto", "--dtype", "bfloat16")
    for words in (("check",), ("quality", "--text", "x.txt")):
        given.clear()
        with pytest.raises(UserError, match="far enough"):
            saes(*words, DEMO, "--model", "me/lm", *options, "--revision", "v1")
        assert given == {
            "device": None,
            "dtype": "bfloat16",
            "quantize": "4bit",
            "device_map": "auto",
            "revision": "v1",
        }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rows", "0"), "--rows 0"),
        (("--context", "1"), "--context 1: a row is"),
        (("--json", "/no/such/folder/x.json"), "no folder /no/such/folder"),
        (("--json", "/tmp", "--model", "no/model"), "--json /tmp is a folder"),
        (("--json", "/proc/x.json", "--model", "no/model"), "--json /proc/x.json cannot be"),
        (("--rows", "4000"), "fewer tokens"),
    ],
)
def test_quality_refuses(saes: Command, text: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        saes("quality", DEMO, "--model", LM, "--text", text, *words)


# -------------------------------------------------------------------------------------- push, pull


def test_pull_push_and_check_again(saes: Command, tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    assert f"is now in {mine}" in saes("pull", DEMO, mine)
    assert f"is now {theirs}" in saes("push", mine, theirs, "--licence", "apache-2.0")
    assert "license: apache-2.0" in (theirs / "README.md").read_text()
    assert "verdict             fits" in saes("check", theirs, "--model", LM)
    with pytest.raises(UserError, match="--force"):
        saes("pull", "packaged/demo_saes/blocks.3.hook_resid_post", mine)
    saes("pull", "packaged/demo_saes/blocks.3.hook_resid_post", mine, "--force")
    assert "blocks.3" in (mine / "cfg.json").read_text()


def test_push_to_a_hub_that_is_off(saes: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot push to me/mine"):
        saes("push", DEMO, "me/mine")

"""`saes.card`: what a card says, and that nothing in an SAE's files can change its form."""

import ast
import json
from pathlib import Path
from typing import Any

import yaml

from saes.card import card, plain
from saes.files import locate
from saes.quality import Quality


def write(folder: Path, cfg: dict[str, Any], **files: Any) -> Path:
    folder.mkdir()
    for name, tree in {"cfg": cfg, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    return folder


def cfg(**metadata: Any) -> dict[str, Any]:
    about = {"hook_name": "blocks.5.hook_resid_post", **metadata}
    return {"architecture": "topk", "d_in": 256, "d_sae": 4096, "k": 32, "metadata": about}


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_of_the_packaged_sae() -> None:
    folder = locate("packaged/demo_saes/blocks.5.hook_resid_post")
    text = card(folder, place="here", repo=None, licence="apache-2.0")
    assert front(text)["license"] == "apache-2.0"
    assert "base_model" not in front(text)  # packaged/ is no owner on the hub
    for words in (
        "| site | `blocks.5.hook_resid_post` |",
        "| latents | 4,096 |",
        "| BOS in front | yes |",
        "| training tokens | 3,999,744 |",
        "dead_tokens: 200000",
        'SAE.load_from_disk("here", dtype="float32")',
        'load_checked("here", load_lm("packaged/demo_lm"))',
    ):
        assert words in text
    rows = [line for line in text.splitlines() if line.startswith("| blocks.5")]
    assert "0.904" in rows[0]
    assert "101,974" in rows[1]


def test_figures_that_are_complete_have_their_errors(tmp_path: Path) -> None:
    figures = dict(zip(Quality._fields, map(float, range(99)), strict=False))
    folder = write(tmp_path / "a", cfg(), quality={"held_out": figures})
    text = card(folder, place="a", repo=None, licence=None)
    assert "2.000 ± 20.000" in text  # variance explained, the third field, and its error
    assert "–" not in text
    assert "No licence is stated." in text


def test_an_sae_without_figures(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", cfg(model_name="EleutherAI/pythia-70m"))
    text = card(folder, place="me/x/a", repo=("me/x", "a"), licence=None)
    assert front(text)["base_model"] == "EleutherAI/pythia-70m"
    assert "Quality" not in text
    assert "Training settings" not in text
    assert 'SAE.from_pretrained("me/x", "a")' in text
    assert 'load_lm("EleutherAI/pythia-70m")' in text


def test_values_cannot_change_the_form(tmp_path: Path) -> None:
    evil = "x` | <script>alert(1)</script>\n---\nlicense: mit\n```\n# Free money"
    folder = write(
        tmp_path / "a",
        cfg(model_name=evil, dataset_path=evil),
        training={"train": {"source": evil}},
        quality={"held_out": {"l0": evil, "tokens": True}},
    )
    text = card(folder, place="a", repo=None, licence=None)
    assert "license" not in front(text)
    lines = text.splitlines()
    assert sum(line.startswith("# ") for line in lines) == 1
    assert sum(line.startswith("```") for line in lines) == 6  # three blocks, opened and closed
    assert 'load_lm("MODEL")' in text
    outside = "".join(part for i, part in enumerate(text.split("`")) if i % 2 == 0)
    assert "<script>" not in outside


def test_a_folder_name_stays_a_string(tmp_path: Path) -> None:
    evil = 'a"); print("é\\'
    text = card(write(tmp_path / "a", cfg()), place=evil, repo=None, licence=None)
    blocks = [part.removeprefix("python\n") for part in text.split("```")[1::2]]
    calls = [node for block in blocks for node in ast.walk(ast.parse(block))
             if isinstance(node, ast.Call)]  # fmt: skip
    assert len(calls) == 3  # load_from_disk, load_checked, load_lm
    strings = [a.value for call in calls for a in call.args if isinstance(a, ast.Constant)]
    assert strings.count(evil) == 2


def test_plain() -> None:
    assert plain(True) == "yes"
    assert plain(16384) == "16,384"
    assert plain(0.123456) == "0.1235"
    assert plain("a|b\n`c`") == "`a\\|b c`"

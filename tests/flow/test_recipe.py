"""The recipe of the demo model on a few made-up books, through an interruption."""

import csv
import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = "--vocab 300 --d-model 16 --n-layers 1 --n-heads 1 --d-mlp 16 --context 16 --batch 2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the places and forms of the real sources, with one validation book."""
    folder = tmp_path_factory.mktemp("data")
    text = "The lamp was lit, and \u201cstay\u201d was all that anyone said to him that night. "
    for name in ("standardebooks", "eltec_eng", "children_stories_ccby"):
        (folder / "text").mkdir(exist_ok=True)
        sources = ["standardebooks/kate-chopin_short-fiction", "ELTeC-eng/A", "global-asp/B"]
        rows = [{"source": source, "text": text * 8} for source in sources]
        with lzma.open(folder / "text" / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "emotion_stories").mkdir()
    for name, key in (("emotion_stories", "text"), ("two_speaker_dialogues", "dialogue")):
        path = folder / "emotion_stories" / f"emotionscope_{name}.jsonl"
        path.write_text(json.dumps({key: text}) + "\n", encoding="utf-8")
    for part in ("goemotions", "xed", "empathic_reactions"):
        (folder / "emotion" / part).mkdir(parents=True)
    (folder / "emotion/goemotions/train.tsv").write_text(f"{text}\t1\tx\n", encoding="utf-8")
    (folder / "emotion/xed/en-annotated.tsv").write_text(f"{text}\t1\n", encoding="utf-8")
    (folder / "emotion/xed/neu_en.txt").write_text(f"9\t{text}\n", encoding="utf-8")
    path = folder / "emotion/empathic_reactions/messages.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "essay"], ["1", text]])
    return folder


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="torch.compile needs a C compiler")
def test_an_interrupted_training_ends_with_the_same_model(data: Path, tmp_path: Path) -> None:
    def train(name: str, *more: str) -> Path:
        places = ["--data", data, "--work", tmp_path / name, "--out", tmp_path / f"{name}_out"]
        command = [sys.executable, SCRIPTS / "train_demo_lm.py", *places, *SMALL.split(), *more]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        return tmp_path / f"{name}_out"

    whole = train("whole")
    train("parts", "--stop", "3")
    assert not (tmp_path / "parts_out").exists()
    parts = train("parts")
    weights = "model.safetensors"
    assert (parts / weights).read_bytes() == (whole / weights).read_bytes()
    card = (parts / "README.md").read_text(encoding="utf-8")
    assert card == (whole / "README.md").read_text(encoding="utf-8")
    assert "standardebooks/kate-chopin_short-fiction" in card

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(parts).config.hidden_size == 16
    assert AutoTokenizer.from_pretrained(parts)("x").input_ids[0] == 1  # BOS

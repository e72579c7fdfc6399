"""`emotion-atlas concepts ...` and `corpora ...`: what they print, refuse and understand."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from discovery.commands import add_parsers, add_source, dispatch, sources
from discovery.concepts import load_concepts
from discovery.corpora.mappings import shipped
from discovery.corpora.source import Source
from saes import config
from saes.errors import UserError

Command = Callable[..., str]
DOCS = Path(__file__).parents[1] / "docs"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser()
    add_parsers(top.add_subparsers(dest="command"))
    return top


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """What a command prints."""

    def run(line: str, *more: str) -> str:
        dispatch(parser().parse_args([*line.split(), *more]))
        return capsys.readouterr().out

    return run


def table(text: str, number: int = 0) -> list[list[str]]:
    """The cells of a table in Markdown, without its rule."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    lines = blocks[number].splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|--" not in line
    ]


def texts(folder: Path, n: int = 30) -> str:
    """A file of n texts of Ekman's six, with words of their own; the first names its concept."""
    names = [c.name for c in load_concepts(source="ekman")]
    lines = ["text,label"]
    for i in range(n):
        words = " ".join(f"w{i}x{j}" for j in range(8))
        lines.append(f"{words},{names[i % 6]}")
    lines[1] = "What an angry man,anger"
    path = folder / "mine.csv"
    path.write_text("\n".join(lines))
    return str(path)


# -------------------------------------------------------------------------------------- concepts


def test_the_sets(command: Command) -> None:
    head, *rows = table(command("concepts list"))
    assert head == ["set", "what", "concepts"]
    assert [(row[0], row[2]) for row in rows][:2] == [("emotions171", "171"), ("ekman", "6")]
    assert [row["set"] for row in json.loads(command("concepts list --json"))] == [
        r[0] for r in rows
    ]


def test_the_concepts_of_a_set(command: Command) -> None:
    rows = table(command("concepts list pairs"))[1:]
    assert rows[0][:3] == ["sadness", "unpleasant", "joy"]
    assert len(rows) == 10
    (first, *_) = json.loads(command("concepts list emotions171 --json"))
    assert first["name"] == "afraid"
    assert first["inflections"] == ["afraid"]


def test_a_set_of_ones_own(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("concepts: {a: {antonym: b}, b: {antonym: a}, c: {inflections: [c, d]}}")
    out = command("concepts check", str(path))
    assert re.search(r"^concepts +3: a, b, c$", out, re.M)
    assert re.search(r"^families +1: mine \(3\)$", out, re.M)
    assert re.search(r"^word forms +4, 1 to 2 a concept$", out, re.M)
    assert re.search(r"^with antonym +2 of 3$", out, re.M)
    assert out.endswith("verdict             fits\n")
    path.write_text("concepts: {a: ~, b: ~}")
    with pytest.raises(UserError, match="names 2 concepts; each is judged against others: name 3"):
        command("concepts check", str(path))
    assert "171: afraid, alarmed" in command("concepts check emotions171")


# --------------------------------------------------------------------------------------- corpora


def test_the_mappings(command: Command) -> None:
    rows = table(command("corpora list"))[1:]
    assert [row[0] for row in rows] == shipped()
    assert dict((row[0], row[2]) for row in rows)["event2mind"] == "any, by its words"
    listed = {row["mapping"]: row for row in json.loads(command("corpora list --json"))}
    assert listed["goemotions"]["sets"]["ekman"]["annoyance"] == ["anger"]


def test_texts_of_ones_own_are_split_and_counted(command: Command, tmp_path: Path) -> None:
    out = command("corpora check --concepts ekman", texts(tmp_path, 240))
    sets, concepts, leaks = (table(out, i) for i in range(3))
    assert [row[:5] for row in sets[1:]] == [
        ["selection", "mine", "en", "120", "6"],
        ["confirmation", "mine", "en", "120", "6"],
        ["neutral", "packaged", "en", "180", "0"],
    ]
    assert concepts == [
        ["texts of", "selection", "confirmation"],
        ["each of 6 concepts", "20", "20"],
    ]
    assert leaks[1] == ["mine:2", "anger", "angry", "What an angry man"]
    assert "1 of 240 texts (0.4 %) name a concept of their own" in out
    assert re.search(r"When half of all tests reject: \d+, \d+ and \d+ texts a concept detect", out)
    record = json.loads(command("corpora check --json --concepts ekman", texts(tmp_path, 240)))
    assert record["concepts"]["joy"] == {"selection": 20, "confirmation": 20}
    assert [leak["form"] for leak in record["leaks"]] == ["angry"]


def test_a_source_that_is_no_whole_run(command: Command, tmp_path: Path) -> None:
    path = texts(tmp_path)
    out = command("corpora check --role neutral --concepts ekman", path)
    assert table(out)[1][:5] == ["neutral", "mine", "en", "30", "0"]
    assert "No text outside the lexical set names a concept" in out
    out = command("corpora check --role selection --concepts ekman --limit 12", path)
    head, row = table(out)
    assert (head[-1], row[-1], row[3]) == ("beyond limit", "18", "12")


def test_every_field_of_a_source_is_an_option(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    row = {"text": "Some words.", "label": "joy", "n": "a", "set": "selection", "s": 0, "e": 4}
    path.write_text(json.dumps(row))
    known = vars(parser().parse_args(["corpora", "check", "packaged"]))
    assert {one.name for one in fields(Source)} - {"source"} <= set(known)
    columns = "--id-column n --span-columns s e --near-duplicates 0.9 --role selection"
    out = command(f"corpora check --concepts ekman {columns}", str(path))
    assert table(out)[1][:4] == ["selection", "mine", "en", "1"]
    with pytest.raises(UserError, match="no source has the role neutral"):  # so it is read as all
        command("corpora check --concepts ekman --set-column set", str(path))
    with pytest.raises(UserError, match="leave out revision, of hub datasets"):
        command("corpora check --concepts ekman --revision main", str(path))
    with pytest.raises(UserError, match="packaged: near_duplicates is for other sources"):
        command("corpora check --near-duplicates 0.9 packaged")


def test_what_the_texts_lack(command: Command, tmp_path: Path) -> None:
    path = Path(texts(tmp_path, 240))
    path.write_text(path.read_text().replace(",joy", ",anger"))
    out = command("corpora check --concepts ekman", str(path))
    assert "since a set has too few texts of them: joy\n(a run leaves them out with" in out
    assert table(out, 1)[-1][0] == "anger"
    assert "Even then too few" not in out
    *four, rest = path.read_text().split(",fear", 4)
    path.write_text(",fear".join([*four, rest.replace(",fear", ",anger")]))
    assert "Even then too few of: fear." in command("corpora check --concepts ekman", str(path))


def test_the_corpora_of_a_config(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    source = texts(tmp_path, 240)
    path.write_text(
        f"run: runs/x\nsubject: {{model: m}}\nconcepts: {{set: ekman}}\ncorpora:\n"
        f"  - {{source: {source}, role: split}}\n  - {{source: packaged, role: neutral}}\n"
    )
    assert [row[3] for row in table(command("corpora check", str(path)))[1:]] == [
        "120",
        "120",
        "180",
    ]
    path.write_text("corpora: [{source: packaged}]\nconcepts: {names: [calm, sad, happy]}")
    assert [row[3] for row in table(command("corpora check", str(path)))[1:3]] == ["36", "36"]
    path.write_text(f"concepts: {{set: ekman}}\ncorpora: [{{source: {source}, role: selection}}]")
    with pytest.raises(UserError, match="no source has the role confirmation"):
        command("corpora check", str(path))
    path.write_text("corpora: [{sorce: packaged}]")
    with pytest.raises(UserError, match=r"unknown key 'sorce' in corpora\[0\]; did you mean"):
        command("corpora check", str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--role split", "--role is for a single source; write it into the corpora of the config"),
        ("--near-duplicates 1", "--near-duplicates is for a single source; write it into the corp"),
        ("--limit 9 --mapping goemotions", "--mapping is for a single source"),
        ("--concepts ekman", "--concepts is for a single source; write it into the config"),
        ("--seed 0", "--seed is for a single source; write it into the config"),
    ],
)
def test_a_config_takes_no_options(
    command: Command, tmp_path: Path, options: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("corpora: [{source: packaged}]\nconcepts: {names: [calm, sad, happy]}")
    with pytest.raises(UserError) as refused:
        command(f"corpora check {options}", str(path))
    assert str(refused.value).startswith(message)
    assert command("corpora check --json", str(path))


def test_the_packaged_corpus(command: Command) -> None:
    out = command("corpora check packaged")
    assert "| each of 171 concepts |        12 |           12 |          3 |       8 |" in out
    assert "unlabelled" not in out


# ------------------------------------------------------------------------- options of `discover`


def test_a_corpus_on_the_command_line_of_a_run() -> None:
    top = argparse.ArgumentParser()
    add_source(top)
    line = (
        "--corpus a.csv --text-column body --label-column mood --group-column talk --mapping m.yaml"
    )
    given = [config.load(Source, one) for one in sources(top.parse_args(line.split()))]
    assert given == [
        Source("a.csv", "split", "m.yaml", "body", "mood", "talk"),
        Source("packaged", "neutral"),
    ]
    line = "--corpus o/n --role crossfit --hub-split test --hub-config c --limit 9 --language de"
    (one, _) = (config.load(Source, one) for one in sources(top.parse_args(line.split())))
    assert one == Source(
        "o/n", "crossfit", hub_split="test", hub_config="c", limit=9, language="de"
    )
    (one,) = sources(top.parse_args(["--corpus", "packaged"]))
    assert config.load(Source, one) == Source("packaged")
    assert sources(top.parse_args([])) == []
    for option in ("--mapping m.yaml", "--role split", "--text-column body", "--limit 3"):
        with pytest.raises(UserError, match=f"^{option.split()[0]} says something of --corpus,"):
            sources(top.parse_args(option.split()))
    with pytest.raises(UserError, match="limit must be at least 1"):
        sources(top.parse_args(["--corpus", "a.csv", "--limit", "0"]))


def test_help_and_lists_need_no_torch() -> None:
    code = (
        "import argparse, sys\n"
        "from discovery.commands import add_parsers, dispatch\n"
        "parser = argparse.ArgumentParser()\n"
        "add_parsers(parser.add_subparsers(dest='command'))\n"
        "dispatch(parser.parse_args(['concepts', 'list']))\n"
        "dispatch(parser.parse_args(['corpora', 'list']))\n"
        "heavy = {'torch', 'datasets', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "goemotions27" in done.stdout


def test_the_commands_of_the_page_on_corpora_are_understood() -> None:
    page = (DOCS / "corpora.md").read_text()
    lines = re.findall(r"^    emotion-atlas ((?:concepts|corpora) .*)$", page, re.M)
    given = [parser().parse_args(shlex.split(line)) for line in lines]
    assert {(g.command, g.action) for g in given} == {
        (group, action) for group in ("concepts", "corpora") for action in ("list", "check")
    }


def test_the_page_on_corpora_names_every_setting() -> None:
    from discovery.corpora.mappings import LabelMapping

    page = (DOCS / "corpora.md").read_text()
    for kind in (Source, LabelMapping):
        for name in kind.__dataclass_fields__:
            assert f"`{name}`" in page, (kind, name)


def test_the_examples_of_the_page_on_corpora_load(tmp_path: Path) -> None:
    page = (DOCS / "corpora.md").read_text()
    examples = dict(re.findall(r"```yaml\n# (\S+\.yaml)\n(.*?)```", page, re.S))
    for name, text in examples.items():
        (tmp_path / name).write_text(text)
    from discovery.corpora.mappings import load_mapping

    assert len(load_concepts(source=str(tmp_path / "moods.yaml"))) == 3
    assert load_mapping(str(tmp_path / "diary.yaml")).labels
    tree = config.read(tmp_path / "run.yaml")
    assert isinstance(tree["corpora"], list)
    assert [config.load(Source, one).role for one in tree["corpora"]]

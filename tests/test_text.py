"""`saes.text`: text of any kind to the same rows of tokens."""

import copy
import gzip
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from saes.errors import UserError
from saes.lm.model import LM
from saes.text import documents
from saes.text import prepare as texts
from saes.text.documents import Source, pieces, source_hashes
from saes.text.prepare import TextConfig, open_tokens, tokenizer_hash, write_tokens

DOCUMENTS = tuple(
    f"Door {i} of the house stood open.\nNobody had swept hall {i} since Tuesday, said {i}.\n" * 3
    for i in range(24)
)
CONFIG = TextConfig(source="set by each test", tokens=600, held_out_tokens=200, context=16)


def write_jsonl(path: Path, opener: Callable[..., Any] = open, column: str = "text") -> Path:
    with opener(path, "wt", encoding="utf-8") as file:
        for text in DOCUMENTS:
            file.write(json.dumps({"id": 3, column: text}) + "\n")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl")


# ------------------------------------------------------------------------------- rows of tokens


def test_rows_are_the_documents_in_order_joined_by_eos(
    tiny_lm: LM, corpus: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, source=str(corpus), held_out_tokens=0)
    tokens = write_tokens(tmp_path / "out", tiny_lm, config)
    flat: list[int] = []
    for text in DOCUMENTS:
        ids = tiny_lm.tokenizer(text)["input_ids"]
        assert ids[0] == 1  # <s>, which does not belong inside a row
        flat += [*ids[1:], 2]
    rows = len(tokens.train)
    assert tokens.train.reshape(-1).tolist() == flat[: rows * 15]
    assert tokens.train.dtype == np.uint16
    assert tokens.train.shape[1] == 15
    assert (tokens.bos, tokens.context, tokens.text) == (1, 16, "corpus.jsonl")
    assert tokens.tokenizer == tokenizer_hash(tiny_lm.tokenizer)
    assert len(tokens.held_out) == 0
    content = (tokens.train != 2).sum(1)
    assert content.sum() >= 600 > content[:-1].sum()  # enough, and not a row more


def test_held_out_rows_are_of_other_documents(tiny_lm: LM, corpus: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "out", tiny_lm, replace(CONFIG, source=str(corpus)))

    def documents_in(rows: np.ndarray) -> set[int]:
        text = tiny_lm.tokenizer.decode(rows.reshape(-1).tolist())
        return {i for i in range(24) if f"Door {i} of" in text or f"said {i}." in text}

    train, held_out = documents_in(tokens.train), documents_in(tokens.held_out)
    assert len(train) >= 3
    assert len(held_out) >= 2
    assert not train & held_out
    assert (tokens.held_out > 2).sum() >= 200
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["documents"] == {"train": len(train), "held_out": len(held_out)}


def test_every_kind_of_source_gives_the_same_rows(
    tiny_lm: LM, corpus: Path, tmp_path: Path
) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    places = tmp_path / "places"
    (places / "texts/.hidden").mkdir(parents=True)
    (places / "texts/.hidden/x.txt").write_text("not this")
    (places / "texts/readme.pdf").write_text("nor this")
    for i, text in enumerate(DOCUMENTS):
        (places / f"texts/{i:02d}.txt").write_text(text)
    (places / "one.txt").write_text("\n \n\n".join(DOCUMENTS))
    write_jsonl(places / "a.jsonl.gz", gzip.open)
    write_jsonl(places / "a.jsonl.xz", lzma.open)
    write_jsonl(places / "b.jsonl", column="story")
    table = pyarrow.table({"text": [None, "  ", *DOCUMENTS], "n": range(26)})
    pyarrow.parquet.write_table(table, places / "a.parquet")
    saved = datasets.Dataset.from_dict({"text": list(DOCUMENTS)})
    saved.save_to_disk(str(places / "saved"))
    datasets.DatasetDict(train=saved).save_to_disk(str(places / "saved_dict"))
    sources: dict[str, dict[str, Any]] = {
        "texts": {},
        "texts/*.txt": {},
        "t*/**/[0-9]*.txt": {},
        "one.txt": {"document": "paragraph"},
        "a.jsonl.gz": {},
        "a.jsonl.xz": {},
        "b.jsonl": {"column": "story"},
        "a.parquet": {},
        "saved": {},
        "saved_dict": {},
    }
    expected = write_tokens(tmp_path / "out", tiny_lm, replace(CONFIG, source=str(corpus)))
    for i, (name, more) in enumerate(sources.items()):
        config = replace(CONFIG, source=str(places / name), **more)
        found = write_tokens(tmp_path / f"out{i}", tiny_lm, config)
        assert np.array_equal(found.train, expected.train), name
        assert np.array_equal(found.held_out, expected.held_out), name
        written = (tmp_path / f"out{i}/manifest.json").read_text()
        assert str(tmp_path) not in written


def test_a_long_document_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(documents, "PIECE", 50)
    for i, text in enumerate(DOCUMENTS[:3]):
        (tmp_path / f"{i}.txt").write_text("\n" * 60 + text + "x" * 130)
    found = list(pieces(Source(str(tmp_path), "text", "train", None, "file")))
    assert len(found) > 12
    assert max(len(piece.text) for piece in found) <= 100
    for i, text in enumerate(DOCUMENTS[:3]):
        whole = "".join(piece.text for piece in found if piece.document == i)
        assert whole.strip() == (text + "x" * 130)
    assert [p.document for p in found] == sorted(p.document for p in found)


@given(
    st.lists(npst.arrays(np.int64, st.integers(0, 40), elements=st.integers(0, 9)), max_size=8),
    st.integers(1, 7),
    st.integers(0, 60),
)
def test_row_file_takes_rows_until_there_is_enough_content(
    parts: list[np.ndarray], width: int, need: int
) -> None:
    """Ids below 3 are special. Reference: row by row."""
    from tqdm import tqdm

    special = np.arange(10) < 3
    with tqdm(disable=True) as bar, tempfile.TemporaryFile() as file:
        rows = texts.RowFile(file, width, np.dtype(np.uint32), special, need, bar)
        for part in parts:
            rows.add(part)
        rows.finish()
        file.seek(0)
        found = np.load(file)
    flat = [int(t) for part in parts for t in part]
    expected: list[list[int]] = []
    content = 0
    for i in range(0, len(flat) - width + 1, width):
        if content >= need:
            break
        expected.append(flat[i : i + width])
        content += sum(t >= 3 for t in flat[i : i + width])
    assert found.tolist() == expected
    assert found.shape == (len(expected), width)
    assert (rows.content, rows.full) == (content, content >= need)


def test_a_large_vocabulary_takes_uint32(tiny_lm: LM, corpus: Path, tmp_path: Path) -> None:
    large = SimpleNamespace(
        tokenizer=tiny_lm.tokenizer, vocab_size=1 << 17, context=256, name="large"
    )
    tokens = write_tokens(tmp_path / "out", large, replace(CONFIG, source=str(corpus)))  # pyright: ignore
    assert tokens.train.dtype == np.uint32


def test_epochs_ask_for_less_text(tiny_lm: LM, corpus: Path, tmp_path: Path) -> None:
    once = write_tokens(tmp_path / "1", tiny_lm, replace(CONFIG, source=str(corpus), tokens=200))
    config = replace(CONFIG, source=str(corpus), tokens=600, epochs=3)
    assert np.array_equal(write_tokens(tmp_path / "3", tiny_lm, config).train, once.train)


def test_real_books(tiny_lm: LM, shared_data: Path, tmp_path: Path) -> None:
    source = str(shared_data / "text/wikitext2_valid.txt.gz")
    config = TextConfig(source, document="paragraph", tokens=20_000, held_out_tokens=5_000)
    tokens = write_tokens(tmp_path / "wiki", tiny_lm, config)
    assert 20_000 <= (tokens.train > 2).sum() < 20_300
    source = str(shared_data / "text/*stories*.jsonl.xz")
    config = TextConfig(source, tokens=20_000, held_out_tokens=5_000)
    tokens = write_tokens(tmp_path / "stories", tiny_lm, config)
    assert 5_000 <= (tokens.held_out > 2).sum() < 5_300


# ---------------------------------------------------------------------------- files on the disk


def test_what_is_there_is_not_made_again(
    tiny_lm: LM, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, source=str(corpus))
    first = write_tokens(tmp_path / "out", tiny_lm, config)
    monkeypatch.setattr(texts, "pieces", lambda _: pytest.fail("read again"))
    tiny_lm.tokenizer(["a", "b c"], padding=True)  # leaves its traces in the tokenizer
    again = write_tokens(tmp_path / "out", tiny_lm, config)
    assert np.array_equal(again.train, first.train)
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.copy(corpus, tmp_path / "moved"))  # a copy, of another time
    os.utime(moved, ns=(10**18, 10**18))
    write_tokens(tmp_path / "out", tiny_lm, replace(config, source=str(moved)))
    with pytest.raises(UserError, match="tokens of another text"):
        write_tokens(tmp_path / "out", tiny_lm, replace(config, tokens=500))
    corpus.write_text(corpus.read_text().replace("Door", "Gate"))
    with pytest.raises(UserError, match="tokens of another text"):
        write_tokens(tmp_path / "out", tiny_lm, config)


def test_equal_texts_give_equal_bytes(tiny_lm: LM, tmp_path: Path) -> None:
    """Wherever they lie and whenever they were written, in folders too; others are told apart."""
    import datasets

    for top in ("one", "two"):
        for name in ("a/x.txt", "b/x.txt"):
            path = tmp_path / top / "texts" / name
            path.parent.mkdir(parents=True)
            path.write_text(f"{name}\n" + "".join(DOCUMENTS[:12]))
            os.utime(path, ns=(10**18 + len(top + name), 10**18 + len(top)))
        config = replace(CONFIG, source=str(tmp_path / top / "texts"))
        write_tokens(tmp_path / top / "out", tiny_lm, config)
    manifests = [(tmp_path / top / "out/manifest.json").read_bytes() for top in ("one", "two")]
    assert manifests[0] == manifests[1]
    hashes = source_hashes(str(tmp_path / "one/texts"))
    assert set(hashes) == {"a/x.txt", "b/x.txt"}
    assert hashes == source_hashes(str(tmp_path / "two/t*/*/x.txt"))
    assert len(set(hashes.values())) == 2
    for i in range(2):
        data = datasets.Dataset.from_dict({"text": [f"{i} {text}" for text in DOCUMENTS]})
        data.save_to_disk(str(tmp_path / f"saved{i}"))
    saved = [source_hashes(str(tmp_path / f"saved{i}")) for i in range(2)]
    assert saved[0]
    assert saved[0] != saved[1]


def test_the_hash_of_a_tokenizer(tiny_lm: LM) -> None:
    first = tokenizer_hash(tiny_lm.tokenizer)
    other = copy.deepcopy(tiny_lm.tokenizer)
    assert tokenizer_hash(other) == first
    other.add_tokens(["another"])
    assert tokenizer_hash(other) != first
    slow = SimpleNamespace(get_vocab=lambda: {"a": 0})
    assert tokenizer_hash(slow) == tokenizer_hash(slow) != first


def test_an_interruption_leaves_nothing_half_written(
    tiny_lm: LM, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, source=str(corpus))
    whole = write_tokens(tmp_path / "whole", tiny_lm, config)
    with monkeypatch.context() as patch:
        patch.setattr(texts, "TOGETHER", 300)
        calls = iter([None])
        encode = texts._encode

        def interrupted(*args: Any) -> Any:
            if next(calls, 0) == 0:
                raise KeyboardInterrupt
            return encode(*args)

        patch.setattr(texts, "_encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_tokens(tmp_path / "out", tiny_lm, config)
    assert list((tmp_path / "out").iterdir()) == []
    again = write_tokens(tmp_path / "out", tiny_lm, config)
    assert np.array_equal(again.train, whole.train)
    assert np.array_equal(again.held_out, whole.held_out)


@pytest.mark.parametrize("name", ["train.npy", "held_out.npy"])
def test_a_damaged_file_is_named(tiny_lm: LM, corpus: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    write_tokens(out, tiny_lm, replace(CONFIG, source=str(corpus)))
    path = out / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{name} was altered"):
        open_tokens(out)
    path.write_bytes(data[:-4])
    with pytest.raises(UserError, match=rf"{name} has {len(data) - 4} bytes"):
        open_tokens(out)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        open_tokens(out)
    path.write_bytes(data)
    open_tokens(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_tokens(out)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no tokens"):
        open_tokens(out)


def test_a_disk_that_is_too_small_is_refused(
    tiny_lm: LM, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=(1 << 28) + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    config = replace(CONFIG, source=str(corpus))
    with pytest.raises(UserError, match=r"800 tokens needs 1.7 KiB and .* has 256.0 MiB free"):
        write_tokens(tmp_path / "out", tiny_lm, config)
    assert not (tmp_path / "out").exists()
    usage.free += 1000
    write_tokens(tmp_path / "out", tiny_lm, config)


# --------------------------------------------------------------------------------- bad input


def test_too_little_text(tiny_lm: LM, corpus: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, source=str(corpus), tokens=100_000)
    match = r"corpus.jsonl holds [\d,]+ tokens in 24 documents, .* of 100,000 .*`epochs: (\d+)`"
    with pytest.raises(UserError, match=match) as error:
        write_tokens(tmp_path / "out", tiny_lm, config)
    epochs = int(str(error.value).split("epochs: ")[1].split("`")[0])
    write_tokens(tmp_path / "out", tiny_lm, replace(config, epochs=epochs))  # the advice works
    one = tmp_path / "one.txt"
    one.write_text(DOCUMENTS[0])
    with pytest.raises(UserError, match="one document, and held-out"):
        write_tokens(tmp_path / "one", tiny_lm, replace(CONFIG, source=str(one)))
    one.write_text(" \n")
    with pytest.raises(UserError, match=r"there is no text in one\.txt"):
        write_tokens(tmp_path / "one", tiny_lm, replace(CONFIG, source=str(one)))


def test_damaged_and_unknown_files(tiny_lm: LM, tmp_path: Path) -> None:
    def write(name: str, data: bytes | str) -> Path:
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    packed = gzip.compress(b"text\n" * 500)
    cases = [
        (write("latin.txt", "caf\u00e9".encode("latin-1")), "is not text in UTF-8"),
        (write("cut.txt.gz", packed[:-9]), r"cut\.txt\.gz cannot be read.* cut off"),
        (write("not.txt.gz", "text"), "cannot be read"),
        (write("not.txt.xz", "text"), "cannot be read"),
        (write("bad.jsonl", '{"text": "a"}\n{"text"\n'), r"bad\.jsonl, line 2: not JSON"),
        (write("list.jsonl", "[1]\n"), "line 1: expected an object"),
        (write("other.jsonl", '{"body": "a", "id": 1}\n'), "no column 'text'.* body, id"),
        (write("number.jsonl", '{"text": 5}\n'), "'text' holds a int, not text"),
        (write("not.parquet", "text"), "not a whole parquet file"),
        (write("table.parquet.gz", packed), "unknown kind"),
        (write("text.docx", "text"), r"unknown kind; text is read from \.txt"),
        (tmp_path / "absent.txt", "no text file or folder"),
        (tmp_path / "*.nothing", "no file matches"),
    ]
    (tmp_path / "folder").mkdir()
    cases.append((tmp_path / "folder", "holds no text"))
    for path, match in cases:
        with pytest.raises(UserError, match=match):
            write_tokens(tmp_path / "out", tiny_lm, replace(CONFIG, source=str(path)))
    assert not (tmp_path / "out/manifest.json").exists()


def test_columns_of_tables_are_named(tiny_lm: LM, tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    data = datasets.Dataset.from_dict({"body": ["a"]})
    datasets.DatasetDict(test=data).save_to_disk(str(tmp_path / "saved"))
    for source, more, match in (
        ("a.parquet", {}, "no column 'text'; there are: body, n"),
        ("saved", {}, "no split 'train'; there are: test"),
        ("saved", {"split": "test"}, "no column 'text'; there are: body"),
    ):
        config = replace(CONFIG, source=str(tmp_path / source), **more)
        with pytest.raises(UserError, match=match):
            write_tokens(tmp_path / "out", tiny_lm, config)


def test_the_hub_out_of_reach(tiny_lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed first, then from the cache, then an error; conftest turns the hub off."""
    import datasets

    config = replace(CONFIG, source="someone/no_such_text", held_out_tokens=0)
    with pytest.raises(UserError, match="neither a file or folder here nor a dataset"):
        write_tokens(tmp_path / "out", tiny_lm, config)
    with pytest.raises(UserError, match="no text file or folder"):
        write_tokens(tmp_path / "out", tiny_lm, replace(config, source="some where/else"))
    asked: list[dict[str, Any]] = []

    def load(name: str, config: str | None, *, split: str, **options: Any) -> list[dict[str, str]]:
        asked.append({"name": name, "config": config, "split": split, **options})
        if "streaming" in options:
            raise ConnectionError("no route")
        assert options["download_config"].local_files_only
        return [{"text": text} for text in DOCUMENTS]

    monkeypatch.setattr(datasets, "load_dataset", load)
    tokens = write_tokens(tmp_path / "out", tiny_lm, replace(config, name="en"))
    assert tokens.text == "someone/no_such_text, en, train"
    assert [a.get("streaming") for a in asked] == [True, None]
    assert all((a["config"], a["split"]) == ("en", "train") for a in asked)


def test_a_dataset_of_the_hub_is_streamed(
    tiny_lm: LM, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects of the datasets library, from memory; the rows are those of the file."""
    import datasets

    whole = datasets.Dataset.from_dict({"n": list(range(24)), "text": list(DOCUMENTS)})
    kinds = {"streamed": whole.to_iterable_dataset(num_shards=3), "cached": whole}
    assert isinstance(kinds["streamed"], datasets.IterableDataset)
    expected = write_tokens(tmp_path / "file", tiny_lm, replace(CONFIG, source=str(corpus)))
    for name, data in kinds.items():
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, _data=data, **__: _data)
        config = replace(CONFIG, source="someone/text")
        found = write_tokens(tmp_path / name, tiny_lm, config)
        assert np.array_equal(found.train, expected.train)
        assert np.array_equal(found.held_out, expected.held_out)
        with pytest.raises(UserError, match=r"no column 'body'.* n, text"):
            write_tokens(tmp_path / "bad", tiny_lm, replace(config, column="body"))

    def broken() -> Any:
        yield {"text": DOCUMENTS[0]}
        raise ConnectionError("no route")

    streamed = datasets.IterableDataset.from_generator(broken)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    with pytest.raises(UserError, match="reading someone/text failed: "):
        write_tokens(tmp_path / "bad", tiny_lm, replace(CONFIG, source="someone/text"))


def test_settings(tiny_lm: LM, tmp_path: Path) -> None:
    for field in ("tokens", "epochs"):
        with pytest.raises(UserError, match=f"{field} = 0 must be at least 1"):
            replace(CONFIG, **{field: 0})
    with pytest.raises(UserError, match=r"rows of 300 tokens exceed the context of tiny_lm: 256"):
        write_tokens(tmp_path / "out", tiny_lm, TextConfig(context=300))

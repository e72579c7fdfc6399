"""Local tables are read whole, or refused with the line that is at fault."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.corpora.files import Layout, local_files, rows, stem
from saes.errors import UserError

PLAIN = Layout()


def put(folder: Path, name: str, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder / name


def cells(path: Path, layout: Layout = PLAIN) -> list[dict[str, object] | None]:
    return [row.cells for row in rows(path, layout)]


SAME = [{"text": "A, b", "label": "joy"}, {"text": "ü", "label": "fear"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"A, b",joy\nü,fear\n'),
        ("a.csv", '\ufefftext,label\r\n"A, b",joy\r\n\r\nü,fear'),
        ("a.csv.gz", 'text,label\n"A, b",joy\nü,fear\n'),
        ("a.tsv", "text\tlabel\nA, b\tjoy\nü\tfear\n"),
        ("a.tsv.gz", "text\tlabel\t\r\nA, b\tjoy\t\r\nü\tfear\r\n"),
        ("a.jsonl", "\n".join(json.dumps(row) for row in SAME)),
        ("a.ndjson.gz", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in SAME)),
    ],
)
def test_the_same_rows_from_any_file(tmp_path: Path, name: str, content: str) -> None:
    path = put(tmp_path, name, content)
    assert cells(path) == cells(path, Layout(header=("text", "label"))) == SAME


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": "A", "labels": [1, 2]}]), path)
    (row,) = rows(path, Layout())
    assert row == (f"{path}, row 1", 1, {"text": "A", "labels": [1, 2]})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet is not a whole parquet file"):
        cells(path)


def test_lines_are_counted_as_in_the_file(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", 'text,label\n\n"one\ntwo",joy\nthree,fear\n')
    assert [row.number for row in rows(path, Layout())] == [3, 5]
    path = put(tmp_path, "a.tsv", "text\n\nA\u2028B\nC\n")  # other line ends are no line ends
    assert [(r.number, r.cells) for r in rows(path, Layout())] == [
        (3, {"text": "A\u2028B"}),
        (4, {"text": "C"}),
    ]


def test_quotes_in_tsv_are_letters_unless_it_is_said(tmp_path: Path) -> None:
    path = put(tmp_path, "a.tsv", 'text\tlabel\n"Really," she said\tjoy\n"a ""b"""\tfear\n')
    assert [row and row["text"] for row in cells(path)] == ['"Really," she said', '"a ""b"""']
    path = put(tmp_path, "b.tsv", 'text\tlabel\n"a ""b"""\tfear\n')
    assert cells(path, Layout(quoted=True)) == [{"text": 'a "b"', "label": "fear"}]
    path = put(tmp_path, "c.csv", 'text,label\n"Well", she said,joy\n')
    with pytest.raises(UserError, match="line 2: 3 cells, expected the 2 of text, label"):
        cells(path, Layout(quoted=False))


def test_files_without_a_line_of_names(tmp_path: Path) -> None:
    layout = Layout(header=("text", "label"))
    bare = put(tmp_path, "a.tsv", "A\t1\nB\t2\n")
    named = put(tmp_path, "b.tsv", "text\tlabel\nA\t1\nB\t2\n")
    assert cells(bare, layout) == cells(named, layout) == cells(named)
    assert cells(put(tmp_path, "c.txt", "A\t1\t\t\n"), layout._replace(format="tsv")) == [
        {"text": "A", "label": "1"}
    ]


def test_broken_rows_are_refused_or_handed_on(tmp_path: Path) -> None:
    path = put(tmp_path, "a.tsv", "text\tlabel\nA\t1\nB\nC\t2\t3\n")
    with pytest.raises(UserError, match=r"a\.tsv, line 3: 1 cells, expected the 2 of text, label"):
        cells(path)
    read = cells(path, Layout(broken="leave out"))
    assert read == [{"text": "A", "label": "1"}, None, None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\nfine\nna\u00efve\n".encode("latin-1"), "line 3: the byte 0xef is not UTF"),
        ("a.csv", "text\nüber\n".encode() + b"\xfcber\n", "a.csv, line 3: the byte 0xfc"),
        ("a.csv", "text\nA\n".encode("utf-16"), "a.csv is in UTF-16; convert it"),
        ("a.csv", "text\nA\0B\n", "a.csv, line 2: a NUL byte"),
        ("a.csv", " \n", "a.csv is empty"),
        ("a.csv", "text,text\nA,B\n", "line 1: two columns are called 'text'"),
        ("a.csv", 'text\n"A" b\n', "a.csv, line 2: "),
        ("a.csv", 'text\nA\n"B', "a.csv, line 3: unexpected end of data"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: expected a JSON object, got [1]"),
    ],
)
def test_a_faulty_file(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = put(tmp_path, name, content)
    with pytest.raises(UserError) as refused:
        cells(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_damaged_archive(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv.gz", "text\n" + "A\n" * 1000)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="it may be damaged or cut off"):
        cells(path)


def test_a_text_longer_than_the_csv_module_takes(tmp_path: Path) -> None:
    text = "word " * 40_000
    assert cells(put(tmp_path, "a.csv", f"text\n{text}\n")) == [{"text": text}]


def test_which_files_a_source_names(tmp_path: Path) -> None:
    put(tmp_path, "b.csv", "text\nA")
    put(tmp_path, "a.csv", "text\nA")
    put(tmp_path, "c.txt", "A")
    assert [p.name for p in local_files(f"{tmp_path}/*.csv", Layout())] == ["a.csv", "b.csv"]
    assert local_files(f"{tmp_path}/d.csv", Layout()) == []
    assert local_files("owner/name", Layout()) == []
    with pytest.raises(UserError, match="no file matches"):
        local_files(f"{tmp_path}/*.tsv", Layout())
    with pytest.raises(UserError, match=r"c\.txt is of an unknown kind; labelled texts are read"):
        local_files(f"{tmp_path}/c.txt", Layout())
    assert [stem(Path(name)) for name in ("a.csv", "b.c.tsv.gz", "d")] == ["a", "b.c", "d"]


WORD = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=8)
TABLE = st.lists(st.tuples(WORD, WORD).filter(lambda row: "".join(row).strip()), max_size=6)


@given(TABLE)
def test_any_table_comes_back(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *table])
    assert cells(path) == [dict(zip(("text", "label"), row, strict=True)) for row in table]

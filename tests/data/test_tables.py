"""Tables of every format give the same dataset, and a messy one is reported row by row."""

import gzip
import json

import datasets
import pandas
import pytest

import dss
from dss.cli.main import main
from dss.data.prepare import Columns, prepare
from dss.data.tables import cell_text, read_tables, write_table
from dss.data.vocabulary import load_vocabulary
from dss.errors import DataError, MissingPackageError

ROWS = [
    {"id": "007", "text": 'a "quoted", text\nof two lines 😀', "team": "bug"},
    {"id": "1.0", "text": "NA", "team": "null"},
    {"id": "3", "text": "", "team": "bug"},
    {"id": "4", "text": "grüße", "team": ""},
]
COLUMNS = Columns(input=("text",), label="team", id="id")


def write(path, form):
    table = pandas.DataFrame(ROWS)
    if form in ("csv", "utf16", "semicolon", "gz"):
        encoding = {"csv": "utf-8-sig", "utf16": "utf-16"}.get(form, "utf-8")
        path = path / ("t.csv.gz" if form == "gz" else "t.csv")
        sep = ";" if form == "semicolon" else ","
        table.to_csv(path, index=False, sep=sep, encoding=encoding)
    elif form == "tsv":
        path = path / "t.tsv"
        table.to_csv(path, index=False, sep="\t")
    elif form == "xlsx":
        path = path / "t.xlsx"
        table.to_excel(path, index=False, sheet_name="Tickets")
    elif form == "parquet":
        path = path / "t.parquet"
        table.to_parquet(path)
    elif form == "json":
        path = path / "t.json"
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif form == "jsonl.gz":
        path = path / "t.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    else:
        path = path / "saved"
        features = datasets.Features(
            id=datasets.Value("string"),
            text=datasets.Value("string"),
            team=datasets.ClassLabel(names=["bug", "null", ""]),
        )
        datasets.Dataset.from_list(ROWS, features=features).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "form",
    ["csv", "utf16", "semicolon", "gz", "tsv", "xlsx", "parquet", "json", "jsonl.gz", "datasets"],
)
def test_every_format_has_the_same_rows(tmp_path, form):
    """Ids keep their zeros, and `NA` and `null` are texts."""
    found = prepare(write(tmp_path, form), COLUMNS, valid=0, test=0)
    assert [(row.id, row.input, row.label or "") for row in found.rows] == [
        (row["id"], row["text"], row["team"]) for row in ROWS
    ]
    assert (found.empty_inputs, found.unlabelled) == (("3",), ("4",))
    assert found.unwritable == {"\n": 1}


def test_cells_of_other_types():
    stamp = pandas.Timestamp("2026-01-02")
    cells = (3.0, 2.5, 7, True, pandas.NA, pandas.NaT, float("nan"), None, stamp)
    texts = ["3", "2.5", "7", "True", "", "", "", "", "2026-01-02 00:00:00"]
    assert [cell_text(cell) for cell in cells] == texts
    with pytest.raises(DataError, match=r"a cell holds \['a'\], not text"):
        cell_text(["a"])


@pytest.fixture
def messy():
    """60 texts of three unequal labels, with an empty row, duplicates and a near-duplicate."""
    labels = ["billing"] * 40 + ["bug"] * 15 + ["access"] * 5
    rows = [
        {"subject": f"Case {i * 7919}", "body": f"{label} text {i * i} of {'xyz'[i % 3] * (i + 3)}"}
        | {"team": label}
        for i, label in enumerate(labels)
    ]
    rows[10] |= {"subject": "", "body": ""}
    rows[11]["body"] = ""
    rows[12]["team"] = None
    rows[13]["team"] = "Billing "
    rows[15] = dict(rows[14])
    rows[17] = rows[16] | {"team": "bug"}
    rows[19] = rows[18] | {"body": rows[18]["body"].upper() + "!"}
    return pandas.DataFrame(rows)


def test_a_messy_table_is_reported_and_keeps_all_rows(messy, tmp_path):
    columns = Columns(input=("subject", "body"), label="team")
    found = prepare(messy, columns, valid=0.2, test=0.2, seed=1)
    assert len(found.rows) == sum(found.split_sizes.values()) == 60
    assert found.rows[0].input == "subject: Case 0 body: billing text 0 of xxx"
    assert found.empty_inputs == ("11",)
    assert found.empty_cells == {"subject": 1, "body": 2}
    assert found.unlabelled == ("13",)
    assert found.duplicates == ("16", "18")
    assert found.conflicts == ("17", "18")
    assert found.near_duplicates == 2
    (line,) = found.look_alikes
    assert "'billing' (37 rows), 'Billing' (1 rows)" in line
    split_of = {row.id: row.split for row in found.rows}
    assert split_of["15"] == split_of["16"]
    assert split_of["19"] == split_of["20"]
    assert split_of["13"] == "train"
    counts = found.label_counts
    assert counts["bug"] == {"train": 10, "valid": 3, "test": 3}
    assert counts["access"] == {"train": 3, "valid": 1, "test": 1}
    assert prepare(messy, columns, valid=0.2, test=0.2, seed=1).rows == found.rows
    assert prepare(messy, columns, valid=0.2, test=0.2, seed=2).rows != found.rows
    merged = prepare(messy, columns, merge_labels=True)
    assert merged.labels == ("billing", "bug", "access")
    assert not merged.look_alikes


def test_similar_inputs_are_found_and_an_uneven_split_is_reported():
    story = "that I paid for last week with my card and that should have come on Monday morning"
    rows = [f"where is order {i:06} {story} {story}, as you said?" for i in range(2000)]
    table = pandas.DataFrame({"x": rows + ["\N{THUMBS UP SIGN}"] * 4})
    found = prepare(table, Columns(input=("x",)))
    assert found.near_duplicates > 1900  # the index is approximate
    assert len({row.split for row in found.rows[2000:]}) == 1
    even = prepare(table, Columns(input=("x",)), similar=1)
    assert (even.near_duplicates, even.uneven) == (0, ())
    assert even.split_sizes["test"] == pytest.approx(200, abs=4)
    table = pandas.DataFrame({"x": ["the same"] * 96 + ["one", "two", "three", "four"]})
    lines = prepare(table, Columns(input=("x",))).uneven
    assert [line[:42] for line in lines] == [
        "valid has 2 rows instead of about 10: up t",
        "test has 2 rows instead of about 10: up to",
    ]
    assert "up to 96 similar inputs stay together; `similar=1`" in lines[0]
    lines = prepare(table, Columns(input=("x",)), similar=1).uneven
    assert [line.partition("up to ")[2] for line in lines] == ["96 equal inputs stay together"] * 2


def test_written_tables_keep_texts(tmp_path):
    rows = [{"a": "=1+1", "b": 1, "c": "\x07"}, {"a": "http://x", "b": "x", "c": None}]
    for name in ("t.csv", "t.tsv.gz", "t.xlsx", "t.parquet"):
        write_table(tmp_path / name, rows)
        (table,) = read_tables(tmp_path / name).values()
        assert [cell_text(cell) for cell in table.a] == ["=1+1", "http://x"]
        assert [cell_text(cell) for cell in table.b] == ["1", "x"]
    with pytest.raises(DataError, match="an Excel cell has at most 32,767"):
        write_table(tmp_path / "t.xlsx", [{"a": "x" * 40000}])


def test_a_blank_line_of_a_single_column_is_a_row(tmp_path):
    (tmp_path / "t.csv").write_text("x\na\n\nb\n")
    found = prepare(tmp_path / "t.csv", Columns(input=("x",)))
    assert [row.input for row in found.rows] == ["a", "", "b"]
    assert found.empty_inputs == ("2",)


def test_lengths_and_characters_are_the_vocabularys(messy):
    found = prepare(
        pandas.DataFrame({"x": ["abc", "a" * 20, "naïve"]}),
        Columns(input=("x",)),
        vocabulary=load_vocabulary("bytes"),
        limit=16,
    )
    assert (found.tokens, found.truncated, found.unwritable) == ((4, 21, 7), 1, {})
    assert found.summary()["lengths"]["longest"] == 21


def test_a_data_frame_becomes_a_dataset(messy, tmp_path):
    folder = tmp_path / "tickets"
    options = {"input": ["subject", "body"], "label": "team", "merge_labels": True}
    data = dss.Dataset.from_files(messy, folder=folder, **options)
    assert (data.name, data.labels.closed) == ("tickets", ("billing", "bug", "access"))
    sizes = [len(data.examples(split)) for split in ("train", "valid", "test")]
    assert sum(sizes) == 60
    assert sizes[0] in (48, 49)
    (folder / "train.gpt.jsonl").write_text("{}")
    assert dss.Dataset.from_files(messy, folder=folder, **options) == data  # the same files
    with pytest.raises(DataError, match=r"tickets: has another train.jsonl, .*with `replace`"):
        dss.Dataset.from_files(messy, folder=folder, **options, seed=5)
    dss.Dataset.from_files(messy, folder=folder, **options, seed=5, replace=True)
    assert (folder / "train.gpt.jsonl").is_file()
    with pytest.raises(DataError, match="`folder`: give the folder"):
        dss.Dataset.from_files(messy, **options)
    with pytest.raises(DataError, match="unknown argument 'nope'"):
        dss.Dataset.from_files(messy, folder=folder, **options, nope=1)
    with pytest.raises(DataError, match=r"none.csv: no such file or folder"):
        dss.Dataset.from_files("none.csv", input="a")
    with pytest.raises(DataError, match="the table: no rows"):
        dss.Dataset.from_files(messy[:0], folder=folder, **options)
    with pytest.raises(DataError, match="options of a table need `input`"):
        dss.Dataset.from_files(folder, label="team")


def test_tables_of_splits_keep_them(tmp_path):
    for name, text in (("train", "a"), ("validation", "b"), ("test", "c")):
        (tmp_path / f"{name}.csv").write_text(f"x,y\n{text},1\n")
    found = prepare(tmp_path, Columns(input=("x",), label="y"))
    assert {row.id: row.split for row in found.rows} == {
        "train-1": "train",
        "valid-1": "valid",
        "test-1": "test",
    }
    table = pandas.DataFrame({"x": ["a", "b"], "part": ["test", "train"]})
    found = prepare(table, Columns(input=("x",), split="part"))
    assert [row.split for row in found.rows] == ["test", "train"]
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list([{"x": "a"}]),
        dev=datasets.Dataset.from_list([{"x": "b"}]),
    )
    both.save_to_disk(tmp_path / "saved")
    assert [*read_tables(tmp_path / "saved")] == ["train", "valid"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = "ticket,body,team\n1,hello there,a\n2,good bye,b\n"
    (tmp_path / "good.csv").write_text(good)
    (tmp_path / "long.csv").write_text(good + "3,too,many,cells\n")
    (tmp_path / "latin.csv").write_bytes("body,team\ngrüße,a\n".encode("latin-1"))
    (tmp_path / "empty.csv").write_text("body,team\n")
    (tmp_path / "blank.csv").write_text("")
    (tmp_path / "fake.xlsx").write_text(good)
    (tmp_path / "fake.parquet").write_text(good)
    (tmp_path / "fake.csv.gz").write_text(good)
    (tmp_path / "bad.json").write_text('[{"body": "x"}, 3]')
    (tmp_path / "twice.csv").write_text(good + "2,again,a\n")
    (tmp_path / "folder").mkdir()
    for name in ("my-2.csv", "cqa.csv"):
        (tmp_path / name).write_text(good)
    (tmp_path / "double.csv").write_text("body,body\nx,y\n")
    (tmp_path / "quote.csv").write_text('body,team\n"x,y\nz,w\n')
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("none.csv --input=body", "none.csv: no such file or folder"),
        ("good.csv", "no columns: give --input; the table has ticket, body, team"),
        ("good.csv --input=bodi", "unknown column 'bodi'; did you mean 'body'?"),
        ("good.csv --input=body --label=Team", "unknown column 'Team'; did you mean 'team'?"),
        ("good.csv --template={body", "--template '{body': expected '}'"),
        ("good.csv --template=body", "names no column in braces"),
        ("good.csv --template={body:d}", "give only names of columns in braces"),
        ("good.csv --input=body --similar=0", "--similar=0: give a fraction above 0"),
        ("double.csv --input=body", "double.csv: two columns are called 'body'; rename one"),
        ("my-2.csv --input=body --output=a.b/c-d!", "dataset name 'c_d!': use letters"),
        ("cqa.csv --input=body", "that of a released dataset; give another with --output"),
        ("good.csv --input=body --template={body}", "exclude each other"),
        ("good.csv --input=body --label=team --labels=a,c", "row 2: label 'b' is not one of a, c"),
        ("good.csv --input=body --valid=0.5 --test=0.5", "leave no rows for train"),
        ("good.csv --input=body --valid=-1", "--valid=-1: give a fraction"),
        ("good.csv --input=body --split=team", "split 'a' in column 'team' is not one of train"),
        ("good.csv --input=body --sheet=x", "good.csv: --sheet is for Excel files"),
        ("twice.csv --input=body --id=ticket", "'2' is the id of several rows"),
        ("long.csv --input=body", "long.csv:4: 4 cells, and the header has 3; put cells with ','"),
        ("quote.csv --input=body", "quote.csv: a double quote is not closed"),
        ("latin.csv --input=body", "latin.csv: not UTF-8 at byte 12; save it as UTF-8"),
        ("empty.csv --input=body", "empty.csv: no rows"),
        ("blank.csv --input=body", "blank.csv: empty"),
        ("fake.xlsx --input=body", "fake.xlsx: cannot be read: "),
        ("fake.parquet --input=body", "fake.parquet: cannot be read: "),
        ("fake.csv.gz --input=body", "fake.csv.gz: cannot be read: Not a gzipped file"),
        ("bad.json --input=body", "bad.json: item 2: a int, not a JSON object"),
        ("folder --input=body --output=out", "folder: no train file"),
        ("folder --input=body", "--output: give the folder"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_a_line(files, line, message, capsys):
    before = sorted(files.iterdir())
    assert main(["data", *line.split()]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert sorted(files.iterdir()) == before


def test_the_command_writes_what_it_reports(files, capsys):
    line = "data good.csv --input=body --label=team --id=ticket --json=report.json"
    assert main(line.split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 rows: 2 train, 0 valid, 0 test\n")
    assert "│ a     │     1 │     0 │    0 │   1 │" in printed
    assert printed.endswith("no closed set of labels\ngood: written\n")
    assert json.loads((files / "good" / "train.jsonl").read_text().splitlines()[0]) == {
        "id": "1",
        "input": "hello there",
        "label": "a",
    }
    assert json.loads((files / "report.json").read_text())["rows"] == 2
    assert sorted(p.name for p in (files / "good").iterdir()) == ["train.jsonl"]


def test_a_missing_package_is_named_with_its_extra(files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(MissingPackageError, match=r"datasketch .*pip install 'dss\[tables\]'"):
        prepare(files / "good.csv", Columns(input=("body",)))


def test_a_table_in_place_of_a_dataset_says_what_to_do(files, capsys):
    flags = ("--gin_file=methods/finetune.gin", "--gin.DATASET_PATH=good.csv")
    assert main(["inspect", *flags]) == 2
    assert "good.csv: a table; give `input`" in capsys.readouterr().err
    with pytest.raises(DataError, match="a DataFrame: a table; give `input`"):
        dss.Dataset.from_files(pandas.DataFrame())

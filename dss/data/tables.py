"""Tables of other formats: CSV, TSV, Excel, Parquet, JSON, folders and hub ids of `datasets`."""

import csv
import gzip
import io
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dss.data.examples import read_json
from dss.errors import DataError, first_line, missing_package
from dss.paths import BYTE_ORDER_MARK, check_no_pipes

if TYPE_CHECKING:
    import pandas

__all__ = [
    "EXTENSIONS",
    "HUB",
    "TABLES",
    "cell_text",
    "extension_of",
    "is_table",
    "read_tables",
    "write_table",
]

HUB = "hf:"  # prefix of a dataset's id on the Hugging Face hub
SEPARATORS = ",;\t|"  # those that the header of a .csv may have
EXTENSIONS = (".csv", ".tsv", ".xlsx", ".parquet", ".json", ".jsonl")
TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".parquet")  # which hold no JSON lines
PACKED = ".gz"
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # in a folder of `datasets`
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    "test": "test",
}
MALFORMED = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile)
CELL = 32_767  # characters of an Excel cell
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def extension_of(path: str | os.PathLike[str]) -> str:
    """Returns a file's extension in lower case, without that of its compression.

    >>> extension_of("tickets.CSV.gz")
    '.csv'
    """
    name = Path(path).name.lower().removesuffix(PACKED)
    return Path(name).suffix


def is_table(source: Any) -> bool:
    """Returns whether a source is read by `read_tables`, not as a folder or file of JSON lines."""
    if not isinstance(source, str | os.PathLike):
        return True
    text = os.fspath(source)
    if text.startswith(HUB) or any((Path(text) / name).is_file() for name in SAVED):
        return True
    return text.lower().endswith(PACKED) or extension_of(text) in TABLES


def read_tables(
    source: Any, *, sheet: str | None = None, may_be_empty: bool = False
) -> "dict[str, pandas.DataFrame]":
    """Returns the tables of a source by split; "" is a table without a split.

    Text cells keep their text: in CSV files `007`, `1.0` and `NA` are no numbers and not missing.

    Args:
      source: a file (.csv, .tsv, .xlsx, .parquet, .json, .jsonl, any of them .gz), a folder with
        such files named by split, a folder of `datasets`, `hf:ID` for the Hugging Face hub, or a
        pandas DataFrame.
      sheet: the sheet of an Excel file; None for the first.
      may_be_empty: whether a table may have no rows.

    Raises:
      DataError: if the source is missing, of another format or malformed.
      MissingPackageError: if the package that reads it is not installed.
    """
    tables = _read(source, sheet)
    for table in tables.values():
        if table.empty and not may_be_empty:
            name = source if isinstance(source, str | os.PathLike) else "the table"
            raise DataError(f"{name}: no rows")
    return tables


def _read(source: Any, sheet: str | None) -> "dict[str, pandas.DataFrame]":
    try:
        import pandas
    except ImportError as error:
        raise missing_package("a table", error.name, "tables") from None
    if isinstance(source, pandas.DataFrame):
        return {"": source}
    if not isinstance(source, str | os.PathLike):
        raise DataError(f"give a file, a folder or a DataFrame, not a {type(source).__name__}")
    text = os.fspath(source)
    if text.startswith(HUB):
        return _from_datasets(text)
    path = Path(text).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    check_no_pipes(path)
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED):
            return _from_datasets(str(path))
        return _read_folder(path)
    return {"": _read_file(path, sheet)}


def _read_folder(folder: Path) -> "dict[str, pandas.DataFrame]":
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name, _, rest = path.name.lower().partition(".")
        split = SPLIT_OF.get(name) if f".{rest.removesuffix(PACKED)}" in EXTENSIONS else None
        if split and files.setdefault(split, path) != path:
            raise DataError(f"{folder}: {files[split].name} and {path.name} are both {split}")
    if "train" not in files:
        raise DataError(f"{folder}: no train file; give a file, or a folder with train.csv")
    return {split: _read_file(path, None) for split, path in files.items()}


def _read_file(path: Path, sheet: str | None) -> "pandas.DataFrame":
    import pandas

    kind = extension_of(path)
    try:
        if kind in (".csv", ".tsv"):
            table = _read_csv(path, kind)
        elif kind == ".xlsx":
            table = _read_excel(path, sheet)
        elif kind == ".parquet":
            table = pandas.read_parquet(path)
        elif kind in (".json", ".jsonl"):
            table = pandas.DataFrame(_read_json(path), dtype=object)
        else:
            raise DataError(f"{path}: give one of {', '.join(EXTENSIONS)}, or one of them .gz")
    except ImportError as error:
        raise missing_package(str(path), error.name, "tables") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (*MALFORMED, pandas.errors.ParserWarning) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None
    if sheet is not None and kind != ".xlsx":
        raise DataError(f"{path}: `sheet` is for Excel files")
    return table


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(PACKED) else path.open("rb")


def _read_csv(path: Path, kind: str) -> "pandas.DataFrame":
    import pandas

    with _open(path) as file:
        start = file.read(2)
        encoding = "utf-16" if start in UTF16 else "utf-8-sig"
        file.seek(0)
        content = file.read().decode(encoding)
    first = content.partition("\n")[0]
    separator = "\t" if kind == ".tsv" else max(SEPARATORS, key=first.count)
    header = next(csv.reader(io.StringIO(content), delimiter=separator), [])
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f"{path}: two columns are called {twice[0]!r}; rename one")
    with warnings.catch_warnings():
        # A row with more cells than the header is an error, not cut.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        try:
            return pandas.read_csv(
                io.StringIO(content),
                sep=separator,
                dtype=str,
                keep_default_na=False,
                index_col=False,
                skip_blank_lines=len(header) > 1,  # which are empty cells of a single column
            )
        except (ValueError, pandas.errors.ParserWarning) as error:
            raise DataError(
                _fault(path, content, separator) or f"{path}: {first_line(error)}"
            ) from None


def _fault(path: Path, content: str, separator: str) -> str:
    """Returns what is wrong with a CSV file that cannot be read."""
    rows = csv.reader(io.StringIO(content), delimiter=separator)
    width = len(next(rows, []))
    if not width:
        return f"{path}: empty"
    before = rows.line_num
    for row in rows:
        if len(row) > width:
            return (
                f"{path}:{before + 1}: {len(row)} cells, and the header has {width}; put cells "
                f"with {separator!r} or line breaks in double quotes"
            )
        before = rows.line_num
    return f"{path}: a double quote is not closed"


def _read_excel(path: Path, sheet: str | None) -> "pandas.DataFrame":
    import pandas

    with _open(path) as file, pandas.ExcelFile(file, engine="openpyxl") as book:
        names = [str(name) for name in book.sheet_names]
        if sheet is not None and sheet not in names:
            raise DataError(f"{path}: no sheet {sheet!r}; its sheets are {', '.join(names)}")
        chosen = names[0] if sheet is None else sheet
        return pandas.read_excel(book, chosen, dtype=object, keep_default_na=False)


def _read_json(path: Path) -> list[dict[str, Any]]:
    with _open(path) as file:
        text = file.read().decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    if text.lstrip().startswith("["):
        rows = read_json(str(path), text)
        places = [f"{path}: item {number}" for number in range(1, len(rows) + 1)]
    else:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        places = [f"{path}:{number}" for number, _ in lines]
        rows = [read_json(place, line) for place, (_, line) in zip(places, lines, strict=True)]
    for place, row in zip(places, rows, strict=True):
        if not isinstance(row, dict):
            raise DataError(f"{place}: a {type(row).__name__}, not a JSON object")
    return rows


def _from_datasets(source: str) -> "dict[str, pandas.DataFrame]":
    try:
        import datasets
    except ImportError as error:
        raise missing_package(source, error.name, "tables") from None
    try:
        found = (
            datasets.load_dataset(source.removeprefix(HUB))
            if source.startswith(HUB)
            else datasets.load_from_disk(source)
        )
    except Exception as error:  # of many kinds: no network, no such id, malformed files
        raise DataError(f"{source}: cannot be read: {first_line(error)}") from None
    parts = found if isinstance(found, Mapping) else {"": found}
    if len(parts) == 1:
        return {"": _frame(*parts.values())}
    out = {}
    for name, part in parts.items():
        if name not in SPLIT_OF:
            raise DataError(f"{source}: unknown split {name!r}; dss has train, valid and test")
        out[SPLIT_OF[name]] = _frame(part)
    return out


def _frame(part: Any) -> "pandas.DataFrame":
    """Returns a dataset as a table, with the names of class labels for their numbers."""
    table = part.to_pandas()
    for name, feature in part.features.items():
        if hasattr(feature, "int2str"):
            names = feature.names
            table[name] = [None if i is None or i < 0 else names[int(i)] for i in table[name]]
    return table


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as a CSV, TSV, Excel or Parquet file, by its extension, atomically.

    Args:
      path: the file; an existing one is replaced.
      rows: the value of each column; a missing one leaves the cell empty.

    Raises:
      MissingPackageError: if the package that writes it is not installed.
      DataError: if the format cannot hold a cell.
    """
    kind, partial = extension_of(path), path.with_name(f"{path.name}.partial")
    try:
        import pandas

        table = pandas.DataFrame(rows)
        for name in table.columns:  # a column of several types becomes text
            if pandas.api.types.infer_dtype(table[name]).startswith("mixed"):
                table[name] = [None if cell is None else cell_text(cell) for cell in table[name]]
        texts = (cell for row in rows for cell in row.values() if isinstance(cell, str))
        longest = max(map(len, texts), default=0)
        if kind == ".xlsx" and longest > CELL:
            raise DataError(
                f"{path}: a text of {longest:,} characters, and an Excel cell has at most "
                f"{CELL:,}; give a .csv or .parquet file"
            )
        with (gzip.open if path.name.lower().endswith(PACKED) else open)(partial, "wb") as file:
            if kind == ".xlsx":
                options = {"strings_to_formulas": False, "strings_to_urls": False}
                engine: Any = {"engine": "xlsxwriter", "engine_kwargs": {"options": options}}
                table.to_excel(file, index=False, **engine)
            elif kind == ".parquet":
                table.to_parquet(file, index=False)
            else:
                table.to_csv(file, index=False, sep="\t" if kind == ".tsv" else ",")
    except ImportError as error:
        raise missing_package(str(path), error.name, "tables") from None
    partial.replace(path)


def cell_text(value: Any) -> str:
    """Returns the text of a cell; "" if it is missing.

    >>> [cell_text(value) for value in ("a", 3.0, None, float("nan"), 2.5)]
    ['a', '3', '', '', '2.5']

    Raises:
      DataError: if the cell holds a list or an object.
    """
    if value is None or type(value).__name__ == "NAType":
        return ""
    if isinstance(value, list | dict | tuple) or (hasattr(value, "ndim") and value.ndim):
        raise DataError(f"a cell holds {str(value)[:40]}, not text")
    if value != value:  # NaN, or no date
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # tables with empty cells store whole numbers as floats
    return str(value)

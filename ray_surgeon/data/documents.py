"""Documents of a text: the standard library, installed packages, files and data sets."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import Distribution, distributions
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any, TypeVar

from ray_surgeon.config.base import REASON, refusing
from ray_surgeon.config.texts import TEXT_SUFFIXES, SourceSection
from ray_surgeon.storage import files, sources
from ray_surgeon.storage.sources import HTTP_ERROR

P = TypeVar("P", bound=PurePath)

TRAIN_SHARE = 0.8
"""Part of a source without splits that is `train`; the rest is `test`."""


_DATA_SET_ERRORS = (OSError, ValueError, KeyError, RuntimeError, HTTP_ERROR)
"""Errors of reading a data set when it, or the network, is not there.

`datasets` has its own subclasses of these.
"""


PIECE_BYTES = 64 * 2**20


_NOT_CODE = frozenset(
    {"site-packages", "dist-packages", "pydoc_data", "lib2to3", "__pycache__"}
)
"""Folders of the standard library with other things than its own code, or with copies of it."""


_LONGER = 300
"""Characters from which a docstring is prose rather than a label."""


_PARAGRAPH = 120
"""Shortest paragraph of a description, in characters, that may be prose, not a heading."""


_PLAIN = 0.94
"""Least share of letters, spaces and punctuation among the characters of prose."""


def documents_of(text: SourceSection, where: str) -> Iterator[str]:
    """Yield the documents of a source."""
    installed: dict[str, Callable[[], Iterator[str]]] = {
        "python-docs": _topics,
        "python-docstrings": _docstrings,
        "python-code": functools.partial(_code, text.split),
        "package-docstrings": _package_docstrings,
        "package-descriptions": _descriptions,
    }
    read = _file_documents if text.source.endswith(TEXT_SUFFIXES) else _dataset_documents
    try:
        yield from installed.get(text.source, functools.partial(read, text))()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def is_split_here(text: SourceSection) -> bool:
    """Whether train and test are cut from a text's tokens, because its source has no splits."""
    if text.split == "all":
        return False
    return is_saved_whole(text) or (text.has_own_split and text.source != "python-code")


def _topics() -> Iterator[str]:
    """Yield the topics of Python's own help."""
    from pydoc_data.topics import topics

    yield from topics.values()


def _docstrings() -> Iterator[str]:
    """Yield the longer docstrings of the standard library, module by module."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield from _of_module(path)


@functools.cache
def _of_module(path: Path) -> tuple[str, ...]:
    """Return the longer docstrings of a module, which several texts of a job read."""
    return tuple(_docstrings_in(path, of_modules=True))


def _docstrings_in(path: Path, *, of_modules: bool) -> Iterator[str]:
    """Yield the longer docstrings of the classes and functions in a file.

    That of the file itself comes if it is wanted.
    """
    documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, documented) or (of_modules and isinstance(node, ast.Module)):
            docstring = ast.get_docstring(node) or ""
            if len(docstring) >= _LONGER:
                yield docstring


def _code(split: str) -> Iterator[str]:
    """Yield source files of the packages of the standard library, in an order that mixes packages.

    Files are drawn for train and test one by one, so that how much is read does not matter; split
    all has both. Modules outside of packages are left out, because python-docstrings are theirs,
    and so is pydoc_data, which holds the text of python-docs.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for digest, path in _drawn(path.relative_to(root) for path in root.glob("*/**/*.py")):
        is_test = digest[-1] >= TRAIN_SHARE * 256
        is_wanted = split == "all" or is_test == (split == "test")
        if is_wanted and _NOT_CODE.isdisjoint(path.parts):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if source := (root / path).read_text(encoding="utf-8").strip():
                    yield source


def _package_docstrings() -> Iterator[str]:
    """Yield the longer docstrings of the installed packages: of a file of each in turns.

    The beginning has something of all then. Those of modules, which packages repeat in their
    descriptions, and copies of the standard library's are left out, because these texts are
    measured on.
    """
    modules = [[f for f in each.files or () if f.suffix == ".py"] for each in _packages()]
    seen = set(_docstrings())
    for turn in zip_longest(*map(_drawn, modules)):
        for _, file in filter(None, turn):
            # a package may bring templates, or files that were removed
            with contextlib.suppress(OSError, SyntaxError, UnicodeError):
                for docstring in _docstrings_in(
                    Path(str(file.locate())), of_modules=False
                ):
                    if docstring not in seen:
                        seen.add(docstring)
                        yield docstring


def _drawn(paths: Iterable[P]) -> list[tuple[bytes, P]]:
    """Return those of files that are no tests in an order that mixes them, which digests give."""
    kept = (path for path in paths if not any("test" in part for part in path.parts))
    return sorted(
        (hashlib.sha256(path.as_posix().encode()).digest(), path) for path in kept
    )


def _packages() -> list[Distribution]:
    """Return the installed packages in order of their names; of equal names the last one counts."""
    by_name = {
        str(package.metadata["Name"]).lower(): package for package in distributions()
    }
    return [by_name[name] for name in sorted(by_name)]


def _descriptions() -> Iterator[str]:
    """Yield the prose in the installed packages' descriptions, in order of their names."""
    for package in _packages():
        text = str(package.metadata.json.get("description") or "")
        paragraphs = text.replace("\r\n", "\n").split("\n\n")
        if prose := list(filter(_is_prose, map(str.strip, paragraphs))):
            yield "\n\n".join(prose)


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences, not code, a table, a list of links or badges."""
    plain = sum(character.isalpha() or character in " \n.,;'" for character in paragraph)
    is_plain = plain >= _PLAIN * len(paragraph) and "```" not in paragraph
    return is_plain and len(paragraph) >= _PARAGRAPH


def _file_documents(text: SourceSection) -> Iterator[str]:
    remedy = "check the address, the permissions and the network"
    column = text.column
    with refusing(f"cannot read {text.source}", remedy):
        uris = files.glob(text.source)
        if not uris:
            raise ValueError(
                f"there is no file {text.source}; give .txt, .jsonl or .parquet"
            )
        for uri in uris:
            if uri.endswith(".txt"):
                yield from _pieces(uri)
                continue
            records = (
                _json_lines(uri) if uri.endswith(".jsonl") else _parquet_rows(uri, column)
            )
            yield from _texts_of(records, column, f"of {uri} has no text in {column!r}")


def _texts_of(records: Iterable[Any], column: str, lacks: str) -> Iterator[str]:
    """Yield a column of records; `lacks` says what is wrong with one that does not have it."""
    for number, record in enumerate(records, start=1):
        is_object = isinstance(record, dict)
        text = record.get(column) if is_object else None
        if not isinstance(text, str):
            known = sorted(record) if is_object else type(record).__name__
            raise ValueError(f"record {number} {lacks}; it has {known}; set the column")
        yield text


def _pieces(uri: str) -> Iterator[str]:
    """Yield a text as one document, or a very large one as several.

    So its end need not be read.
    """
    size = files.size_bytes(uri)
    if size is not None and size <= PIECE_BYTES:
        yield files.read_text(uri)
        return
    for lines in batches(
        (line + "\n" for line in sources.read_lines(uri)), PIECE_BYTES + 1
    ):
        yield "".join(lines).removesuffix("\n")


def batches(
    texts: Iterable[str], max_length: int, count: int | None = None
) -> Iterator[list[str]]:
    """Yield texts in lists, which end with `max_length` characters or `count` texts."""
    batch: list[str] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= max_length or len(batch) == count:
            yield batch
            batch = []
            length = 0
    if batch:
        yield batch


def _json_lines(uri: str) -> Iterator[Any]:
    for number, line in enumerate(sources.read_lines(uri), start=1):
        said = f"line {number} of {uri} is not JSON ({REASON})"
        with refusing(said, "one JSON object a line is expected", files.JSON_ERRORS):
            if line.strip():
                yield json.loads(line)


def _parquet_rows(uri: str, column: str) -> Iterator[Any]:
    import pyarrow.parquet

    path = sources.local_copy(uri)
    damaged = f"{uri} is not a parquet file ({REASON})"
    with (
        refusing(damaged, "check the file", pyarrow.ArrowInvalid),
        open(path, "rb") as file,
    ):
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if column not in names:
            raise ValueError(
                f"{uri} has no column {column!r}; it has {names}; set the column"
            )
        for batch in table.iter_batches(columns=[column]):
            yield from batch.to_pylist()


def is_saved_whole(text: SourceSection) -> bool:
    """Whether a text is a local data set of the library datasets, without splits.

    Its train and test are cut from it here.
    """
    return os.path.exists(Path(text.source) / "dataset_info.json")


def _dataset_documents(text: SourceSection) -> Iterator[str]:
    import datasets

    kinds = ", ".join(TEXT_SUFFIXES)
    remedy = f"check name, config, split and network, or give files ending in {kinds}"
    named = f"{text.source!r} (config {text.config}, split {text.split})"
    with refusing(f"cannot read the data set {named}", remedy, _DATA_SET_ERRORS):
        if is_saved_whole(text) or os.path.exists(
            Path(text.source) / "dataset_dict.json"
        ):
            dataset = datasets.load_from_disk(text.source)
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[text.split]
            elif text.split not in text.own_splits:
                raise ValueError(
                    f"it has no splits, only {' and '.join(text.own_splits)} are cut"
                )
        else:
            options = {"split": text.split, "revision": text.revision, "streaming": True}
            dataset = datasets.load_dataset(text.source, text.config, **options)
        yield from _texts_of(
            dataset, text.column, f"has no text in column {text.column!r}"
        )

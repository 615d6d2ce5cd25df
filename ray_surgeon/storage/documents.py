"""Documents of a text: the standard library, installed packages, files and data sets."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ray_surgeon.spec.texts import TEXT_SUFFIXES, SourceSection
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import HTTP_ERROR

TRAIN_SHARE = 0.8
"""Part of a source without splits that is `train`; the rest is `test`."""


_DATA_SET_ERRORS = (OSError, ValueError, KeyError, RuntimeError, HTTP_ERROR)
"""What reading a data set raises when it, or the network, is not there.

`datasets` has its own subclasses of these.
"""


PIECE_BYTES = 64 * 2**20


_NOT_CODE = frozenset({"site-packages", "dist-packages", "pydoc_data", "lib2to3", "__pycache__"})
"""Folders of the standard library with other things than its own code, or with copies of it."""


_LONGER = 300
"""Characters from which a docstring is prose rather than a label."""


_PARAGRAPH = 120
"""Characters from which a paragraph of a description is prose rather than a heading,"""


_PLAIN = 0.94
"""if so many of them are letters, spaces and punctuation."""


def documents_of(text: SourceSection, where: str) -> tuple[Iterator[str], bool]:
    """Return the documents of a source and whether the source itself made the split."""
    if text.source == "python-docs":
        from pydoc_data.topics import topics

        return iter(topics.values()), False
    if text.source == "python-docstrings":
        return _docstrings(), False
    if text.source == "python-code":
        return _code(text.split), True
    if text.source == "package-docstrings":
        return _package_docstrings(), False
    if text.source == "package-descriptions":
        return _descriptions(), False
    if text.source.endswith(TEXT_SUFFIXES):
        return _file_documents(text, where), False
    return _dataset_documents(text, where)


def _docstrings() -> Iterator[str]:
    """Yield the longer docstrings of the standard library, module by module."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield from _docstrings_in(path, of_modules=True)


def _docstrings_in(path: Path, *, of_modules: bool) -> Iterator[str]:
    """Yield the longer docstrings of the classes and functions in a file.

    That of the file itself comes if it is wanted.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or (
            of_modules and isinstance(node, ast.Module)
        ):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= _LONGER:
                yield docstring


def _code(split: str) -> Iterator[str]:
    """Yield source files of the packages of the standard library, in an order that mixes packages.

    Files are drawn for train and test one by one, so that how much is read does not matter. Modules
    outside of packages are left out, because python-docstrings are theirs, and so is pydoc_data,
    which holds the text of python-docs.
    """
    root = Path(sysconfig.get_path("stdlib"))
    drawn = []
    for path in root.glob("*/**/*.py"):
        inside = path.relative_to(root)
        is_test = any("test" in part.lower() for part in inside.parts)
        if not is_test and not _NOT_CODE.intersection(inside.parts):
            drawn.append((hashlib.sha256(inside.as_posix().encode()).digest(), path))
    for digest, path in sorted(drawn):
        if (digest[-1] >= TRAIN_SHARE * 256) == (split == "test"):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if source := path.read_text(encoding="utf-8").strip():
                    yield source


def _package_docstrings() -> Iterator[str]:
    """Yield the longer docstrings of the installed packages: of a file of each in turns.

    The beginning has something of all then. Those of modules, which packages repeat in their
    descriptions, and copies of the standard library's are left out, because these texts are
    measured on.
    """
    files_of = {}
    for package in distributions():
        sources = [
            file
            for file in package.files or ()
            if file.suffix == ".py" and not any("test" in part for part in file.parts)
        ]
        drawn = sorted(sources, key=lambda file: hashlib.sha256(file.as_posix().encode()).digest())
        files_of[str(package.metadata["Name"]).lower()] = [
            Path(str(file.locate())) for file in drawn
        ]
    seen = set(_docstrings())
    for turn in zip_longest(*(paths for _, paths in sorted(files_of.items()))):
        for path in turn:
            # a package may bring templates, or files that were removed
            with contextlib.suppress(OSError, SyntaxError, UnicodeError):
                for docstring in () if path is None else _docstrings_in(path, of_modules=False):
                    if docstring not in seen:
                        seen.add(docstring)
                        yield docstring


def _descriptions() -> Iterator[str]:
    """Yield the prose in the installed packages' descriptions, in order of their names."""
    descriptions = {
        str(package.metadata["Name"]).lower(): package.metadata.json.get("description")
        for package in distributions()
    }
    for _, description in sorted(descriptions.items()):
        paragraphs = (
            paragraph.strip()
            for paragraph in str(description or "").replace("\r\n", "\n").split("\n\n")
        )
        if prose := [paragraph for paragraph in paragraphs if _is_prose(paragraph)]:
            yield "\n\n".join(prose)


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences, not code, a table, a list of links or badges."""
    plain = sum(character.isalpha() or character in " \n.,;'" for character in paragraph)
    return (
        len(paragraph) >= _PARAGRAPH and plain >= _PLAIN * len(paragraph) and "```" not in paragraph
    )


def _file_documents(text: SourceSection, where: str) -> Iterator[str]:
    try:
        uris = files.glob(text.source)
    except OSError as error:
        raise ValueError(
            f"{where}: cannot read {text.source}: {error}; check the address, the credentials and "
            "the network"
        ) from error
    if not uris:
        raise ValueError(
            f"{where}: there is no file {text.source}; give a .txt, .jsonl or .parquet file, * for "
            "several"
        )
    for uri in uris:
        try:
            yield from _documents_in(uri, text.column, where)
        except OSError as error:
            raise ValueError(
                f"{where}: cannot read {uri}: {error}; check the permissions and the network"
            ) from error


def _documents_in(uri: str, column: str, where: str) -> Iterator[str]:
    if uri.endswith(".txt"):
        try:
            yield from _pieces(uri)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return
    records = (
        _json_lines(uri, where) if uri.endswith(".jsonl") else _parquet_rows(uri, column, where)
    )
    for number, record in enumerate(records, start=1):
        value = record.get(column) if isinstance(record, dict) else None
        if not isinstance(value, str):
            known = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{where}: record {number} of {uri} has no text in {column!r}; it has {known}; set "
                "the column"
            )
        yield value


def _pieces(uri: str) -> Iterator[str]:
    """Yield a text as one document, or a very large one as several.

    So its end need not be read.
    """
    size = files.size_bytes(uri)
    if size is not None and size <= PIECE_BYTES:
        yield files.read_text(uri)
        return
    lines: list[str] = []
    length = 0
    for line in files.read_lines(uri):
        lines.append(line)
        length += len(line) + 1
        if length > PIECE_BYTES:
            yield "\n".join(lines)
            lines = []
            length = 0
    if lines:
        yield "\n".join(lines)


def _json_lines(uri: str, where: str) -> Iterator[Any]:
    for number, line in enumerate(files.read_lines(uri), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(
                    f"{where}: line {number} of {uri} is not JSON ({error}); one JSON object a "
                    "line is expected"
                ) from error


def _parquet_rows(uri: str, column: str, where: str) -> Iterator[Any]:
    import pyarrow.parquet

    with open(files.local_copy(uri), "rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            if column not in table.schema_arrow.names:
                raise ValueError(
                    f"{where}: {uri} has no column {column!r}; it has {table.schema_arrow.names}; "
                    "set the column"
                )
            for batch in table.iter_batches(columns=[column]):
                yield from batch.to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"{where}: {uri} is not a parquet file ({error}); check the file"
            ) from error


def is_saved_whole(text: SourceSection) -> bool:
    """Whether a text is a local data set of the library datasets, without splits.

    Its train and test are cut from it here.
    """
    return os.path.exists(Path(text.source) / "dataset_info.json")


def _dataset_documents(text: SourceSection, where: str) -> tuple[Iterator[str], bool]:
    import datasets

    try:
        if is_saved_whole(text) or os.path.exists(Path(text.source) / "dataset_dict.json"):
            loaded = datasets.load_from_disk(text.source)
            has_splits = isinstance(loaded, datasets.DatasetDict)
            if not has_splits and text.split not in ("train", "test"):
                raise ValueError("it has no splits, so only train and test can be cut from it")
            dataset = loaded[text.split] if has_splits else loaded
        else:
            has_splits = True
            dataset = datasets.load_dataset(
                text.source, text.config, split=text.split, revision=text.revision, streaming=True
            )
    except _DATA_SET_ERRORS as error:
        raise _data_set_error(text, where, error) from error
    return _records_text(dataset, text, where), has_splits


def _records_text(dataset: Iterable[Any], text: SourceSection, where: str) -> Iterator[str]:
    try:
        for number, record in enumerate(dataset, start=1):
            if not isinstance(record.get(text.column), str):
                known = sorted(record)
                raise ValueError(
                    f"record {number} has no text in column {text.column!r}; it has {known}; set "
                    "the column"
                )
            yield record[text.column]
    except _DATA_SET_ERRORS as error:
        raise _data_set_error(text, where, error) from error


def _data_set_error(text: SourceSection, where: str, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"{where}: cannot read the data set {text.source!r} (config {text.config}, split "
        f"{text.split}): {reason}; check name, config, split and network, or give files ending in "
        f"{', '.join(TEXT_SUFFIXES)}"
    )

"""Token windows for calibration and evaluation: deterministic, packed, with a fingerprint.

A text is one long stream of tokens: documents joined by blank lines, no special tokens, no padding.
Windows are cut from it. Where the tokenizer begins a text with a token of its own, every window
begins with it: such models are lost without it.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from ray_surgeon.spec.calibration import CalibrationSection
from ray_surgeon.spec.texts import TEXT_SUFFIXES, SourceSection
from ray_surgeon.spec.written import START_TOKENS
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import HTTP_ERROR

_CALIBRATION_FRACTION = 0.8
"""Part of a source without splits that is `train`; the rest is `test`."""
_DATA_SET_ERRORS = (OSError, ValueError, KeyError, RuntimeError, HTTP_ERROR)
"""What reading a data set raises when it, or the network, is not there.

`datasets` has its own subclasses of these.
"""
_FEWEST_TOKENS = 4
_PIECE_BYTES = 64 * 2**20
_DOCUMENTS_PER_CALL = 1000
"""Documents joined for one call of the tokenizer, so that a large corpus is not one string."""
_CODE_FILES_PER_CALL = 16
"""Likewise of files of code, which are long: what is not wanted need not be tokenized."""


_NOT_CODE = frozenset({"site-packages", "dist-packages", "pydoc_data", "lib2to3", "__pycache__"})
"""Folders of the standard library with other things than its own code, or with copies of it."""


_LONGER = 300
"""Characters from which a docstring is prose rather than a label."""


_PARAGRAPH = 120
"""Characters from which a paragraph of a description is prose rather than a heading,"""
_PLAIN = 0.94
"""if so many of them are letters, spaces and punctuation."""


@dataclass(frozen=True)
class Windows:
    """Windows of one text."""

    tokens: NDArray[np.int64]  # [num_sequences, sequence_length] int64
    fingerprint: str  # SHA-256 over the tokens


def cut_windows(
    stream: NDArray[np.int64],
    num_sequences: int,
    sequence_length: int,
    stride: int | None,
    seed: int,
    where: str,
    first: int | None = None,
) -> Windows:
    """Cut windows from a stream of tokens.

    Args:
        stream: [num_tokens].
        num_sequences: how many windows.
        sequence_length: tokens in each.
        stride: window i starts at token ``stride * i``; None draws windows that do not overlap,
            without replacement.
        seed: of the draw.
        where: field and source, for the error.
        first: token that every window begins with; the text has one place less then.

    Raises:
        ValueError: the text is too short; says how much there is and how much is needed.
    """
    own = sequence_length - (first is not None)
    needed = (num_sequences - 1) * stride + own if stride else num_sequences * own
    if len(stream) < needed:
        raise ValueError(
            f"{where}: the text has {len(stream)} tokens, but {num_sequences} sequences of "
            f"{sequence_length}{f' at stride {stride}' if stride else ''} need {needed}; give more "
            "text, or fewer or shorter sequences"
        )
    _check_variety(stream, where)
    if stride:
        starts = np.arange(num_sequences) * stride
    else:
        starts = np.random.default_rng(seed).permutation(len(stream) // own)[:num_sequences] * own
    tokens = np.stack([stream[start : start + own] for start in starts]).astype(np.int64)
    return windows_of(tokens if first is None else np.insert(tokens, 0, first, axis=1))


def load_tokenizer(folder: Path, origin: str) -> Any:
    """Return the tokenizer that lies beside a config.json.

    Args:
        folder: on this machine.
        origin: where it came from, for errors.

    Raises:
        ValueError: there is none, it is code, or spaces get lost in it.
    """
    said = folder / "tokenizer_config.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the code of any tokenizer may raise anything
        reason = " ".join(str(error).split())[:300]
        remedy = "copy its files beside config.json"
        if said.exists() and '"auto_map"' in said.read_text(encoding="utf-8", errors="replace"):
            remedy = (
                "it is code, which is never run, so make a tokenizer.json of it, or give model and "
                "tokenizer in memory"
            )
        raise ValueError(
            f"model.source: {origin} has no tokenizer that loads ({reason}); {remedy}"
        ) from error
    # some versions take the class for the file's
    if "ab" in tokenizer.decode(tokenizer("a b", add_special_tokens=False)["input_ids"]):
        raise ValueError(
            f"model.source: the tokenizer of {origin} loses spaces as transformers loads it; take "
            "another version of transformers"
        )
    return tokenizer


def first_token(tokenizer: Any) -> int | None:
    """Return the token that a transformers tokenizer itself puts before a text, if there is one."""
    plain, whole = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
    )
    return int(whole[0]) if len(whole) > len(plain) and whole[0] == tokenizer.bos_token_id else None


def order(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return (text, window) of the windows of several texts, evenly spread."""
    places = [
        ((i + 0.5) / count, number, i) for number, count in enumerate(counts) for i in range(count)
    ]
    return [(number, i) for _, number, i in sorted(places)]


def interleaved(parts: Sequence[Windows]) -> Windows:
    """Return the windows of several texts in one; see `order`."""
    if len(parts) == 1:
        return parts[0]
    return windows_of(
        np.stack(
            [parts[number].tokens[i] for number, i in order([len(part.tokens) for part in parts])]
        )
    )


def windows_of(tokens: NDArray[np.int64]) -> Windows:
    """Return tokens [num_sequences, sequence_length] with their fingerprint."""
    return Windows(tokens, hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest())


def _check_variety(stream: NDArray[np.int64], where: str) -> None:
    different = len(np.unique(stream))
    if different < min(_FEWEST_TOKENS, len(stream)):
        raise ValueError(
            f"{where}: the whole text has only {different} different tokens; give real text"
        )


def token_stream(text: SourceSection, tokenizer: Any, where: str) -> NDArray[np.int64]:
    """Tokenize a text into one stream [num_tokens], at most `max_tokens` long.

    Args:
        text: which text.
        tokenizer: a transformers tokenizer.
        where: the field of the job spec, for errors.

    Raises:
        ValueError: the text cannot be found or read, or has no such split or column.
    """
    documents, has_splits = _documents(text, where)
    pieces = []
    count = 0
    per_call = _CODE_FILES_PER_CALL if text.source == "python-code" else _DOCUMENTS_PER_CALL
    for chunk in _joined(documents, per_call):
        ids = tokenizer(
            chunk, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        pieces.append(np.asarray(ids, dtype=np.int64))
        count += len(ids)
        if count >= text.max_tokens:
            break
    stream = np.concatenate(pieces)[: text.max_tokens] if pieces else np.zeros(0, dtype=np.int64)
    if has_splits:
        return stream
    border = int(len(stream) * _CALIBRATION_FRACTION)
    return stream[:border] if text.split == "train" else stream[border:]


def _joined(documents: Iterable[str], per_call: int) -> Iterator[str]:
    batch: list[str] = []
    length = 0
    for document in documents:
        batch.append(document)
        length += len(document)
        if len(batch) == per_call or length >= _PIECE_BYTES:
            yield "\n\n".join(batch) + "\n\n"
            batch = []
            length = 0
    if batch:
        yield "\n\n".join(batch)


def _documents(text: SourceSection, where: str) -> tuple[Iterator[str], bool]:
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
        if (digest[-1] >= _CALIBRATION_FRACTION * 256) == (split == "test"):
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
    found = {
        str(package.metadata["Name"]).lower(): package.metadata.json.get("description")
        for package in distributions()
    }
    for _, description in sorted(found.items()):
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
    if size is not None and size <= _PIECE_BYTES:
        yield files.read_text(uri)
        return
    lines: list[str] = []
    length = 0
    for line in files.read_lines(uri):
        lines.append(line)
        length += len(line) + 1
        if length > _PIECE_BYTES:
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


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file, and its answer if the file gives one."""

    tokens: tuple[int, ...]  # of the prompt, with those of the chat template
    text: str  # that they stand for
    answer: tuple[int, ...] | None  # with the token that ends it; None: the model is to write it


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how conversations of its model look."""
    return bool(getattr(tokenizer, "chat_template", None))


def read_prompts(uri: str, tokenizer: Any, where: str, longest: int | None = None) -> list[Prompt]:
    """Read a file of prompts.

    Args:
        uri: on any file system. Each line is a JSON object with `prompt` or `messages`.
        tokenizer: a transformers tokenizer.
        where: the field of the job spec, for errors.
        longest: tokens that a prompt may have.

    Raises:
        ValueError: the file cannot be read or is empty, or a line is no prompt; names the line.
    """
    try:
        lines = list(files.read_lines(uri))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{where}: cannot read {uri}: {error}; check the address, the permissions and the "
            "network"
        ) from error
    prompts = []
    first = first_token(tokenizer)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        at = f"{where}: line {number} of {uri}"
        prompts.append(_prompt(_record(line, at), tokenizer, first, at))
        size = len(prompts[-1].tokens)
        if longest is not None and size > longest:
            raise ValueError(
                f"{at} is a prompt of {size} tokens, but only {longest} leave room for an answer; "
                "shorten it, or remove the line"
            )
    if not prompts:
        raise ValueError(f"{where}: {uri} has no lines; {_LINES}")
    return prompts


_LINES = 'write one JSON object a line, {"prompt": "..."} or {"messages": [{"role": "user", ...}]}'


def _record(line: str, at: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{at} is not JSON ({error}); {_LINES}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{at} is a {type(record).__name__}, not an object; {_LINES}")
    if ("prompt" in record) == ("messages" in record):
        given = sorted(map(str, record))
        raise ValueError(f"{at} has {given}, but one of prompt and messages is needed; {_LINES}")
    return record


def _prompt(record: Mapping[str, Any], tokenizer: Any, first: int | None, at: str) -> Prompt:
    """Return the prompt of a line; `first` is the token that the tokenizer puts before a text."""
    if "messages" in record:
        return _of_messages(_messages(record["messages"], at), tokenizer, at)
    text = record["prompt"]
    if not isinstance(text, str) or not text:
        raise ValueError(f"{at} has a prompt {text!r}, expected a text that is not empty; {_LINES}")
    tokens = _tokens(tokenizer, text)
    return Prompt(tokens if first is None else (first, *tokens), text, None)


def _messages(given: Any, at: str) -> list[dict[str, str]]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"{at} has messages that are no list of messages; {_LINES}")
    for message in given:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{at} has a message without a text as its content; {_LINES}")
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(
                f"{at} has a message of role {message.get('role')!r}; known are system, user and "
                "assistant"
            )
    roles = [message["role"] for message in given]
    if "user" not in roles or roles[-1] == "system":
        raise ValueError(
            f"{at} has messages of {', '.join(roles)}; one of a user must be there, and the last "
            "one is of a user, or of the assistant if the answer is given"
        )
    if roles[-1] == "assistant" and not given[-1]["content"].strip():
        raise ValueError(f"{at} has an empty answer; remove that message to let the model answer")
    return [{"role": message["role"], "content": message["content"]} for message in given]


def _of_messages(messages: list[dict[str, str]], tokenizer: Any, at: str) -> Prompt:
    if not has_chat_template(tokenizer):
        raise ValueError(
            f"{at} has messages, but the model's tokenizer has no chat template; give prompt, a "
            "text that the model continues"
        )
    answer = None
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    try:
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are code of the model's, which may raise anything
        raise ValueError(
            f"{at}: the model's chat template refuses these messages ({error}); change their roles"
        ) from error
    if asked is not messages:
        said = messages[-1]["content"].strip()
        after = _tokens(tokenizer, whole.rpartition(said)[2])
        answer = (*_tokens(tokenizer, said), *after[:1])
    return Prompt(_tokens(tokenizer, text), text, answer)


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


_CHAT_SHARE = 1 / 4
"""Of the windows of a default mix, conversations that the model writes, if it has a chat template.
"""
_CONTINUED_SHARE = {True: 1 / 4, False: 1 / 2}
"""Share of what the model writes after `def ` and after beginnings of docstrings.

The first is with a chat template, the second without.
"""
_FUNCTIONS_SHARE = 3 / 4
"""Of these, functions that it writes after `def `.

What a coder can do lives on them: see docs/results.md.
"""
_SHARES = {"python-docstrings": 1 / 32, "python-docs": 1 / 32}
"""Of the windows, what is taken of small texts. All that is left is python-code."""
_SMALL_TEXT_TOKENS = 48_000
"""Tokens that are taken of a small text, at most, so that some are left for a search."""
_CODE_TOKENS = 400_000
"""Tokens of code from which windows are drawn, if a job does not need more."""
_SHORTEST_TEXT = 64
"""Tokens of a text of a model without a chat template, at least, where several fill a window."""


def default_mix(section: CalibrationSection, tokenizer: Any) -> tuple[CalibrationSection, str]:
    """Return the texts that a calibration of source auto stands for.

    Args:
        section: the calibration, of source auto.
        tokenizer: of the model.

    Returns:
        The calibration with its texts, and a line for people about them.

    Raises:
        ValueError: answers are to be weighed, and the model has no chat template.
    """
    count = section.num_sequences
    length = section.sequence_length
    seed = section.seed
    is_chat = has_chat_template(tokenizer)
    if section.weigh == "answers" and not is_chat:
        raise ValueError(
            "calibration.weigh: answers, but the model has no chat template, so that nothing it "
            "writes is an answer; remove it, or give a source self with prompts"
        )
    num_chat = max(1, int(count * _CHAT_SHARE)) if is_chat else 0
    num_continued = int(count * _CONTINUED_SHARE[is_chat])
    small = {
        name: min(int(count * share), _SMALL_TEXT_TOKENS // length)
        for name, share in _SHARES.items()
    }
    num_code = count - num_chat - num_continued - sum(small.values())
    code_tokens = max(_CODE_TOKENS, 2 * num_code * length)
    num_functions = math.ceil(num_continued * _FUNCTIONS_SHARE)
    begun = {
        "starts": {"source": "python-docstrings"},
        "start_tokens": min(START_TOKENS, length // 2),
    }
    texts: list[tuple[int, dict[str, Any]]] = [
        (num_chat, {"source": "self", "chat": True}),
        (
            num_functions,
            {"source": "self", "texts_per_sequence": _texts_in(length, 2), "prompt": "def "},
        ),
        (
            num_continued - num_functions,
            {"source": "self", "texts_per_sequence": _texts_in(length, 4), **begun},
        ),
        (num_code, {"source": "python-code", "max_tokens": code_tokens}),
    ]
    texts += [(number, {"source": name}) for name, number in small.items()]
    (weight, main), *others = [(number, text) for number, text in texts if number]
    found = CalibrationSection.model_validate(
        {
            **main,
            "seed": seed,
            "weight": weight if others else 1.0,
            "num_sequences": count,
            "sequence_length": length,
            "weigh": section.weigh,
            "held_aside": section.held_aside,
            "mix": [{**text, "seed": seed, "weight": number} for number, text in others],
        }
    )
    parts = [f"{num_chat} of conversations that the model writes"] if num_chat else []
    parts += (
        [f"{num_continued} that it writes after `def ` and beginnings of docstrings"]
        if num_continued
        else []
    )
    parts += [
        f"{number} of {text['source']}"
        for number, text in texts
        if text["source"] != "self" and number
    ]
    return found, (
        f"calibration.source auto: {count} windows of {length} tokens, {', '.join(parts)}; to "
        "change this, name a source, and more in calibration.mix"
    )


def _texts_in(length: int, most: int) -> int:
    """Return how many texts of the model, none of them short, fill a window."""
    return most if length % most == 0 and length >= most * _SHORTEST_TEXT else 1


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

"""Streams of texts, against windows cut by hand from all of their tokens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast as FastTokenizer

from ray_surgeon.config.texts import SourceSection, StreamedSection
from ray_surgeon.data import documents, texts
from ray_surgeon.data.texts import TextEndedError, TextStream
from tests.integration.runs import beginning

DOCUMENTS = [
    f"Document {i}: " + " ".join(f"saw {n**7} dogs." for n in range(6 * i, 6 * i + 6))
    for i in range(40)
]
LENGTH = 16


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    return path


def whole(tokenizer: FastTokenizer) -> list[int]:
    return tokenizer("\n\n".join(DOCUMENTS), add_special_tokens=False)["input_ids"]


def cut(tokens: list[int], length: int = LENGTH) -> list[list[int]]:
    return [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]


def streamed(*sources: object, **fields: object) -> list[tuple[StreamedSection, str]]:
    """Return sections with the same fields, one per source."""
    return [
        (
            StreamedSection.model_validate(
                {"source": str(source), "split": "all", **fields}
            ),
            f"t.{i}",
        )
        for i, source in enumerate(sources)
    ]


def drained(stream: TextStream) -> list[list[int]]:
    """Return all windows of a stream until a text ends."""
    windows = list[list[int]]()
    with contextlib.suppress(TextEndedError):
        for window in stream.windows():
            windows.append(window.tolist())
    return windows


def test_calibration_windows_are_repeated_in_another_order(
    lines: Path, tokenizer: FastTokenizer
) -> None:
    sections = [*streamed(lines), (StreamedSection(source="calibration"), "t.1")]
    calibration = -np.arange(1, 5 * LENGTH + 1).reshape(5, LENGTH)
    stream = TextStream(sections, LENGTH, tokenizer, 0, calibration=calibration)
    stream.check_length(20)
    found = [window.tolist() for window in islice(stream.windows(), 20)]
    own = [window for window in found if window[0] < 0]
    assert len(own) == 10
    first, second = own[:5], own[5:]
    assert sorted(first) == sorted(second) == sorted(calibration.tolist())
    assert first != second
    assert [window.tolist() for window in islice(stream.windows(7), 13)] == found[7:]


def test_windows_exclude_text_held_aside(lines: Path, tokenizer: FastTokenizer) -> None:
    """The windows have 64 tokens. One held-aside window overlaps two of them, the other one is of
    another text.
    """
    tokens = whole(tokenizer)
    windows = cut(tokens, 64)
    held = np.array([tokens[5 * 64 + 32 : 6 * 64 + 32], list(range(64))])
    stream = TextStream(streamed(lines), 64, tokenizer, 0, buffer=1, held=held)
    assert drained(stream) == windows[:5] + windows[7:]


@pytest.mark.parametrize("where", ["jsonl", "parquet", "txt", "memory", "hub", "saved"])
def test_windows_are_consecutive_pieces_of_the_text(
    where: str, lines: Path, tokenizer: FastTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a buffer of one window they are in order, and every whole window comes once."""
    source: object = lines
    if where == "parquet":
        source = lines.with_name("text.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), source)
    if where == "txt":
        source = lines.with_name("text.txt")
        Path(source).write_text("\n\n".join(DOCUMENTS))
    if where == "memory":
        source = "memory://streams/text.jsonl"
        with fsspec.open(source, "wb") as file:
            file.write(lines.read_bytes())
    if where == "hub":  # a folder is streamed as a data set of the Hub is
        source = lines.parent
    if where == "saved":
        source = lines.with_name("saved")
        datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(source)
    monkeypatch.setattr(texts, "DOCUMENTS_PER_CALL", 9)
    sections = streamed(source, split="train" if where == "hub" else "all")
    stream = TextStream(sections, LENGTH, tokenizer, 0, buffer=1)
    assert drained(stream) == cut(whole(tokenizer))


@pytest.mark.parametrize("split", ["train", "test"])
def test_train_and_test_are_split_as_in_other_stages(
    split: str, lines: Path, tokenizer: FastTokenizer
) -> None:
    fields = {"split": split, "max_tokens": 1000}
    stream = TextStream(streamed(lines, **fields), LENGTH, tokenizer, 0, buffer=1)
    part = slice(800) if split == "train" else slice(800, 1000)
    assert drained(stream) == cut(whole(tokenizer)[part])


def test_windows_begin_with_the_bos_token_if_texts_do(
    lines: Path, tokenizer: FastTokenizer
) -> None:
    chatty = beginning(tokenizer, "<end> $A")
    expected = [[0, *window] for window in cut(whole(tokenizer), LENGTH - 1)]
    for used, bos in ((chatty, None), (tokenizer, True)):
        assert (
            drained(TextStream(streamed(lines, bos=bos), LENGTH, used, 0, 1)) == expected
        )
    tokenizer = FastTokenizer(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(
        ValueError, match=r"^t\.0\.bos: true, but the tokenizer has no BOS token"
    ):
        TextStream(streamed(lines, bos=True), LENGTH, tokenizer, 0)


@pytest.mark.parametrize("buffer", [8, 1024])
def test_buffer_shuffles_windows(
    buffer: int, lines: Path, tokenizer: FastTokenizer
) -> None:
    """No window is early by the size of the buffer or more, and none is lost."""
    ordered = cut(whole(tokenizer))
    first, again, other = (
        drained(TextStream(streamed(lines), LENGTH, tokenizer, seed, buffer))
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(ordered)
    places = np.array([ordered.index(window) for window in first])
    assert len(set(places)) == len(ordered) > 100, (
        "windows differ, so that places are known"
    )
    assert (places - np.arange(len(places)) < buffer).all()
    moved = np.abs(places - np.arange(len(places))).mean()
    assert moved > (len(ordered) / 5 if buffer > len(ordered) else 2)
    two = TextStream(streamed(lines, lines), LENGTH, tokenizer, 0, buffer)
    turns = [window.tolist() for window in islice(two.windows(), 40)]
    assert turns[::2] == first[:20] != turns[1::2], "each text has its own order"


def test_stream_resumes_at_a_window(
    lines: Path, tokenizer: FastTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "DOCUMENTS_PER_CALL", 2)
    sections = [
        *streamed(lines, weight=2.5),
        *streamed("python-docs", split="train", max_tokens=4000),
    ]
    stream = TextStream(sections, LENGTH, tokenizer, 3, buffer=8)
    windows = [window.tolist() for window in islice(stream.windows(), 60)]
    for start in (0, 1, 17, 40):
        rest = [window.tolist() for window in islice(stream.windows(start), 60 - start)]
        assert rest == windows[start:]


MANY = [float(weight) for weight in "32331311133113331313332312133"]


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1, 1], [3, 1], [0.9, 0.07, 0.03], [5, 1, 1, 1, 1, 1, 1, 7, 0.001], MANY],
)
def test_texts_take_turns_by_their_weights(
    weights: list[float], tokenizer: FastTokenizer
) -> None:
    """After any number of windows, up to less than one window.

    Choosing the text that is furthest behind would put the last ones off by more.
    """
    sections = [streamed("python-docs", weight=weight)[0] for weight in weights]
    turns = list(islice(TextStream(sections, LENGTH, tokenizer, 0).turns(), 3000))
    counts = np.cumsum(np.eye(len(weights))[turns], axis=0)
    exact = np.arange(1, 3001)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - exact).max() < 1


def test_windows_come_from_the_texts_in_turn(
    tmp_path: Path, tokenizer: FastTokenizer
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 2000)
    sections = [*streamed(tmp_path / "a.txt", weight=3.0), *streamed(tmp_path / "b.txt")]
    stream = TextStream(sections, LENGTH, tokenizer, 0, buffer=4)
    read = ["b" in tokenizer.decode(window) for window in islice(stream.windows(), 80)]
    assert read == [turn == 1 for turn in islice(stream.turns(), 80)]
    assert sum(read) == 20


def test_stream_reads_no_more_than_its_buffer_holds(
    tokenizer: FastTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[str]()

    def endless(text: SourceSection, where: str) -> Iterator[str]:
        while True:
            read.append(text.source)
            yield DOCUMENTS[0]

    monkeypatch.setattr(documents, "documents_of", endless)
    monkeypatch.setattr(texts, "DOCUMENTS_PER_CALL", 2)
    sections = [*streamed("hub/one", split="train", weight=9.0), *streamed("hub/two")]
    stream = TextStream(sections, LENGTH, tokenizer, 0, buffer=4)
    windows = stream.windows()
    assert read == []
    next(windows)
    assert 0 < len(read) < 8
    assert set(read) == {"hub/one"}
    list(islice(windows, 10))
    assert set(read) == {"hub/one", "hub/two"}
    num_read = len(read)
    stream.check_length(10**5)
    assert len(read) == num_read, "texts elsewhere are not read for that"


def test_end_of_a_text_is_an_error(lines: Path, tokenizer: FastTokenizer) -> None:
    """It is raised when the text's next window is requested after its buffer is empty."""
    longer = lines.with_name("longer.txt")
    longer.write_text("\n\n".join(DOCUMENTS * 3))
    count = len(cut(whole(tokenizer)))
    sections = [*streamed(longer), *streamed(lines, weight=0.5)]
    sections[1] = (sections[1][0], "recovery.texts.1")
    stream = TextStream(sections, LENGTH, tokenizer, 0, buffer=16)
    turns = list(islice(stream.turns(), 4 * count))
    total = [i for i, turn in enumerate(turns) if turn == 1][count]
    windows = stream.windows()
    assert len(list(islice(windows, total))) == total
    said = (
        rf"^recovery\.texts\.1 \({lines}\): it ended after {count * LENGTH} tokens, "
        f"{count} windows"
    )
    with pytest.raises(
        TextEndedError, match=said + "; train on fewer tokens, give another text"
    ):
        next(windows)
    with pytest.raises(TextEndedError, match=said):
        next(stream.windows(total + 1))

    stream.check_length(total)
    needed = rf"has {len(whole(tokenizer))} tokens, but its {count + 1} of {total + 1} windows of"
    with pytest.raises(
        TextEndedError, match=rf"{needed} {LENGTH} need {(count + 1) * LENGTH};"
    ):
        stream.check_length(total + 1)


@pytest.mark.parametrize(("split", "most"), [("train", 50), ("test", 12), ("all", None)])
def test_check_length_reads_no_more_than_needed(
    split: str,
    most: int | None,
    lines: Path,
    tokenizer: FastTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A train split of 800 tokens has 50 windows, and a test split of 200 tokens 12."""
    monkeypatch.setattr(texts, "DOCUMENTS_PER_CALL", 3)
    limit = {} if split == "all" else {"max_tokens": 1000}
    most = most or len(cut(whole(tokenizer)))
    stream = TextStream(streamed(lines, split=split, **limit), LENGTH, tokenizer, 0)
    assert len(drained(stream)) == most
    stream.check_length(most)
    remedy = (
        "raise the weight of others"
        + ", or max_tokens if the text is longer" * bool(limit)
    )
    with pytest.raises(TextEndedError, match=f"need {(most + 1) * LENGTH}; .*{remedy}$"):
        stream.check_length(most + 1)

    pieces = list[int]()
    read = documents.documents_of

    def counted(text: SourceSection, where: str) -> Iterator[str]:
        for document in read(text, where):
            pieces.append(1)
            yield document

    monkeypatch.setattr(documents, "documents_of", counted)
    stream.check_length(2)
    assert len(pieces) <= (3 if split != "test" else 6)
    if limit:
        pieces.clear()
        with pytest.raises(TextEndedError):
            stream.check_length(most + 1)
        assert len(pieces) < 20, "max_tokens are read"


def test_stream_of_code_has_every_file(
    tmp_path: Path, tokenizer: FastTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"json/{number}.py" for number in range(60)}
    (tmp_path / "json").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: tmp_path)
    parts = {
        split: set(
            documents.documents_of(streamed("python-code", split=split)[0][0], "t")
        )
        for split in ("train", "test", "all")
    }
    assert parts["train"] | parts["test"] == parts["all"] == names
    assert not parts["train"] & parts["test"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stride": 4}, "stride, seed: choose windows.*; remove them"),
        ({"seed": 4}, "stride, seed: choose windows.*; remove them"),
        ({"weight": 0}, "greater than 0"),
        (
            {"split": "dev"},
            "split: is 'dev', but python-docs has train and test and all only",
        ),
        ({"source": "self"}, "source: self has a place in the calibration only"),
    ],
)
def test_invalid_fields_are_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StreamedSection.model_validate({"source": "python-docs", **fields})


def test_limit_without_effect_is_refused(
    tmp_path: Path, tokenizer: FastTokenizer
) -> None:
    for source, split in (
        ("python-docs", "all"),
        ("python-code", "train"),
        ("hub/set", "train"),
    ):
        sections = streamed(source, split=split, max_tokens=100)
        with pytest.raises(
            ValueError, match=rf"^t\.0\.max_tokens: {source} with split {split} is"
        ):
            TextStream(sections, LENGTH, tokenizer, 0)


def test_split_all_is_refused_for_texts_that_are_not_streamed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="python-docs has train and test only"):
        SourceSection(source="python-docs", split="all")
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(tmp_path / "saved")
    section = SourceSection(source=str(tmp_path / "saved"), split="all")
    with pytest.raises(ValueError, match="it has no splits, only train and test are cut"):
        next(documents.documents_of(section, "t"))

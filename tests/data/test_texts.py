from __future__ import annotations

import json
import shutil
from importlib.metadata import Distribution
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import Mock

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast as FastTokenizer

from ray_surgeon.config.job import parse_spec
from ray_surgeon.config.texts import CalibrationSection, SourceSection
from ray_surgeon.data import documents, texts, written_text
from ray_surgeon.data.default_text import default_mix
from ray_surgeon.data.texts import Windows, first_token, interleaved
from ray_surgeon.preparation.inputs import check
from tests.integration.runs import beginning, tiny_spec

DOCUMENTS = [f"Document {i}: " + "the quick brown fox. " * 5 for i in range(40)]


def source(where: object, **changes: object) -> SourceSection:
    return SourceSection.model_validate({"source": str(where), **changes})


def stream(tokenizer: FastTokenizer, where: object, **changes: object) -> list[int]:
    return texts.token_stream(source(where, **changes), tokenizer, "calibration").tolist()


def tokens_of(tokenizer: FastTokenizer, *parts: str) -> list[int]:
    return tokenizer("\n\n".join(parts), add_special_tokens=False)["input_ids"]


def test_tokenizer_that_loses_spaces_is_refused(tmp_path: Path) -> None:
    """Some versions of transformers load the files of some models this way."""
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    FastTokenizer(tokenizer_object=words).save_pretrained(tmp_path / "sound")
    words.decoder = Fuse()
    FastTokenizer(tokenizer_object=words).save_pretrained(tmp_path / "lost")
    assert texts.load_tokenizer(tmp_path / "sound", "here").decode([0, 1]) == "a b"
    with pytest.raises(ValueError, match="the tokenizer of here loses spaces"):
        texts.load_tokenizer(tmp_path / "lost", "here")


@pytest.mark.parametrize("begin", [[], [7777]])
def test_strided_and_drawn_windows(
    begin: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strided windows are at their places; drawn ones do not overlap and depend on the seed. All
    begin with the first token if there is one.
    """
    own = 10 - len(begin)
    text = np.arange(100 * own)
    monkeypatch.setattr(
        texts, "token_stream", lambda section, *_: text[: section.max_tokens]
    )

    def cut(count: int, **fields: int) -> Windows:
        section = source("text", bos=bool(begin), **fields)
        return texts.read_windows(
            section, count, 10, Mock(bos_token_id=7777), "calibration"
        )

    placed = cut(3, stride=200)
    assert placed.tokens.tolist() == [[*begin, *range(s, s + own)] for s in (0, 200, 400)]
    drawn, again, other = (cut(100, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(np.sort(drawn.tokens[:, -own:].flatten()), text)
    assert {*drawn.tokens[:, :-own].flatten()} == {*begin}
    assert drawn.fingerprint == again.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match=f"{len(text) - 1} tokens.*need {len(text)}"):
        cut(100, max_tokens=len(text) - 1)
    with pytest.raises(ValueError, match=f"need {400 + own}"):
        cut(3, stride=200, max_tokens=400)


def test_mixed_windows_are_spread_evenly() -> None:
    parts = [
        Windows(np.full((count, 4), number), "") for number, count in enumerate((4, 2, 1))
    ]
    found = interleaved(parts)
    assert found.tokens[:, 0].tolist() == [0, 1, 0, 2, 0, 1, 0]
    assert interleaved(parts[:1]) is parts[0]
    assert found.fingerprint != interleaved(parts[:2]).fingerprint


def test_docstrings_of_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(says: str) -> str:
        return f"def f():\n    {says * 40!r}\n"

    members = {
        "library/text.py": function("Of the standard library. "),
        "alpha/one.py": function("Of alpha. "),
        "alpha/two.py": function("Of alpha, too. ")
        + "    def m(self):\n        'A label.'\n",
        "alpha/copied.py": function("Of the standard library. "),
        "alpha/tests/one.py": function("Of its tests. "),
        "beta/__init__.py": f"{'Of the module. ' * 40!r}\n" + function("Of beta. "),
    }
    for name in ("alpha", "beta"):
        about = f"{name}-1.dist-info"
        files = [path for path in members if path.startswith(name)]
        members[f"{about}/METADATA"] = (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"
        )
        members[f"{about}/RECORD"] = "".join(
            f"{path},,\n" for path in [*files, "gone.py"]
        )
    for path, text in members.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr("sysconfig.get_path", lambda name: tmp_path / "library")
    installed = [Distribution.at(path) for path in tmp_path.glob("*.dist-info")]
    monkeypatch.setattr(documents, "distributions", lambda: iter(installed))
    found = documents.documents_of(source("package-docstrings"), "t")
    beginnings = [document.partition(".")[0] for document in found]
    assert sorted(beginnings) == ["Of alpha", "Of alpha, too", "Of beta"]
    assert beginnings.index("Of beta") < 2


@pytest.mark.parametrize(
    "name", ["python-docs", "package-descriptions", "python-docstrings"]
)
def test_texts_of_the_installation(
    name: str, tokenizer: FastTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eighty percent are for training."""
    monkeypatch.setattr(texts, "DOCUMENTS_PER_CALL", 9)  # the first ones are enough
    train, test = (
        stream(tokenizer, name, max_tokens=3000, split=split)
        for split in ("train", "test")
    )
    assert (len(train), len(test)) == (2400, 600)
    docs = tokens_of(tokenizer, *list(topics.values())[:9])[:3000]
    assert (train + test == docs) == (name == "python-docs")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_text_files_of_every_kind(
    kind: str, tmp_path: Path, tokenizer: FastTokenizer
) -> None:
    path = tmp_path / f"text.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), path)
    else:
        lines = [json.dumps({"text": d, "id": i}) for i, d in enumerate(DOCUMENTS)]
        path.write_text("\n\n".join(DOCUMENTS) if kind == "txt" else "\n".join(lines))
    train = stream(tokenizer, path)
    assert train + stream(tokenizer, path, split="test") == tokens_of(
        tokenizer, *DOCUMENTS
    )
    with fsspec.open(f"memory://texts/{path.name}", "wb") as file:
        file.write(path.read_bytes())
    assert stream(tokenizer, f"memory://texts/{path.name}") == train
    path.with_name(f"two.{kind}").write_bytes(path.read_bytes())
    assert stream(tokenizer, tmp_path / f"*.{kind}", max_tokens=100) == train[:80]


def test_datasets_with_and_without_splits(
    tmp_path: Path, tokenizer: FastTokenizer
) -> None:
    """A dataset with its own splits, and a folder for load_dataset."""
    parts = {"train": DOCUMENTS[:30], "test": DOCUMENTS[30:]}
    sets = {
        name: datasets.Dataset.from_dict({"body": part}) for name, part in parts.items()
    }
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "set")
    found = stream(tokenizer, tmp_path / "set", split="test", column="body")
    assert found == tokens_of(tokenizer, *DOCUMENTS[30:])
    with pytest.raises(ValueError, match=r"no text in column 'text'.*body"):
        stream(tokenizer, tmp_path / "set")
    with pytest.raises(ValueError, match="cannot read the data set"):
        stream(tokenizer, tmp_path / "set", split="dev", column="body")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/train.jsonl").write_text(json.dumps({"text": "one line"}))
    assert stream(tokenizer, tmp_path / "lines") == tokens_of(tokenizer, "one line")


def test_windows_of_a_job_begin_like_the_tokenizer(
    model_folders: dict[str, Path], tokenizer: FastTokenizer, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(model_folders["llama"], tmp_path / "model"))
    beginning(tokenizer, "<end> $A").save_pretrained(model)
    assert first_token(beginning(tokenizer, "$A <end>")) is None

    def begun(source: Path, **changes: object) -> list[bool]:
        inputs = check(
            parse_spec(tiny_spec(tmp_path, source, **changes).read_text()), dry_run=True
        )
        windows = [inputs.calibration, *inputs.texts.values()]
        assert [w.shape for w in windows] == [(6, 40), (4, 40), (3, 32)]
        return [bool((w[:, 0] == tokenizer.bos_token_id).all()) for w in windows]

    assert begun(model) == [True, True, True]
    assert begun(model, calibration__bos=False) == [False, True, True]
    assert begun(model_folders["llama"], calibration__bos=True) == [True, False, False]
    (model / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    message = r"calibration\.bos: true, but the tokenizer has no BOS token"
    with pytest.raises(ValueError, match=message):
        begun(model, calibration__bos=True)


def test_text_is_read_only_as_far_as_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 1000)
    (tmp_path / "long.txt").write_text("one two three four five six seven\n" * 3000)
    tokenizer = Mock(
        side_effect=lambda chunk, **_: {"input_ids": [7] * len(chunk.split())}
    )
    text = source(tmp_path / "long.txt", max_tokens=300)
    assert len(texts.token_stream(text, tokenizer, "calibration")) == 240, "of train"
    assert len(tokenizer.call_args_list) == 2
    assert max(len(call.args[0]) for call in tokenizer.call_args_list) < 1100


def test_code_of_the_standard_library(
    tokenizer: FastTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = [f"json/{number}.py" for number in range(200)]
    for name in (*code, "textwrap.py", "pydoc_data/topics.py", "unittest/mock.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: tmp_path)
    first = stream(tokenizer, "python-code", max_tokens=200)
    assert len(first) == 200
    assert stream(tokenizer, "python-code", max_tokens=400)[:200] == first
    train, test = (
        [*documents.documents_of(source("python-code", split=split), "calibration")]
        for split in ("train", "test")
    )
    assert sorted(train + test) == sorted(code)
    assert 3 < len(train) / len(test) < 5
    found = CalibrationSection(source="python-code", num_sequences=1, sequence_length=8)
    found.check_border(source("python-code", max_tokens=9), "evaluation.0")


CHAT = (
    "{% if messages[0].content == 'refused' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def chat(*messages: tuple[str, str]) -> str:
    """Return a line of a prompts file with messages, given as roles and texts."""
    return json.dumps(
        {"messages": [{"role": role, "content": text} for role, text in messages]}
    )


@pytest.fixture
def chatty(tokenizer: FastTokenizer) -> FastTokenizer:
    """Return a tokenizer whose template begins every text with a token."""
    changed = beginning(tokenizer, "<end> $A")
    changed.chat_template = CHAT
    return changed


def test_prompts_are_read(tmp_path: Path, chatty: FastTokenizer) -> None:
    path = tmp_path / "prompts.jsonl"
    asked = ("user", "Why?")
    lines = ['{"prompt": "def f("}', chat(asked), chat(asked, ("assistant", "So."))]
    path.write_text("\n\n".join(lines))
    found = written_text.read_prompts(str(path), chatty, "calibration.prompts")

    question, begin, answer = (
        tuple(tokens_of(chatty, text))
        for text in ("<u>Why?<end><a>", "def f(", "So.<end>")
    )
    assert found[0].tokens == (chatty.bos_token_id, *begin)
    assert found[1].tokens == found[2].tokens == question
    assert [prompt.answer for prompt in found] == [None, None, answer]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no lines; write one JSON object a line"),
        ("\n{]", r"line 2 of .* is no prompt \(Invalid JSON"),
        ('{"text": "a"}', "one of prompt and messages is needed"),
        ('{"messages": [{"role": "user"}]}', "messages: 0: content: Field required"),
        (chat(("robot", "a")), "role: Input should be 'system', 'user' or"),
        (chat(("system", "a")), "one of a user must be there"),
        (chat(("user", "a"), ("assistant", " ")), "has an empty answer"),
        (chat(("user", "refused")), "refuses these messages"),
        ('{"prompt": "a b c d e f g h i j k l"}', "only 5 leave room for an answer"),
        ('{"prompt": "caf\udce9"}', r"cannot read .*not UTF-8"),
        (None, r"cannot read .*prompts\.jsonl"),
    ],
)
def test_invalid_prompts_are_refused(
    text: str | None, said: str, tmp_path: Path, chatty: FastTokenizer
) -> None:
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"^here: .*" + said):
        written_text.read_prompts(str(path), chatty, "here", 5)


@pytest.mark.parametrize("is_chat", [False, True])
def test_default_mix_depends_on_the_chat_template(
    is_chat: bool, chatty: FastTokenizer
) -> None:
    chatty.chat_template = CHAT if is_chat else None
    for count, length in ((1, 32), (2, 64), (64, 512), (256, 2048)):
        sizes = {"num_sequences": count, "sequence_length": length, "held_aside": 0.2}
        found, line = default_mix(calibration(source="auto", seed=3, **sizes), chatty)
        own = [(text, n) for text, n in found.shares if text.is_written]
        chats = sum(n for text, n in own if text.chat)
        assert chats == (max(1, count // 4) if is_chat else 0)
        assert sum(n for _, n in own) - chats == (count // 4 if is_chat else count // 2)
        assert sum(n for _, n in found.shares) == count
        assert (found.held_aside, found.sequence_length) == (0.2, length)
        assert CalibrationSection.model_validate(found.model_dump(mode="json")) == found
        small = ("python-docs", "python-docstrings")
        assert all(
            n * length <= 48_000 for text, n in found.shares if text.source in small
        )
        assert ("conversations" in line) == is_chat


def test_conversations_need_a_chat_template(
    tmp_path: Path, tokenizer: FastTokenizer
) -> None:
    (tmp_path / "chat.jsonl").write_text(chat(("user", "a")))
    with pytest.raises(ValueError, match=r"line 1 .*has no chat template; give prompt"):
        written_text.read_prompts(str(tmp_path / "chat.jsonl"), tokenizer, "here")
    with pytest.raises(
        ValueError, match="weigh: answers, but the model has no chat template"
    ):
        default_mix(calibration(source="auto", weigh="answers"), tokenizer)


def calibration(**fields: object) -> CalibrationSection:
    return CalibrationSection.model_validate(
        {"num_sequences": 8, "sequence_length": 64, **fields}
    )

from __future__ import annotations

import inspect
import json
import shutil
import textwrap
from importlib.metadata import Distribution
from pathlib import Path
from pydoc_data.topics import topics

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
from transformers import PreTrainedTokenizerFast

from ray_surgeon.run.inputs import check
from ray_surgeon.spec.calibration import CalibrationSection
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.spec.texts import SourceSection
from ray_surgeon.spec.written import SelfSection
from ray_surgeon.storage import documents, prompts, texts
from ray_surgeon.storage.default_text import default_mix
from ray_surgeon.storage.texts import Windows, cut_windows, first_token, interleaved, token_stream
from tests.integration.runs import beginning, tiny_spec

DOCUMENTS = [f"Document {i}: " + "the quick brown fox. " * 5 for i in range(40)]


def source(where: object, **changes: object) -> SourceSection:
    return SourceSection.model_validate({"source": str(where), **changes})


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path: Path) -> None:
    """As some versions of transformers load the files of some models."""
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    for name, decoder in (("sound", None), ("lost", Fuse())):
        if decoder is not None:
            words.decoder = decoder
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(
            tmp_path / name
        )
    assert texts.load_tokenizer(tmp_path / "sound", "here").decode([0, 1]) == "a b"
    with pytest.raises(ValueError, match="the tokenizer of here loses spaces"):
        texts.load_tokenizer(tmp_path / "lost", "here")


def test_strided_windows_are_where_they_should_be() -> None:
    windows = cut_windows(np.arange(1000), 3, 10, 200, 0, "calibration")
    assert windows.tokens.tolist() == [list(range(s, s + 10)) for s in (0, 200, 400)]


def test_drawn_windows_do_not_overlap_and_depend_on_the_seed_alone() -> None:
    stream = np.arange(1000)
    first, again, other = (
        cut_windows(stream, 100, 10, None, seed, "calibration") for seed in (0, 0, 1)
    )
    assert len(np.unique(first.tokens)) == 1000
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_docstrings_of_packages_take_turns_and_are_of_no_text_that_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = inspect.cleandoc(textwrap.TextWrapper.__doc__ or "")
    assert len(copied) > 300
    packages = {
        "alpha": {
            "alpha/one.py": f"def f():\n    {'Of alpha. ' * 40!r}\n",
            "alpha/two.py": "class C:\n"
            f"    {'Of alpha, too. ' * 40!r}\n"
            "    def m(self):\n"
            "        'A label.'\n",
            "alpha/copied.py": f"class C:\n    {copied!r}\n",
            "alpha/tests/one.py": f"def f():\n    {'Of its tests. ' * 40!r}\n",
        },
        "beta": {
            "beta/__init__.py": f"{'Of the module. ' * 40!r}\ndef f():\n    {'Of beta. ' * 40!r}\n",
            "beta/template.py": "def {{ name }}():\n",
        },
    }
    installed = []
    for name, members in packages.items():
        about = tmp_path / f"{name}-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (about / "RECORD").write_text(
            "".join(f"{path},,\n" for path in [*members, f"{name}/gone.py"])
        )
        for path, text in members.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        installed.append(Distribution.at(about))
    for order in (installed, installed[::-1]):
        monkeypatch.setattr(documents, "distributions", lambda order=order: iter(order))
        found = [document.partition(".")[0] for document in documents._package_docstrings()]
        assert sorted(found) == ["Of alpha", "Of alpha, too", "Of beta"]
        assert found.index("Of beta") < 2


def test_every_window_begins_with_the_first_token_if_there_is_one() -> None:
    placed = cut_windows(np.arange(1000), 3, 10, 200, 0, "calibration", 7777)
    assert placed.tokens.tolist() == [[7777, *range(s, s + 9)] for s in (0, 200, 400)]
    drawn = cut_windows(np.arange(900), 100, 10, None, 0, "calibration", 7777).tokens
    assert set(drawn[:, 0]) == {7777}
    assert np.array_equal(np.sort(drawn[:, 1:].flatten()), np.arange(900))
    with pytest.raises(ValueError, match=r"has 899 tokens.*need 900"):
        cut_windows(np.arange(899), 100, 10, None, 0, "calibration", 7777)


def test_the_first_token_is_the_one_that_the_tokenizer_puts_there(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert first_token(tokenizer) is None
    assert first_token(beginning(tokenizer, "<end> $A")) == tokenizer.bos_token_id
    assert first_token(beginning(tokenizer, "$A <end>")) is None


def test_too_little_text_says_how_much_is_needed() -> None:
    with pytest.raises(ValueError, match=r"evaluation 'x': the text has 99 tokens.*need 100"):
        cut_windows(np.arange(99), 10, 10, None, 0, "evaluation 'x'")
    with pytest.raises(ValueError, match="need 410"):
        cut_windows(np.arange(400), 3, 10, 200, 0, "calibration")


def test_python_docs_split_is_eighty_to_twenty(tokenizer: PreTrainedTokenizerFast) -> None:
    train = token_stream(source("python-docs"), tokenizer, "calibration")
    test = token_stream(source("python-docs", split="test"), tokenizer, "evaluation")
    whole = np.array(tokenizer("\n\n".join(topics.values()), add_special_tokens=False)["input_ids"])
    assert len(train) == int(0.8 * len(whole))
    assert np.array_equal(np.concatenate([train, test]), whole)


def write(folder: Path, kind: str) -> Path:
    path = folder / f"text.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(DOCUMENTS))
    elif kind == "jsonl":
        path.write_text(
            "\n".join(json.dumps({"text": d, "id": i}) for i, d in enumerate(DOCUMENTS))
        )
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_files_of_every_kind_give_the_same_stream(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    expected = tokenizer("\n\n".join(DOCUMENTS), add_special_tokens=False)["input_ids"]
    path = write(tmp_path, kind)
    train, test = (
        token_stream(source(path, split=split), tokenizer, "calibration")
        for split in ("train", "test")
    )
    assert [*train, *test] == expected
    with fsspec.open(f"memory://texts/{path.name}", "wb") as file:
        file.write(path.read_bytes())
    assert np.array_equal(
        token_stream(source(f"memory://texts/{path.name}"), tokenizer, "calibration"), train
    )


def test_several_files_by_pattern_and_a_limit(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for i, document in enumerate(DOCUMENTS[:3]):
        (tmp_path / f"{i}.txt").write_text(document)
    stream = token_stream(source(tmp_path / "*.txt", max_tokens=100), tokenizer, "calibration")
    assert (
        list(stream)
        == tokenizer("\n\n".join(DOCUMENTS[:3]), add_special_tokens=False)["input_ids"][:100][:80]
    )


def test_local_data_set_with_its_own_splits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    parts = {"train": DOCUMENTS[:30], "test": DOCUMENTS[30:]}
    datasets.DatasetDict(
        {k: datasets.Dataset.from_dict({"body": v}) for k, v in parts.items()}
    ).save_to_disk(tmp_path / "set")
    stream = token_stream(
        source(tmp_path / "set", split="test", column="body"), tokenizer, "evaluation"
    )
    assert (
        list(stream)
        == tokenizer("\n\n".join(DOCUMENTS[30:]), add_special_tokens=False)["input_ids"]
    )
    with pytest.raises(ValueError, match=r"no text in column 'text'.*body"):
        token_stream(source(tmp_path / "set"), tokenizer, "calibration")
    with pytest.raises(ValueError, match="cannot read the data set"):
        token_stream(source(tmp_path / "set", split="dev", column="body"), tokenizer, "calibration")


def test_data_set_folder_through_load_dataset(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in DOCUMENTS))
    stream = token_stream(source(tmp_path), tokenizer, "calibration")
    assert list(stream) == tokenizer("\n\n".join(DOCUMENTS), add_special_tokens=False)["input_ids"]


def test_bad_files_are_named_with_the_remedy(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    (tmp_path / "keys.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "fake.parquet").write_text("nothing of the kind")
    for name, message in {
        "latin.txt": "not UTF-8",
        "bad.jsonl": r"line 2 of .*bad\.jsonl is not JSON",
        "keys.jsonl": r"record 1 of .*no text in 'text'.*body",
        "fake.parquet": "not a parquet file",
        "absent.txt": r"no file .*absent\.txt",
    }.items():
        with pytest.raises(ValueError, match=message):
            token_stream(source(tmp_path / name), tokenizer, "calibration")


def test_descriptions_of_packages_are_text_of_another_kind(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    found = token_stream(source("package-descriptions", max_tokens=3000), tokenizer, "calibration")
    again = token_stream(
        source("package-descriptions", max_tokens=3000, split="test"), tokenizer, "calibration"
    )
    assert len(found) == 2400
    assert len(again) == 600
    assert not np.array_equal(found[:600], again)


def test_docstrings_are_another_text_of_python(tokenizer: PreTrainedTokenizerFast) -> None:
    found = token_stream(source("python-docstrings", max_tokens=3000), tokenizer, "calibration")
    assert len(found) == 2400
    assert tokenizer.decode(found[:40]) not in "\n\n".join(topics.values())


def test_mixed_windows_are_spread_evenly() -> None:
    parts = [Windows(np.full((count, 4), number), "") for number, count in enumerate((4, 2, 1))]
    found = interleaved(parts)
    assert found.tokens[:, 0].tolist() == [0, 1, 0, 2, 0, 1, 0]
    assert interleaved(parts[:1]) is parts[0]
    assert found.fingerprint != interleaved(parts[:2]).fingerprint


def test_windows_of_a_job_begin_as_the_tokenizer_begins_a_text(
    model_folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(model_folders["llama"], tmp_path / "model"))
    bos = tokenizer.bos_token_id
    beginning(tokenizer, "<end> $A").save_pretrained(model)

    def begun(**changes: object) -> list[bool]:
        inputs = check(parse_spec(tiny_spec(tmp_path, model, **changes).read_text()), dry_run=True)
        windows = [inputs.calibration, *inputs.texts.values()]
        assert [w.shape for w in windows] == [(6, 40), (4, 40), (3, 32)]
        return [bool((w[:, 0] == bos).all()) for w in windows]

    assert begun() == [True, True, True]
    assert begun(calibration__bos=False) == [False, True, True]
    assert begun(model__source=str(model_folders["llama"])) == [False, False, False]
    assert begun(model__source=str(model_folders["llama"]), calibration__bos=True) == [
        True,
        False,
        False,
    ]
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(
        ValueError, match=r"calibration\.bos: true, but the tokenizer has no BOS token"
    ):
        begun(calibration__bos=True)


def test_no_more_of_a_long_text_is_read_than_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 1000)
    (tmp_path / "long.txt").write_text("one two three four five six seven\n" * 3000)
    seen: list[int] = []

    def tokenizer(chunk: str, **options: object) -> dict[str, list[int]]:
        seen.append(len(chunk))
        return {"input_ids": [hash(word) % 100 for word in chunk.split()]}

    text = SourceSection(source=str(tmp_path / "long.txt"), max_tokens=300)
    assert len(texts.token_stream(text, tokenizer, "calibration")) == 240, (
        "the part that is calibrated on"
    )
    assert len(seen) == 2
    assert max(seen) < 1100


def test_code_is_of_packages_and_its_split_does_not_move(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    parts = {split: list(documents._code(split)) for split in ("train", "test")}
    assert not {*parts["train"]} & {*parts["test"]}
    assert 3 < len(parts["train"]) / len(parts["test"]) < 5
    root = Path(json.__file__).parent.parent
    both = {*parts["train"], *parts["test"]}
    assert (root / "json/decoder.py").read_text(encoding="utf-8").strip() in both
    for aside in ("textwrap.py", "pydoc_data/topics.py", "unittest/mock.py"):
        assert (root / aside).read_text(encoding="utf-8").strip() not in both, aside
    first = token_stream(source("python-code", max_tokens=3000), tokenizer, "calibration")
    more = token_stream(source("python-code", max_tokens=5000), tokenizer, "calibration")
    assert len(first) == 3000
    assert np.array_equal(more[:3000], first)
    found = CalibrationSection(source="python-code", num_sequences=1, sequence_length=8)
    found.check_border(source("python-code", max_tokens=9), "evaluation.0")


CHAT = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<end>{% endfor %}{% if "
    "add_generation_prompt %}<a>{% endif %}"
)


def test_prompts_are_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chatty = beginning(tokenizer, "<end> $A")
    chatty.chat_template = CHAT
    path = tmp_path / "prompts.jsonl"
    asked = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    records = [{"prompt": "def f("}, {"messages": asked[:1], "id": 7}, {"messages": asked}]
    path.write_text("\n\n".join(map(json.dumps, records)))
    found = prompts.read_prompts(str(path), chatty, "calibration.prompts")

    def ids(text: str) -> tuple[int, ...]:
        return tuple(chatty(text, add_special_tokens=False)["input_ids"])

    assert [prompt.text for prompt in found] == ["def f(", "<u>Why?<end><a>", "<u>Why?<end><a>"]
    assert found[0].tokens == (chatty.bos_token_id, *ids("def f("))
    assert found[1].tokens == found[2].tokens == ids("<u>Why?<end><a>")
    assert [prompt.answer for prompt in found] == [None, None, ids("So.<end>")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no lines; write one JSON object a line"),
        ("\n{]", "line 2 of .* is not JSON"),
        ("[1]", "is a list, not an object"),
        ('{"text": "a"}', r"has \['text'\], but one of prompt and messages is needed"),
        ('{"prompt": "a", "messages": []}', "one of prompt and messages is needed"),
        ('{"prompt": ""}', "expected a text that is not empty"),
        ('{"prompt": 3}', "expected a text that is not empty"),
        ('{"messages": "a"}', "no list of messages"),
        ('{"messages": [{"role": "user"}]}', "a message without a text as its content"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "role 'robot'; known are"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "one of a user must be there"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "one of a user must be there"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " '
            '"}]}',
            "has an empty answer",
        ),
        ('{"messages": [{"role": "user", "content": "refused"}]}', "refuses these messages"),
        ('{"prompt": "a b c d e f g h i j k l"}', "only 5 leave room for an answer"),
    ],
)
def test_what_is_no_prompt_is_refused(
    text: str, said: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    chatty = beginning(tokenizer, "$A")
    chatty.chat_template = (
        "{% if messages[0].content == 'refused' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    )
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^here: .*" + said):
        prompts.read_prompts(str(path), chatty, "here", 5)


def test_prompts_that_cannot_be_read_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"here: cannot read .*absent\.jsonl"):
        prompts.read_prompts(str(tmp_path / "absent.jsonl"), tokenizer, "here")
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(ValueError, match=r"line 1 .*has no chat template; give prompt"):
        prompts.read_prompts(str(path), tokenizer, "here")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"cannot read .*not UTF-8"):
        prompts.read_prompts(str(tmp_path / "latin.jsonl"), tokenizer, "here")


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_default_mix_suits_the_model(is_chat: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    chatty = beginning(tokenizer, "$A")
    chatty.chat_template = CHAT if is_chat else None
    for count, length in ((1, 32), (2, 64), (8, 64), (64, 512), (256, 2048)):
        section = CalibrationSection(
            source="auto", num_sequences=count, sequence_length=length, seed=3, held_aside=0.2
        )
        found, line = default_mix(section, chatty)
        shares = found.shares
        own = [(text, n) for text, n in shares if isinstance(text, SelfSection)]
        chats = sum(n for text, n in own if text.chat)
        continued = sum(n for text, n in own if text.starts is not None or text.prompt == "def ")
        assert chats == (max(1, count // 4) if is_chat else 0)
        assert continued == (count // 4 if is_chat else count // 2)
        assert sum(n for _, n in own) == chats + continued
        assert sum(n for _, n in shares) == count
        assert {text.seed for text, _ in shares} == {3}
        assert (found.held_aside, found.sequence_length) == (0.2, length)
        assert CalibrationSection.model_validate(found.model_dump(mode="json")) == found
        assert all(
            n * length <= 48_000
            for text, n in shares
            if text.source in ("python-docs", "python-docstrings")
        )
        assert str(count) in line
        assert "name a source" in line
        assert ("conversations" in line) == is_chat


def test_answers_of_a_model_without_a_chat_template_are_not_weighed(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    section = CalibrationSection(
        source="auto", num_sequences=8, sequence_length=64, weigh="answers"
    )
    with pytest.raises(
        ValueError, match=r"calibration\.weigh: answers, but the model has no chat template"
    ):
        default_mix(section, tokenizer)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"source": "auto", "stride": 4}, "stride cannot be given"),
        ({"source": "auto", "mix": [{"source": "self"}]}, "mix cannot be given"),
        ({"source": "auto", "chat": True}, "chat cannot be given"),
        ({"source": "self", "split": "test"}, "split belongs to a text that is read"),
        ({"source": "python-docs", "chat": True}, "set source to self"),
        ({"source": "self", "chat": True, "prompts": "a.jsonl"}, "chat and prompts say different"),
        ({"source": "self", "chat": True, "texts_per_sequence": 2}, "packed as they fit"),
        ({"source": "self", "start_tokens": 4}, "start_tokens belongs to starts"),
        ({"source": "self", "starts": {"source": "self"}}, "a place in the calibration only"),
        ({"source": "self", "starts": {"source": "python-docs"}, "start_tokens": 64}, "lower it"),
        ({"source": "self", "temperature": 0}, "the same text every time"),
        ({"source": "self", "weigh": "answers"}, "no text of the calibration has any"),
        ({"source": "python-docs", "held_aside": 0.6}, "less than or equal to 0.5"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CalibrationSection.model_validate({"num_sequences": 8, "sequence_length": 64, **fields})


def test_the_model_may_write_all_of_the_calibration() -> None:
    section = CalibrationSection(
        source="self", chat=True, num_sequences=8, sequence_length=64, weigh="answers"
    )
    ((text, count),) = section.shares
    assert isinstance(text, SelfSection)
    assert (text.chat, count) == (True, 8)
    assert section.further(0) == [0]
    with pytest.raises(ValueError, match="the model writes all of it"):
        section.further(2)
    given = {"source": "python-docs", "max_tokens": 500}
    started = CalibrationSection.model_validate(
        {"source": "self", "starts": given, "num_sequences": 8, "sequence_length": 64}
    )
    with pytest.raises(ValueError, match=r"evaluation\.0\.max_tokens: must equal"):
        started.check_border(source("python-docs"), "evaluation.0")

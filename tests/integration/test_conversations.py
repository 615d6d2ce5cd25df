"""Calibration text that the dense model generates: plain texts and conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer
from transformers import PreTrainedTokenizerFast as Tokenizer

from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.config.texts import CalibrationSection
from ray_surgeon.data import self_text
from ray_surgeon.data.self_text import Conversation, pack, repeats, write
from ray_surgeon.data.texts import token_stream
from ray_surgeon.data.written_text import Conversations, Language
from ray_surgeon.distributed.writing import GenerationRequest, write_texts
from ray_surgeon.storage import tensor_files
from tests.integration.runs import DISK, Done, Jobs, assert_same_shot, beginning, loaded

Ask = Callable[..., Any]
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<s>Be kind.\n{% endif %}"
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def chatty(llama: Path) -> Tokenizer:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def asked(llama: Path) -> Ask:
    """Return a function that makes the generation request of a calibration section."""
    config = AutoConfig.from_pretrained(llama)

    def ask(tokenizer: Tokenizer, **fields: Any) -> Any:
        sizes = {"num_sequences": 5, "sequence_length": 96}
        section = CalibrationSection.model_validate({"source": "self", **sizes, **fields})
        return Language(tokenizer, config).requests(section)[0]

    return ask


def soon_ended(request: Conversations) -> Conversations:
    """Return the request with many tokens that end a text; the tiny model rarely draws the only
    one.
    """
    last = frozenset({*request.marks.last, *range(20, 60)})
    return replace(request, marks=replace(request.marks, last=last))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert isinstance(found, list)
    return found


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Conversation]:
    """Return the conversations that were packed last."""
    found: list[Conversation] = []

    def recorded(given: list[Conversation], num_windows: int, length: int) -> Any:
        found[:] = given
        return pack(given, num_windows, length)

    monkeypatch.setattr(self_text, "pack", recorded)
    return found


def test_repetitions_are_found() -> None:
    text = np.random.default_rng(0).permutation(300)
    assert not repeats(text)
    assert not repeats([])
    assert repeats([7] * 32)
    assert not repeats([7] * 31)
    for period in (1, 10, 11, 64):
        piece = text[:period].tolist()
        times = max(3, -(-32 // period))
        assert repeats([*text[100:150], *piece * times, *text[150:200]]), period
        assert not repeats([*text[100:150], *piece * (times - 1), *text[150:200]]), period
    assert not repeats(text[:65].tolist() * 3), "longer periods are not checked"


def test_only_the_last_conversation_of_a_window_is_cut() -> None:
    made = [
        Conversation(tuple(range(10 * i, 10 * i + size)), slice(2, size - 1))
        for i, size in enumerate((4, 5, 3, 8, 4))
    ]
    found = pack(made, 3, 7)
    assert found.tokens.tolist() == [
        [0, 1, 2, 3, 10, 11, 12],
        [20, 21, 22, 30, 31, 32, 33],
    ]
    assert found.answers.tolist() == [
        [False, False, True, False, False, False, True],
        [False, False, False, False, False, True, True],
    ]
    assert pack(made, 1, 7).tokens.shape == (1, 7)
    assert pack([], 2, 7).tokens.shape == (0, 7)


def test_template_marks_are_found(chatty: Tokenizer, asked: Ask) -> None:
    marks = asked(chatty, chat=True).marks
    assert marks.opening == tuple(ids(chatty, "<s>Be kind.\n<u>"))
    assert marks.closing == tuple(ids(chatty, "<end>\n<a>"))
    assert marks.end == tuple(ids(chatty, "<end>\n"))
    end = chatty.eos_token_id
    assert (
        marks.last == marks.special == marks.ends_of_turn == marks.ends_of_answer == {end}
    )
    chatty.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    )
    marks = asked(chatty, chat=True).marks
    assert marks.ends_of_turn == {end, ids(chatty, ";")[0]}


def test_answers_of_generated_conversations_are_marked(
    chatty: Tokenizer, asked: Ask, llama: Path, written: list[Conversation]
) -> None:
    """The text does not depend on the number of shards and replicas."""
    request = soon_ended(asked(chatty, chat=True, seed=4))
    cluster = loaded(llama)
    found = write(cluster, request)
    marks = request.marks
    turns = []
    for made in written:
        tokens = made.tokens
        assert tokens[: len(marks.opening)] == marks.opening
        before = tokens[: made.answer.start]
        assert before[-len(marks.closing) :] == marks.closing
        turns.append(before[len(marks.opening) : -len(marks.closing)])
        answer = tokens[made.answer]
        assert marks.ends_of_answer.isdisjoint(answer[:-1])
        assert len(answer) > 1
        ended = answer[-1] == chatty.eos_token_id
        assert tokens[made.answer.stop :] == (marks.end[1:] if ended else ())
    assert len(turns) == len(set(turns))
    assert all(
        len(t) >= 3 and chatty.eos_token_id not in t and not repeats(t) for t in turns
    )
    packed = pack(written, 5, 96)
    for other in (packed, write(loaded(llama, 3, 2), request)):
        assert np.array_equal(other.tokens, found.tokens)
        assert np.array_equal(other.answers, found.answers)
    assert found.tokens.shape == found.answers.shape == (5, 96)
    assert not np.array_equal(
        write(cluster, replace(request, seed=5)).tokens, found.tokens
    )


def test_long_answers_are_cut_and_endless_turns_are_refused(
    chatty: Tokenizer,
    asked: Ask,
    llama: Path,
    written: list[Conversation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(self_text, "ANSWER_TOKENS", 9)
    monkeypatch.setattr(self_text, "MAX_ROUNDS", 3)
    request = asked(chatty, chat=True)
    cluster = loaded(llama)
    write(cluster, soon_ended(request))
    sizes = {c.answer.stop - c.answer.start for c in written}
    assert max(sizes) == 9
    never = replace(request.marks, last=frozenset(), closing=(1, 2), end=())
    with pytest.raises(
        RuntimeError, match=r"calibration: after 3 rounds, \d+ of \d+ users' turns"
    ):
        write(cluster, replace(request, marks=never, temperature=0.01))


def lines(path: Path, *records: object) -> str:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return str(path)


def test_prompts_are_answered(
    chatty: Tokenizer,
    asked: Ask,
    llama: Path,
    tmp_path: Path,
    written: list[Conversation],
) -> None:
    said = {"role": "user", "content": "Why?"}
    answer = {"role": "assistant", "content": "Because it is so."}
    uri = lines(
        tmp_path / "prompts.jsonl",
        {"prompt": "the name of"},
        {"messages": [said]},
        {"messages": [{"role": "system", "content": "Be brief."}, said, answer]},
    )
    request = soon_ended(asked(chatty, prompts=uri, num_sequences=3))
    cluster = loaded(llama)
    found = write(cluster, request)
    assert found.tokens.shape == (3, 96)
    heads = {
        tuple(ids(chatty, head))
        for head in ("the name of", "<s>Be kind.\n<u>Why?<end>\n<a>")
    }
    given = tuple(
        ids(chatty, "<s>Be brief.<end>\n<u>Why?<end>\n<a>Because it is so.<end>\n")
    )
    (whole,) = [c for c in written if c.tokens == given]
    assert chatty.decode(whole.tokens[whole.answer]) == "Because it is so.<end>"
    assert heads == {c.tokens[: c.answer.start] for c in written if c is not whole}
    other = write(loaded(llama, 2, 2), request)
    assert np.array_equal(other.tokens, found.tokens)
    greedy = asked(chatty, prompts=uri, temperature=0)
    with pytest.raises(ValueError, match="give more prompts or fewer num_sequences"):
        write(cluster, greedy)
    plain = AutoTokenizer.from_pretrained(llama)
    uri = lines(tmp_path / "plain.jsonl", {"prompt": "the name of"})
    request = soon_ended(
        asked(beginning(plain, "<end> $A"), prompts=uri, num_sequences=1)
    )
    found = write(cluster, request)
    assert (
        found.tokens[0, :4].tolist()
        == [plain.bos_token_id, *ids(plain, "the name of")][:4]
    )
    assert found.answers[0].any()


def test_generated_texts_continue_starts_of_another_text(llama: Path, asked: Ask) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    given = {"source": "python-docs", "max_tokens": 4000}
    options = {"starts": given, "start_tokens": 6, "texts_per_sequence": 2}
    request = asked(tokenizer, **options)
    cluster = loaded(llama)
    found = write(cluster, request)
    assert found.tokens.shape == (5, 96)
    assert not found.answers.any()
    texts = found.tokens.reshape(10, 48)
    section = CalibrationSection(num_sequences=1, sequence_length=2, **given)
    stream = token_stream(section, tokenizer, "").tolist()
    places = {tuple(stream[i : i + 6]) for i in range(0, len(stream) - 5, 6)}
    prompts = tuple(map(tuple, texts[:, :6].tolist()))
    assert len({*prompts} & places) == 10
    assert np.array_equal(
        texts[:, 6:], write_texts(cluster, GenerationRequest(prompts, 42))
    )
    again = write(loaded(llama, 2, 2), request)
    assert np.array_equal(again.tokens, found.tokens)
    begun = asked(beginning(tokenizer, "<end> $A"), **options)
    assert {start[0] for start in begun.starts} == {tokenizer.bos_token_id}


def test_run_calibrates_on_generated_text_and_resumes(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several texts fill a sequence; each continues the last token of the prompt. The resumed run
    streams its weights from disk.
    """
    model = job.models["llama"]
    mix = [{"source": "self", "weight": 0.5, "prompt": "<end>", "texts_per_sequence": 4}]
    options = {"calibration__mix": mix, "cluster__num_shards": 2}
    whole = job(options, folder="whole")
    written = tensor_files.read(str(whole.uri / "written.safetensors"))["1"]
    assert written.shape == (2, 40)
    texts = written.view(8, 10)
    prompt = AutoTokenizer.from_pretrained(model)("<end>", add_special_tokens=False)[
        "input_ids"
    ]
    assert texts[:, 0].tolist() == [prompt[-1]] * 8
    alone = write_texts(loaded(model), GenerationRequest((tuple(prompt),) * 8, 9))
    assert np.array_equal(texts[:, 1:], alone), "each text continues the prompt"
    commit = RunDirectory.commit_shot

    def fails_at_the_second(self: RunDirectory, index: int, *rest: Any) -> None:
        if index == 2:
            raise OSError("the machine is lost")
        commit(self, index, *rest)

    def resumed(code: int) -> Done:
        return job(options | DISK, "--resume", folder="cut", code=code)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "commit_shot", fails_at_the_second)
        cut = job(options | DISK, folder="cut", code=1).uri
    kept = job.folder / "kept"
    text = cut / "written.safetensors"
    text.rename(kept)
    assert "is gone" in resumed(1).error, "the pruned model must not generate the text"
    kept.rename(text)
    states = cut / "dense.safetensors"
    states.rename(kept)
    assert "dense.safetensors is gone" in resumed(2).error, (
        "the error comes before the model is loaded"
    )
    states.write_bytes(kept.read_bytes()[:100])
    said = resumed(2).error
    assert "cut short" in said
    assert "put it back, or start a new run" in said
    kept.rename(states)
    resumed(0)
    for shot in (1, 2):
        assert_same_shot(whole.uri, cut, shot)


SELF = "calibration.mix=[{{source: self, {}}}]".format


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("calibration.source=self; calibration.stride=64", "the model writes this one"),
        (SELF("texts_per_sequence: 3"), "a divisor of sequence_length"),
        (
            SELF(f"prompt: {'with a long prompt ' * 400}"),
            "change the prompt or the lengths",
        ),
        (SELF("texts_per_sequence: 40"), "two tokens or more"),
        (SELF("chat: true"), "give starts"),
        (SELF("prompts: absent.jsonl"), "cannot read"),
        (SELF("chat: true, prompt: a"), "keep one"),
    ],
)
def test_invalid_generation_settings_are_refused(
    settings: str, said: str, job: Jobs
) -> None:
    assert said in job.refused(settings)


def test_unsuitable_templates_and_prompts_are_refused(
    chatty: Tokenizer, asked: Ask, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"sequence_length: 40, but the chat template alone takes"
    ):
        asked(chatty, chat=True, sequence_length=40)
    with pytest.raises(ValueError, match=r"the model takes at most 128"):
        asked(chatty, chat=True, sequence_length=160)
    long = lines(tmp_path / "long.jsonl", {"prompt": "a"}, {"prompt": "a b c d e f" * 40})
    with pytest.raises(
        ValueError, match=r"line 2 of .*long\.jsonl is a prompt of \d+ tokens"
    ):
        asked(chatty, prompts=long)
    for template, said in {
        "{{ raise_exception('no') }}": "chat template fails",
        "{% for m in messages %}<u>{{ m.content | upper }}{% endfor %}": "changes what is said",
        "{% for m in messages %}{{ m.content }}<end>{% endfor %}": "puts nothing before",
    }.items():
        chatty.chat_template = template
        with pytest.raises(ValueError, match=said):
            asked(chatty, chat=True)

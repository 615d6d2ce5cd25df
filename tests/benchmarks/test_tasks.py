"""The evaluation on several sets: cases, grading, likelihoods, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import case_sets, tasks
from benchmarks.case_sets import Case, number_of, outcome_of_choice, outcome_of_reply
from benchmarks.generation import loaded, log_likelihoods
from tests.serve import environments

NUMBERS = [Case(name=f"n{i}", prompt=f"What is {i} + 1?", answer="1") for i in range(3)]
CHOICES = [
    Case(name="c0", prompt="The sky is", answer="0", choices=(" blue.", " a green one.")),
    Case(name="c1", prompt="def", answer="2", choices=(" a", " b(c)", " return x")),
]


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("2 + 3 = 5. \\boxed{1,234} and then 7", 1234),
        ("\\boxed{3} no, \\boxed{\\$-3.50 \\text{ dollars}} of 5", -3.5),
        ("first 3, then 18.", 18),
        ("\\boxed{x} of 5", 5),
        ("none", None),
    ],
)
def test_number_of_a_reply(reply: str, number: float | None) -> None:
    assert number_of(reply) == number


def test_outcomes_of_replies() -> None:
    case = Case(name="n", prompt="", answer="18")
    assert outcome_of_reply(case, "so 18.00") == "passed"
    assert outcome_of_reply(case, "so 18.5") == "failed: 18.5"
    assert outcome_of_reply(case, "") == "failed: no number"


def test_choices_are_ranked_in_sum_or_per_byte() -> None:
    case = Case(name="c", prompt="", answer="1", choices=(" aa", " " + "b" * 8))
    assert outcome_of_choice(case, [-3.0, -8.0], is_per_byte=False) == "failed: choice 0"
    assert outcome_of_choice(case, [-3.0, -8.0], is_per_byte=True) == "passed"


def test_rows_of_the_wheel_become_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, dict[str, Any]] = {
        "gsm8k": {"id": "g", "prompt": "How many?", "expected": "4"},
        "hellaswag": {
            "id": "h",
            "activity_label": "Baking",
            "ctx": "[header] A [title] they  mix",
            "endings": ["one.", "[step] two."],
            "expected_index": 1,
        },
        "truthfulqa_mc1": {
            "id": "t",
            "question": "Why?",
            "choices": ["So.", "Not so."],
            "expected_index": 0,
        },
    }

    def member_of(wheel: Path, pattern: str) -> bytes:
        (found,) = [row for name, row in rows.items() if f"/{name}/" in pattern]
        return (json.dumps(found) + "\n").encode() * 3

    monkeypatch.setattr(case_sets, "fetched_wheel", lambda *_: Path())
    monkeypatch.setattr(case_sets, "member_of", member_of)
    number = Case(name="g", prompt="How many?", answer="4")
    assert case_sets.cases_of("gsm8k", limit=2) == [number, number]
    (ending,) = case_sets.cases_of("hellaswag", limit=1)
    assert ending.prompt == "Baking: A. they mix"
    assert (ending.choices, ending.answer) == ((" one.", " two."), "1")
    assert case_sets.cases_of("truthfulqa", limit=None)[2] == Case(
        name="t", prompt="Q: Why?\nA:", answer="0", choices=(" So.", " Not so.")
    )


def test_likelihoods_match_single_passes(model_folders: dict[str, Path]) -> None:
    """Padding changes nothing, and only tokens of the continuation count."""
    folder = str(model_folders["llama"])
    model, tokenizer = loaded(folder, "float32", trust_remote_code=False)
    pairs = [(case.prompt, choice) for case in CHOICES for choice in case.choices]
    found = log_likelihoods(model, tokenizer, pairs, batch_size=3)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain_tokenizer = AutoTokenizer.from_pretrained(folder)
    for score, (context, choice) in zip(found, pairs, strict=True):
        tokens = torch.tensor([plain_tokenizer(context + choice).input_ids])
        start = len(plain_tokenizer(context).input_ids)
        log_probabilities = plain(tokens).logits[0].detach().log_softmax(dim=1)
        expected = 0.0
        for position in range(start, tokens.shape[1]):
            expected += float(log_probabilities[position - 1, tokens[0, position]])
        assert score == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"gsm8k": NUMBERS, "hellaswag": CHOICES}
    monkeypatch.setattr(tasks, "cases_of", lambda name, limit: cases[name][:limit])
    monkeypatch.setitem(tasks.NUM_NEW_TOKENS, "gsm8k", 6)


@pytest.mark.usefixtures("small_sets")
def test_models_are_evaluated_once_and_compared(
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = model_folders["llama"]
    out = tmp_path / "new" / "out.json"
    options = ["--out", str(out), "--dtype", "float32", "--batch-size", "2"]
    models = [f"dense={folder}", f"same={folder}"]
    sets = ["--sets", "gsm8k", "hellaswag"]
    assert tasks.main([*models, *sets, *options]) == 0
    table = capsys.readouterr().out
    assert "| set | cases | dense | same | lost, won | p |" in table
    assert "| gsm8k | 3 | 0 (0 to 2) | 0 (0 to 2) | 0, 0 | 1 |" in table
    assert "| hellaswag | 2 |" in table
    dense, same = json.loads(out.read_text())["models"]
    assert dense["sets"]["gsm8k"]["answers"] == same["sets"]["gsm8k"]["answers"]
    assert list(dense["sets"]["hellaswag"]["outcomes"]) == ["c0", "c1"]
    with pytest.raises(ValueError, match="exists; give --resume"):
        tasks.main([*models, *sets, *options])
    with pytest.raises(ValueError, match="repeat that command"):
        tasks.main([*models, *sets, *options, "--resume", "--limit", "1"])
    monkeypatch.setattr(tasks, "loaded", lambda *_, **__: pytest.fail("was evaluated"))
    assert tasks.main([*models, *sets, *options, "--resume"]) == 0
    assert capsys.readouterr().out == table


def test_table_pairs_outcomes() -> None:
    dense = {str(i): "passed" if i < 6 else "failed: x" for i in range(10)}
    other = {**dense, **dict.fromkeys("012", "failed: y"), "9": "passed"}
    text = tasks.table({"dense": {"s": dense}, "pruned": {"s": other}})
    assert text.splitlines()[-1] == "| s | 10 | 6 (3 to 8) | 4 (2 to 7) | 3, 1 | 0.62 |"


def test_humaneval_needs_permission_to_run_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        tasks.arguments_of(["folder"])
    assert "add --run-code" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tasks.arguments_of(["folder", "--sets", "gsm8k", "--limit", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_missing_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "is_there", lambda _: False)
    with pytest.raises(RuntimeError, match=r"tests\.serve\.environments reasoning-gym"):
        case_sets.reasoning_gym(8)


@pytest.mark.network
def test_cases_are_read_from_packages() -> None:
    for name in ("gsm8k", "hellaswag", "truthfulqa"):
        cases = case_sets.cases_of(name, limit=None)
        assert len({case.name for case in cases}) == 100
    if environments.is_there("reasoning-gym"):
        cases = case_sets.cases_of("reasoning-gym", limit=20)
        assert cases == case_sets.cases_of("reasoning-gym", limit=24)[:20]
        assert len({case.name for case in cases}) == 20
        assert all(number_of(case.answer) is not None for case in cases)

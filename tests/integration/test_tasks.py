"""Downstream tasks, of definitions and questions that lie in a folder: nothing is fetched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import report_of, run

pytest.importorskip("lm_eval", reason="needs the extra eval")

GROUPS: dict[str, Any] = {
    "pruning__structure": "groups",
    "pruning__width_multiple": 8,
    "pruning__num_shots": 1,
}
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    questions = [
        {"question": f"The {thing} is", "choices": [" red", " blue"], "answer": i % 2}
        for i, thing in enumerate(["sky", "rose"] * 4)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/colours.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"))
    return tmp_path / "tasks"


def text_of(spec_text: Path) -> dict[str, Any]:
    return {
        "name": "docs",
        "source": str(spec_text),
        "num_sequences": 4,
        "sequence_length": 40,
        "max_tokens": 4000,
    }


def test_tasks_before_and_after(
    tasks: Path, model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On an export that needs the modeling code beside it."""
    evaluation = {
        "texts": [text_of(tmp_path / "text.txt")],
        "tasks": {"names": ["colours"], "include": str(tasks), "limit": 6},
    }
    assert (
        run(
            tmp_path,
            model_folders["llama"],
            **GROUPS,
            output__exports=["per_block"],
            evaluation=evaluation,
        )
        == 0
    )
    report = report_of(tmp_path / "run")
    before = report["dense"]["tasks"]["colours"]["acc"]
    after = report["exports"][0]["tasks"]["colours"]["acc"]
    assert before * 6 == pytest.approx(round(before * 6)), "six questions"
    assert 0 <= after <= 1
    assert f"colours acc {' ' * 10}" in capsys.readouterr().out
    assert (
        f"| colours | acc | {before:.4f} | {after:.4f} |"
        in (tmp_path / "run/export/per_block/README.md").read_text()
    )
    assert set(report["dense"]["perplexity"]) == {"docs"}


def test_tasks_that_cannot_be(
    tasks: Path,
    model_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = [text_of(tmp_path / "text.txt")]
    evaluation = {
        "texts": texts,
        "tasks": {"names": ["colours", "no_such_task"], "include": str(tasks)},
    }
    assert run(tmp_path, model_folders["llama"], **GROUPS, evaluation=evaluation) == 2
    assert "output.exports has none" in capsys.readouterr().err
    options = {**GROUPS, "output__exports": ["per_block"]}
    assert run(tmp_path, model_folders["llama"], **options, evaluation=evaluation) == 2
    assert "does not know no_such_task" in capsys.readouterr().err
    (tmp_path / "without").mkdir()
    (tmp_path / "without/lm_eval.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'lm_eval'\")"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'without'}:{':'.join(p for p in sys.path if p)}")
    assert run(tmp_path, model_folders["llama"], **options, evaluation=evaluation) == 2
    assert "pip install 'ray_surgeon[eval]'" in capsys.readouterr().err

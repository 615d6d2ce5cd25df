"""Downstream tasks with definitions and questions in a local folder, without network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_surgeon.distributed import processes
from tests.integration.runs import GROUPS, ONE, Jobs, windows

pytest.importorskip("lm_eval", reason="needs the extra eval")

EXPORTED = GROUPS | ONE | {"output__exports": ["per_block"]}
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

IN_A_NEW_PROCESS = processes.run_module
"""A new process, because a fork has the modules of this process."""


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    questions = [
        {"question": f"The {thing} is", "choices": [" red", " blue"], "answer": i % 2}
        for i, thing in enumerate(["sky", "rose"] * 4)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/colours.yaml").write_text(
        TASK.format(file=tmp_path / "questions.jsonl")
    )
    return {"names": ["colours"], "include": str(tmp_path / "tasks"), "limit": 6}


def evaluated(job: Jobs, asked: dict[str, Any]) -> dict[str, Any]:
    text = windows(job.folder / "text.txt", 2, name="docs")
    return EXPORTED | {"evaluation": {"texts": [text], "tasks": asked}}


@pytest.mark.usefixtures("forked")
def test_tasks_are_evaluated_before_and_after_pruning(
    asked: dict[str, Any], job: Jobs
) -> None:
    """The export needs the modeling code in its folder."""
    done = job(evaluated(job, asked))
    before = done.report["dense"]["tasks"]["colours"]["acc"]
    after = done.report["exports"][0]["tasks"]["colours"]["acc"]
    assert before * 6 == pytest.approx(round(before * 6)), "there are six questions"
    assert 0 <= after <= 1
    assert f"colours acc {before:.3f} -> {after:.3f}" in done.out
    card = (done.uri / "export/per_block/README.md").read_text()
    assert f"| colours | acc | {before:.4f} | {after:.4f} |" in card


@pytest.mark.usefixtures("forked")
def test_tasks_that_cannot_run_are_refused(
    asked: dict[str, Any], job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = evaluated(job, asked | {"names": ["colours", "no_such_task"]})
    assert (
        "output.exports has none" in job(options | {"output__exports": []}, code=2).error
    )
    assert "has no no_such_task" in job(options, code=2).error
    (job.folder / "without").mkdir()
    (job.folder / "without/lm_eval.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'lm_eval'\")"
    )
    path = [str(job.folder / "without"), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    monkeypatch.setattr(processes, "run_module", IN_A_NEW_PROCESS)
    assert "pip install 'ray_surgeon[eval]'" in job(options, code=2).error

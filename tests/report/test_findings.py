"""Sentences and tables of a report: verdict, warnings, bars, loss curve, widths and times."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from ray_surgeon.report import findings
from ray_surgeon.report.html_report import (
    answer_table,
    before_and_after,
    loop_words,
    round_table,
)

SPEEDS = {"median": 100.0, "lowest": 99.0, "highest": 101.0}


def linear(name: str, columns: int, columns_kept: int) -> dict[str, Any]:
    return {
        "name": f"model.layers.{name}",
        "rows": 8,
        "columns": columns,
        "rows_kept": 8,
        "columns_kept": columns_kept,
        "num_nonzero": 8 * columns_kept,
        "sparsity": 1 - columns_kept / columns,
    }


@pytest.fixture
def record() -> dict[str, Any]:
    """Return the report of a run of two rounds with one timed export."""
    shots = []
    for index, sparsity, perplexity in ((1, 0.1, 11.0), (2, 0.2, 12.0)):
        shots.append(
            {
                "index": index,
                "sparsity": sparsity,
                "threshold": None,
                "calibration_loss": 2.5,
                "predicted_loss_increase": 0.05 * index,
                "loss_curve": [
                    [sparsity - 0.1, 0.0],
                    [sparsity - 0.05, 0.02],
                    [sparsity, 0.05 * index],
                    [sparsity + 0.05, 0.2],
                ],
                "groups_removed": {
                    "model.layers.0.mlp.down_proj": 2 * index,
                    "model.layers.1.mlp.down_proj": 2,
                    "model.layers.0.self_attn.o_proj": 0,
                    "model.layers.1.self_attn.o_proj": index - 1,
                },
                "perplexity": {"docs": perplexity},
                "divergence": {"docs": 0.1 * index},
                "generation": {
                    "acceptance": 0.9 - 0.1 * index,
                    "agreement": 0.8,
                    "divergence": 0.2,
                    "not_ended": None,
                    "repeating": 0.0,
                    "tokens_until_departure": {"mean": 3.0, "median": 2.0},
                },
                "seconds": {"curvature": 10.0},
                "cpu_seconds": {"curvature": 20.0},
                "worker_seconds": {"curvature": [8.0, 10.0]},
                "peak_rss_bytes": 2**30,
                "peak_gpu_bytes": 0,
                "num_nonzero": 800_000,
            }
        )
    export = {
        "kind": "uniform",
        "uri": "run/export/uniform",
        "size_bytes": 3_200_000,
        "speed": {
            "dense": {"prefill_tokens_per_s": SPEEDS, "decode_tokens_per_s": SPEEDS},
            "pruned": {
                "prefill_tokens_per_s": {**SPEEDS, "median": 125.0, "lowest": 120.0},
                "decode_tokens_per_s": {**SPEEDS, "median": 110.0},
            },
            "prefill_ratio": 1.25,
            "decode_ratio": 1.1,
        },
    }
    return {
        "spec": {
            "name": "some-run",
            "model": {"source": "some/model", "dtype": "float32"},
            "calibration": {"num_sequences": 16, "sequence_length": 64},
            "pruning": {"structure": "groups", "num_shots": 2, "sparsities": None},
            "output": {"exports": ["uniform"]},
        },
        "fingerprints": {"generation": {"max_new_tokens": 96}},
        "dense": {"perplexity": {"docs": 10.0}},
        "shots": shots,
        "exports": [export],
        "linears": [
            linear("0.mlp.down_proj", columns=16, columns_kept=10),
            linear("1.mlp.down_proj", columns=16, columns_kept=12),
            linear("0.self_attn.o_proj", columns=8, columns_kept=8),
            linear("1.self_attn.o_proj", columns=8, columns_kept=4),
        ],
        "parameters": {
            "before": 1_000_000,
            "nonzero_after": 800_000,
            "in_pruned_linears": 1_000_000,
        },
        "source": {"bytes": 4_000_000},
    }


def test_verdict_has_sizes_speeds_and_quality(record: dict[str, Any]) -> None:
    gain, price = findings.verdict(record)
    assert gain == (
        "20.0 % of the weights of the model's blocks were removed, which leaves "
        "800.0 thousand of 1.0 million parameters; the uniform export has 3.2 MB instead of "
        "4.0 MB in float32; prompts are read 25 % faster and generation is 10 % faster "
        "(within the scatter of the repeats)."
    )
    assert price == (
        "Perplexity goes from 10.00 to 12.00 (+20.0 %) on docs; agreement with the "
        "original's answers is 70.0 %."
    )


def test_warnings(record: dict[str, Any]) -> None:
    (agreement,) = findings.warnings(record)
    assert "70.0 %, below 75 %" in agreement
    record["shots"][-1]["generation"]["acceptance"] = 0.75
    assert findings.warnings(record) == []
    record["source"]["bytes"] = 1_000_000
    (size,) = findings.warnings(record)
    assert "(3.2 MB) is not smaller than the weights that were given (1.0 MB)" in size
    assert "fewer bits" in size
    record["exports"].append({"kind": "uniform-w4a16", "size_bytes": 900_000})
    assert findings.warnings(record) == [], "a quantised copy is smaller"
    for shot in record["shots"]:
        shot["predicted_loss_increase"] = 0.01
    (prediction,) = findings.warnings(record)
    assert "rose by 0.18 nats, but 0.02 were predicted from 1,024 tokens" in prediction


def test_reports_of_earlier_versions_have_a_verdict(record: dict[str, Any]) -> None:
    del record["source"]
    for shot in record["shots"]:
        del shot["loss_curve"]
        shot["predicted_loss_increase"] = None
    assert len(findings.verdict(record)) == 2
    assert findings.loss_curve(record) == []
    assert findings.reaches(record) == []
    assert [phase.name for phase in findings.phases(record)] == ["round 1", "round 2"]
    unfinished = {**record, "shots": [], "exports": [], "linears": []}
    assert findings.verdict(unfinished) == ["No pruning round has ended yet."]
    assert before_and_after(unfinished) == []
    record["shots"][-1]["perplexity"] = {"docs": math.inf}
    assert "to inf (inf)" in findings.verdict(record)[1]


def test_loss_curve_adds_the_rounds(record: dict[str, Any]) -> None:
    """The paths beyond a round's sparsity count in the last round only."""
    curve = findings.loss_curve(record)
    sparsities = [sparsity for sparsity, _ in curve]
    increases = [increase for _, increase in curve]
    assert sparsities == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.25])
    assert increases == pytest.approx([0.0, 0.02, 0.05, 0.07, 0.15, 0.25])


def test_table_of_predicted_loss_increases(record: dict[str, Any]) -> None:
    rows = findings.reaches(record)
    sparsities = [row.sparsity for row in rows]
    assert sparsities == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])
    (own,) = (row for row in rows if row.is_measured)
    assert own.sparsity == 0.2
    assert own.speeds == "prompts 25 % faster, generation 10 % faster"
    assert own.size_bytes == pytest.approx(3_200_000)
    assert rows[2].increase == pytest.approx(0.07)


def test_bars_begin_at_zero(record: dict[str, Any]) -> None:
    by_title = {each.title: each for each in before_and_after(record)}
    assert list(by_title) == [
        "Agreement with the original",
        "Perplexity, docs",
        "Size of the weights",
        "Reading prompts",
        "Generation",
    ]
    assert [bar.fraction for bar in by_title["Perplexity, docs"].bars] == [10 / 12, 1.0]
    assert [bar.fraction for bar in by_title["Size of the weights"].bars] == [1.0, 0.8]
    changes = [(each.change, each.is_better) for each in by_title.values()]
    assert changes == [
        ("-30.0 points", False),
        ("+20.0 %", False),
        ("-20.0 %", True),
        ("25 % faster", True),
        ("10 % faster", True),
    ]


def test_widths_by_block(record: dict[str, Any]) -> None:
    channels, heads = findings.widths_of(record)
    assert (channels.before, channels.left) == (16, (10, 12))
    assert (heads.before, heads.left) == (2, (2, 1))
    assert findings.widths_line(channels) == (
        "Blocks have 10 to 12 of 16 feed-forward channels."
    )
    record["linears"][0]["columns_kept"] = 12
    record["shots"][0]["groups_removed"]["model.layers.0.mlp.down_proj"] = 0
    line = findings.widths_line(findings.widths_of(record)[0])
    assert line == "Every block has 12 of 16 feed-forward channels."


def test_biases_are_not_channels(record: dict[str, Any]) -> None:
    """A consumer has a bias if it has one column more than its producer has rows."""
    consumer = linear("0.mlp.down_proj", columns=17, columns_kept=11)
    producer = linear("0.mlp.up_proj", columns=9, columns_kept=9) | {"rows": 16}
    (channels,) = findings.widths_of({**record, "linears": [consumer, producer]})
    assert (channels.before, channels.left) == (16, (10,))


def test_phases_add_up_to_the_whole_run(record: dict[str, Any]) -> None:
    steps = [
        ("plan", 0, 1.0),
        ("load", 0, 2.0),
        ("curvature", 1, 10.0),
        ("commit", 1, 1.0),
        ("load", 1, 3.0),  # of a second attempt
        ("curvature", 2, 10.0),
        ("commit", 2, 1.0),
        ("export", 2, 5.0),
        ("load", 2, 1.0),  # of a smaller size
        ("export", 2, 4.0),
    ]
    record["steps"] = [
        {"step": step, "shot": shot, "seconds": seconds} for step, shot, seconds in steps
    ]
    found = {phase.name: dict(phase.seconds) for phase in findings.phases(record)}
    assert found == {
        "start": {"plan": 1.0, "load": 5.0},
        "round 1": {"curvature": 10.0, "commit": 1.0},
        "round 2": {"curvature": 10.0, "commit": 1.0},
        "exports": {"export": 9.0, "load": 1.0},
    }
    assert findings.wall_s(record) == sum(seconds for *_, seconds in steps)


def test_short_answers_do_not_show_loops(record: dict[str, Any]) -> None:
    assert loop_words(record, 0.0) == "0 %"
    record["fingerprints"]["generation"]["max_new_tokens"] = 40
    assert loop_words(record, 0.0) == "answers too short to tell"
    assert loop_words(record, 0.5) == "50 %"
    assert (
        dict(answer_table(record).rows)["answers caught in a loop"]
        == ["answers too short to tell"] * 2
    )


def test_rows_without_values_are_left_out(record: dict[str, Any]) -> None:
    names = [name for name, _ in round_table(record).rows]
    assert "largest cost that was removed" not in names
    assert "predicted loss increase, nats" in names
    without = copy.deepcopy(record)
    for shot in without["shots"]:
        shot["generation"] = None
    assert "agreement with the original" not in dict(round_table(without).rows)


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.1, "10 % faster"),
        (0.99, "as fast"),
        (0.9, "10 % slower"),
        (2.5, "2.5 times as fast"),
    ],
)
def test_words_for_speeds(ratio: float, words: str) -> None:
    assert findings.faster(ratio) == words

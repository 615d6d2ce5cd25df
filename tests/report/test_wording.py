"""Sentences about the facts of steps."""

from __future__ import annotations

from typing import Any

import pytest

from ray_surgeon.report.wording import duration, number, sentence, size

CASES: list[tuple[str, dict[str, Any], str]] = [
    (
        "plan",
        {"weights": "device", "factors": "disk", "wave": 1, "peak_gib": 0.384},
        "weights on the device, factors on the disk, at most 0.38 GiB a worker",
    ),
    ("load", {"workers": 1, "resumed_after_shot": 0}, "1 worker"),
    (
        "load",
        {"workers": 2, "resumed_after_shot": 1},
        "2 workers, continuing after round 1",
    ),
    (
        "load",
        {
            "workers": 2,
            "resumed_after_shot": 1,
            "resumed_in_shot": "2, after 12 steps of recovery",
        },
        "2 workers, continuing in round 2 after 12 steps of recovery",
    ),
    ("load", {"size": 0.2}, "weights of the size 0.2"),
    ("teacher", {}, ""),
    (
        "sampling",
        {"num_sequences": 72, "share of answers": 0.25},
        "the model wrote 72 windows of calibration text, 25.0 % of it answers",
    ),
    (
        "answers",
        {"prompts": 1, "tokens_per_s": 240.3},
        "the original model answered 1 prompt, 240 tokens/s",
    ),
    (
        "answers",
        {"accepted": 0.757},
        "agreement with the original 75.7 % before the recovery",
    ),
    (
        "answers",
        {"accepted": 0.757, "agreement": 0.45},
        "agreement with the original 75.7 %, same most likely token 45.0 %",
    ),
    (
        "evaluation",
        {"perplexity docs": 697.578, "perplexity help": 12345.0},
        "original model: perplexity docs 697.578, help 1.23e+04",
    ),
    (
        "evaluation",
        {"sparsity": 0.3, "perplexity docs": 649.376, "divergence docs": 0.2485},
        "perplexity docs 649.376 (divergence 0.248)",
    ),
    (
        "depth",
        {"removed": "3.blocks", "divergence held aside": 0.1},
        "removed 3.blocks, divergence on validation text 0.100",
    ),
    ("depth", {"removed": ""}, "no layer removed"),
    (
        "curvature",
        {"calibration_loss": 6.27, "tokens_per_s": 2355.6, "damping": "0.1/0.1"},
        "loss on calibration text 6.270, damping 0.1/0.1, 2356 tokens/s",
    ),
    ("costs", {"damping_raised": 0}, ""),
    ("costs", {"damping_raised": 2}, "damping raised for 2 factors"),
    (
        "threshold",
        {
            "groups": 480,
            "sparsity": 0.188,
            "need": 86.3e6,
            "unit": "parameters of the linears",
        },
        "18.8 % of the linears' parameters to remove, 480 groups, keeping 86.3 M weights",
    ),
    (
        "threshold",
        {"groups": 2, "need": 1.5e9, "unit": "bytes", "experts": 1},
        "2 groups, 1 expert, keeping 1.5 GB",
    ),
    (
        "update",
        {"sparsity": 0.188, "predicted_loss_increase": 0.324},
        "18.8 % of the linears' parameters removed, predicted loss increase 0.324",
    ),
    (
        "reconstruction",
        {"rate": 0.1, "layers": 4, "layers undone": 1, "error held aside": 0.978},
        "3 of 4 layers improved, their error on validation text 2.2 % smaller",
    ),
    (
        "recovery",
        {"num_steps": 12, "held aside before": 0.138, "held aside after": 0.129},
        "divergence on validation text 0.138 -> 0.129, 12 steps",
    ),
    (
        "recovery",
        {
            "num_steps": 1,
            "measure": "cross_entropy",
            "held aside before": 2.0,
            "held aside after": 2.1,
            "undone": "worse",
        },
        "cross_entropy on validation text 2.000 -> 2.100, 1 step, rolled back: worse",
    ),
    (
        "recovery",
        {"num_steps": 2, "first_loss": 0.5, "last_loss": 0.4, "ended": "it was slow"},
        "training loss 0.500 -> 0.400, 2 steps, ended early: it was slow",
    ),
    (
        "check",
        {"steps": 0, "tokens": 0, "acceptance": 0.71, "held_aside": 0.2953},
        "before training: divergence on validation text 0.2953, "
        "agreement with the original 71.0 %",
    ),
    (
        "check",
        {"tokens": 61440, "held_aside": 2.5, "tokens_per_s": 90.0, "share_of_peak": 0.3},
        "after 61.4 K tokens: loss on validation text 2.5000, 90 tokens/s, "
        "30.0 % of the device's peak",
    ),
    ("commit", {"uri": "runs/1", "parameters": 114599835}, "saved, 114.6 M parameters"),
    (
        "export",
        {"kind": "uniform", "size_bytes": 229e6, "reload_max_logit_difference": 0.0},
        "uniform, 229 MB, reloaded: equal outputs",
    ),
    (
        "export",
        {"kind": "uniform", "size_bytes": 229e6, "reload_max_logit_difference": 0.875},
        "uniform, 229 MB, reloaded: outputs equal up to rounding (logits within 0.88)",
    ),
    (
        "quantise",
        {"kind": "uniform-w4a16", "size_bytes": 900},
        "uniform-w4a16, 900 bytes",
    ),
    (
        "retry",
        {"cause": "worker", "message": "it died"},
        "continuing after the loss of worker: it died",
    ),
    ("another", {"loss": 2.5, "tokens": 12}, "loss=2.5  tokens=12"),
]


@pytest.mark.parametrize(("step", "facts", "expected"), CASES)
def test_sentences(step: str, facts: dict[str, Any], expected: str) -> None:
    assert sentence(step, facts) == expected


def test_numbers_and_sizes() -> None:
    assert [number(n) for n in (12, 9999, 32032, 134.5e6, 7e9, 2e12)] == [
        "12",
        "9999",
        "32.0 K",
        "134.5 M",
        "7.0 G",
        "2.0 T",
    ]
    assert [size(n) for n in (12, 73152, 229e6, 15.2e9)] == [
        "12 bytes",
        "73.2 KB",
        "229 MB",
        "15.2 GB",
    ]
    assert [duration(s) for s in (4.25, 720, 12600)] == ["4.2 s", "12 min", "3.5 h"]

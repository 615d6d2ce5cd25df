"""Presets: what they set, what goes before them; no number belongs to one model."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ray_surgeon.spec.job import MOST_HELD, JobSpec
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.spec.presets import PRESETS

GROUPS = """
version: 2
name: small
preset: {preset}
model: {{source: somewhere}}
pruning: {{structure: groups, groups: [ffn], allocation: uniform, target_sparsity: 0.2}}
output: {{uri: runs/small}}
"""


def spec_of(preset: str = "balanced", *overrides: str) -> JobSpec:
    return parse_spec(GROUPS.format(preset=preset), overrides)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_all_that_a_job_of_groups_needs(preset: str) -> None:
    spec = spec_of(preset)
    wanted = PRESETS[preset]
    assert spec.calibration.source == "auto"
    assert spec.calibration.num_sequences == wanted["calibration"]["num_sequences"]
    assert spec.curvature is not None
    assert spec.curvature.chooses_damping
    assert spec.curvature.sequences_backward == wanted["curvature"]["num_backward"]
    assert spec.pruning.shots == 1
    section: Any = spec.pruning
    assert section.reconstruction.num_epochs == wanted["reconstruction"]["num_epochs"]
    assert section.reconstruction.learning_rate is None
    if wanted["correction"] is None:
        assert spec.correction is None
    else:
        assert spec.correction is not None
        assert spec.correction.lora_rank == wanted["correction"]["lora_rank"]
        assert spec.correction.learning_rate is None
    assert spec.num_held == min(MOST_HELD, round(0.1 * spec.calibration.num_sequences))
    assert [text.name for text in spec.evaluation.texts] == ["python-docs", "python-docstrings"]
    assert spec.evaluation.generation == "auto"


def test_a_preset_has_no_learning_rate_and_no_damping_in_numbers() -> None:
    for preset in PRESETS.values():
        assert preset["curvature"]["damping"] == "auto"
        for section in preset.values():
            assert "learning_rate" not in (section or {})


def test_what_a_spec_says_goes_before_its_preset() -> None:
    spec = spec_of(
        "quality",
        "calibration.num_sequences=7",
        "curvature.damping.a=0.5",
        "pruning.reconstruction.num_epochs=5",
        "correction.steps_per_shot=9",
        "pruning.num_shots=3",
        "evaluation.generation=null",
    )
    assert (
        spec.calibration.source,
        spec.calibration.num_sequences,
        spec.calibration.sequence_length,
    ) == ("auto", 7, 512)
    assert spec.curvature is not None
    assert not spec.curvature.chooses_damping
    assert spec.curvature.as_damping.a == 0.5
    assert spec.curvature.sequences_backward == 7, "no more than there are"
    section: Any = spec.pruning
    assert (section.reconstruction.num_epochs, section.num_shots) == (5, 3)
    assert spec.correction is not None
    assert (spec.correction.steps_per_shot, spec.correction.lora_rank) == (
        9,
        PRESETS["quality"]["correction"]["lora_rank"],
    )
    assert spec.evaluation.generation is None
    off = spec_of("quality", "correction=null", "pruning.reconstruction=null")
    assert off.correction is None
    reconstruction: Any = getattr(off.pruning, "reconstruction", None)
    assert reconstruction is None
    text = spec_of("fast", "calibration={source: my.txt, num_sequences: 9, sequence_length: 64}")
    assert (text.calibration.source, text.calibration.sequence_length) == ("my.txt", 64)
    assert text.evaluation.texts[0].sequence_length == 64


@pytest.mark.parametrize(
    ("pruning", "curvature", "has"),
    [
        (
            "{structure: groups, groups: [attention], target_sparsity: 0.1}",
            "",
            {"num_backward": True, "reconstruction": False},
        ),
        (
            "{structure: groups, groups: [expert_channels], target_sparsity: 0.1}",
            "",
            {"num_backward": False, "reconstruction": False},
        ),
        (
            "{structure: groups, groups: [shared_experts], target_sparsity: 0.1}",
            "",
            {"num_backward": False, "reconstruction": True},
        ),
        (
            "{structure: groups, groups: [experts], target_sparsity: 0.1}",
            "",
            {"num_backward": False, "damping": False},
        ),
        ("{structure: rows_columns, target_sparsity: 0.1}", "", {"num_backward": True}),
        ("{structure: element, target_sparsity: 0.1}", "{kind: extended_kfac}", {"fisher": True}),
        (
            "{structure: rows_columns, target_sparsity: 0.1}",
            "{kind: activations}",
            {"damping": True},
        ),
        ("{structure: rows_columns, target_sparsity: 0.1}", "{kind: identity}", {}),
    ],
)
def test_a_preset_leaves_out_what_a_method_does_not_have(
    pruning: str, curvature: str, has: dict[str, bool]
) -> None:
    overrides = [f"pruning={pruning}"] + ([f"curvature={curvature}"] if curvature else [])
    spec = spec_of("balanced", *overrides)
    assert spec.curvature is not None
    found = {
        "num_backward": spec.curvature.sequences_backward is not None,
        "fisher": getattr(spec.curvature, "fisher", None) == "sampled",
        "damping": spec.curvature.chooses_damping,
        "reconstruction": getattr(spec.pruning, "reconstruction", None) is not None,
    }
    assert {name: found[name] for name in has} == has


def test_methods_without_curvature_take_a_preset_too() -> None:
    spec = spec_of("balanced", "pruning={structure: element, method: wanda, target_sparsity: 0.5}")
    assert spec.curvature is None
    assert spec.correction is not None


def test_a_resolved_spec_is_read_as_it_is() -> None:
    for overrides in (
        (),
        ("correction=null", "pruning.reconstruction=null", "evaluation.generation=null"),
    ):
        spec = spec_of("balanced", *overrides)
        again = JobSpec.model_validate(spec.model_dump(mode="json"))
        assert again == spec
        assert again.method_fingerprint() == spec.method_fingerprint()


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValidationError, match="preset"):
        spec_of("best")


def test_a_spec_without_a_preset_and_texts_has_defaults() -> None:
    plain = GROUPS.replace("preset: {preset}\n", "").format()
    spec = parse_spec(plain, ["calibration={source: auto, num_sequences: 8, sequence_length: 128}"])
    assert spec.preset is None
    assert spec.correction is None
    assert [text.sequence_length for text in spec.evaluation.texts] == [128, 128]
    assert (
        parse_spec(plain).calibration.num_sequences
        == PRESETS["balanced"]["calibration"]["num_sequences"]
    )
    with pytest.raises(ValidationError, match="num_sequences"):
        parse_spec(plain, ["calibration={source: auto}"])

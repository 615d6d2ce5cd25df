"""Presets: their settings and overrides; no number in them is specific to a model."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from ray_surgeon.config.defaults import LEVELS, PresetName
from ray_surgeon.config.job import MOST_HELD, JobSpec, parse_spec

GROUPS = """
version: 2
name: small
model: {source: somewhere}
pruning: {structure: groups, groups: [ffn], allocation: uniform, target_sparsity: 0.2}
output: {uri: runs/small}
"""


def spec_of(preset: str = "balanced", *overrides: str) -> Any:
    return parse_spec(f"{GROUPS}preset: {preset}", overrides)


@pytest.mark.parametrize("preset", get_args(PresetName))
def test_preset_completes_a_job_that_prunes_groups(preset: str) -> None:
    """Numbers that are specific to a model are chosen by the run."""
    spec = spec_of(preset)
    wanted = LEVELS[preset]
    assert (spec.calibration.source, spec.evaluation.generation) == ("auto", "auto")
    assert spec.calibration.num_sequences == wanted["calibration"]["num_sequences"]
    assert spec.curvature.chooses_damping
    assert spec.curvature.sequences_backward == wanted["curvature"]["num_backward"]
    assert spec.pruning.shots == 1
    assert (
        spec.pruning.reconstruction.num_epochs == wanted["reconstruction"]["num_epochs"]
    )
    assert spec.pruning.reconstruction.learning_rate is None
    assert (spec.recovery is None) == (wanted["recovery"] is None)
    assert getattr(spec.recovery, "learning_rate", None) is None
    assert spec.num_held == min(MOST_HELD, round(0.1 * spec.calibration.num_sequences))
    assert [text.name for text in spec.evaluation.texts] == [
        "python-docs",
        "python-docstrings",
    ]


def test_spec_overrides_its_preset() -> None:
    changes = (
        "calibration.num_sequences=7 curvature.damping.a=0.5 evaluation.generation=null "
    )
    changes += "pruning.reconstruction.num_epochs=5 recovery.num_tokens=9"
    spec = spec_of("quality", *changes.split())
    calibration = spec.calibration
    assert (calibration.source, calibration.num_sequences) == ("auto", 7)
    assert calibration.sequence_length == 512
    assert not spec.curvature.chooses_damping
    assert spec.curvature.sequences_backward == 7, "no more than there are"
    assert spec.pruning.reconstruction.num_epochs == 5
    assert spec.recovery.num_tokens == 9
    assert spec.recovery.rank == LEVELS["quality"]["recovery"]["rank"]
    assert spec.evaluation.generation is None
    off = spec_of("quality", "recovery=null", "pruning.reconstruction=null")
    assert off.recovery is off.pruning.reconstruction is None
    assert JobSpec.model_validate(off.model_dump(mode="json")) == off, (
        "it is read as it is"
    )


SETTINGS = ("num_backward", "fisher", "damping", "reconstruction")
"""Settings of a preset that methods may lack."""


@pytest.mark.parametrize(
    ("pruning", "curvature", "left"),
    [
        ("structure: groups, groups: [attention]", "kfac", SETTINGS[:3]),
        ("structure: groups, groups: [expert_channels]", "kfac", ("fisher", "damping")),
        ("structure: groups, groups: [shared_experts]", "kfac", SETTINGS[1:]),
        ("structure: groups, groups: [experts]", "kfac", ("fisher",)),
        ("structure: rows_columns", "kfac", SETTINGS[:3]),
        ("structure: element", "extended_kfac", ("fisher", "damping")),
        ("structure: rows_columns", "identity", ()),
    ],
)
def test_presets_leave_out_settings_that_a_method_does_not_have(
    pruning: str, curvature: str, left: tuple[str, ...]
) -> None:
    chosen = f"pruning={{{pruning}, target_sparsity: 0.1}}"
    spec = spec_of("balanced", chosen, f"curvature={{kind: {curvature}}}")
    found = (
        spec.curvature.sequences_backward is not None,
        getattr(spec.curvature, "fisher", None) == "sampled",
        spec.curvature.chooses_damping,
        getattr(spec.pruning, "reconstruction", None) is not None,
    )
    assert dict(zip(SETTINGS, found, strict=True)) == {
        name: name in left for name in SETTINGS
    }


def test_methods_without_curvature_accept_a_preset() -> None:
    spec = spec_of(
        "balanced", "pruning={structure: element, method: wanda, target_sparsity: 0.5}"
    )
    assert spec.curvature is None
    assert spec.recovery is not None
    assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec, (
        "it is read as it is"
    )


def test_defaults_without_a_preset_and_texts() -> None:
    plain = parse_spec(GROUPS)
    assert (
        plain.calibration.num_sequences
        == LEVELS["balanced"]["calibration"]["num_sequences"]
    )
    sizes = "calibration={source: auto, num_sequences: 8, sequence_length: 128}"
    spec = parse_spec(GROUPS, [sizes])
    assert spec.preset is None
    assert spec.recovery is None
    assert [text.sequence_length for text in spec.evaluation.texts] == [128, 128]
    with pytest.raises(ValidationError, match="num_sequences"):
        parse_spec(GROUPS, ["calibration={source: auto}"])

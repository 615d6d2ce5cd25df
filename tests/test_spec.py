from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from ray_surgeon import sections as sections_module
from ray_surgeon import spec as spec_module
from ray_surgeon import text_sections as text_sections_module
from ray_surgeon.pipeline import main
from ray_surgeon.spec import JobSpec, Section, parse_spec

PIPELINES = sorted((Path(__file__).parent.parent / "pipelines").rglob("*.yaml"))
MINIMAL = """
version: 1
name: x
model: {source: somewhere/model}
calibration: {source: python-docs, num_sequences: 2, sequence_length: 8}
evaluation: [{name: t, source: python-docs, num_sequences: 2, sequence_length: 8}]
pruning: {target_sparsity: 0.2}
output: {uri: out}
"""


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.name)
def test_every_pipeline_parses_and_round_trips(path: Path) -> None:
    spec = parse_spec(path.read_text())
    assert parse_spec(yaml.safe_dump(spec.model_dump(mode="json"))) == spec


def test_json_is_a_spec_too() -> None:
    assert parse_spec(json.dumps(yaml.safe_load(MINIMAL))) == parse_spec(MINIMAL)


def test_every_field_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    sections = [schema, *schema["$defs"].values()]
    assert len(sections) == 17
    for section in sections:
        assert section["additionalProperties"] is False
        assert section["description"]
        for name, field in section["properties"].items():
            assert field.get("description"), f"{section['title']}.{name}"


def test_sections_are_frozen() -> None:
    found = {**vars(spec_module), **vars(sections_module), **vars(text_sections_module)}.values()
    sections = {s for s in found if isinstance(s, type) and issubclass(s, BaseModel) and s not in (BaseModel, Section)}
    assert len(sections) == 19
    assert all(s.model_config["frozen"] and s.model_config["extra"] == "forbid" for s in sections)


def test_shares_of_a_mix_add_up() -> None:
    spec = parse_spec(MINIMAL, ["calibration.num_sequences=7", "calibration.mix=[{source: a.txt, weight: 0.5}, {source: b.txt}]"])
    assert [(text.source, count) for text, count in spec.calibration.shares] == [("python-docs", 3), ("a.txt", 1), ("b.txt", 3)]
    assert spec.method_fingerprint() != parse_spec(MINIMAL, ["calibration.num_sequences=7"]).method_fingerprint()


def test_overrides() -> None:
    overrides = ["pruning.target_sparsity=0.3", "evaluation.0.num_sequences=5", "curvature.damping.a=1e-1", "cluster.num_shards=2"]
    spec = parse_spec(MINIMAL, overrides)
    assert spec.pruning.target_sparsity == 0.3
    assert spec.evaluation.texts[0].num_sequences == 5
    assert spec.curvature.damping.a == 0.1
    assert spec.cluster.num_shards == 2


@pytest.mark.parametrize("override", ["pruning", "=1", "pruning.=1", "evaluation.7.name=x", "evaluation.first.name=x", "name.x=1"])
def test_malformed_override(override: str) -> None:
    with pytest.raises((ValueError, ValidationError), match="--set"):
        parse_spec(MINIMAL, [override])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"pruning.target_sparsity": 0}, "target_sparsity"),
    ({"pruning.target_sparsity": 1}, "target_sparsity"),
    ({"pruning.target_sparsity": -3}, "target_sparsity"),
    ({"pruning.target_sparsity": ".nan"}, "target_sparsity"),
    ({"pruning.structure": "blocks"}, "structure"),
    ({"pruning.num_shots": 0}, "num_shots"),
    ({"pruning.num_shot": 3}, "num_shot"),
    ({"prunning.num_shots": 3}, "prunning"),
    ({"version": 2}, "version"),
    ({"name": "Not A Name"}, "name"),
    ({"calibration.num_sequences": 0}, "num_sequences"),
    ({"calibration.sequence_length": 1}, "sequence_length"),
    ({"calibration.split": "validation"}, "train and test only"),
    ({"calibration.revision": "main"}, "belong to a Hub data set"),
    ({"curvature.damping.a": -0.1}, r"damping\.a"),
    ({"curvature.max_damping": 0.001}, "below damping"),
    ({"model.revision": "main", "model.source": "s3://b/m"}, "revision belongs to a Hub id"),
    ({"model.wheel": "x==1"}, "belong together"),
    ({"model.wheel": "x==1", "model.wheel_sha256": "ab" * 32}, "wheel belongs to a pkg"),
    ({"cluster.num_replicas": 3}, "cannot be filled by 2"),
    ({"cluster.gpus_per_worker": 2}, "gpus_per_worker"),
    ({"updates.joint": "both"}, "joint"),
    ({"pruning.sparsities": "[0.1, 0.3]"}, "must rise"),
    ({"pruning.sparsities": "[0.2, 0.1, 0.2]"}, "must rise"),
    ({"pruning.sparsities": "[]"}, "must rise"),
    ({"pruning.sparsities": "[0.1, 0.2]", "pruning.num_shots": 2}, "takes the place"),
    ({"pruning.n_m": "[4, 2]"}, "needs N < M"),
    ({"pruning.n_m": "two:four"}, "n_m"),
    ({"pruning.structure": "n_m", "pruning.target_sparsity": 0.6}, "more than 2:4 can remove"),
    ({"pruning.method": "wanda"}, "set pruning.structure to element or n_m"),
    (
        {"pruning.method": "sparsegpt", "pruning.structure": "element", "pruning.costs": "obd"},
        r"pruning\.costs",
    ),
    ({"pruning.method": "wanda", "pruning.structure": "element", "curvature.damping.a": 0.1}, r"curvature\.damping"),
    ({"pruning.structure": "element", "updates.joint": "exact"}, r"updates\.joint \(structure element"),
    ({"pruning.structure": "element", "pruning.n_m": "[4, 8]"}, r"pruning\.n_m"),
    ({"updates.num_iterations": 5}, r"updates\.num_iterations"),
    ({"pruning.structure": "element", "updates.max_correlate": 5}, r"updates\.max_correlate"),
    ({"updates.correlations": "none", "updates.first_order_step": 1}, r"updates\.first_order_step"),
    ({"curvature.kind": "activations", "curvature.num_kronecker_terms": 2}, r"num_kronecker_terms"),
    ({"curvature.kind": "activations", "updates.first_order_step": 1}, r"first_order_step"),
    ({"curvature.seed": 3}, r"curvature\.seed"),
    ({"curvature.num_power_passes": 3}, r"num_power_passes"),
    ({"curvature.num_kronecker_terms": 2, "pruning.selection": "greedy"}, "choose one of the two"),
    ({"curvature.num_kronecker_terms": 2, "pruning.structure": "element", "updates.solver": "chunks"}, "use conjugate_gradients"),
    ({"pruning.costs": "obd", "pruning.selection": "greedy"}, r"pruning\.selection \(costs obd"),
    ({"correction.learning_rate": 0.1}, "lora_rank is 0"),
    ({"correction.lora_rank": 2, "correction.steps_per_shot": 0}, "set one of them"),
    ({"correction.lora_rank": 2, "correction.sequences_per_step": 3}, "more than the 2"),
    ({"output.exports": "[onnx]"}, "exports"),
    ({"calibration.weight": 2.0}, "no effect without mix"),
    ({"calibration.mix": "[{source: python-docstrings, weight: 0.1}]"}, "in 2 sequences is none"),
    ({"calibration.mix": "[{source: python-docstrings, weight: 0}]"}, "weight"),
    ({"calibration.mix": "[{source: python-docs, max_tokens: 5}]"}, "must equal that of python-docs"),
    ({"evaluation": "[]"}, "evaluation"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(c) for c, _ in BAD])
def test_bad_specs_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse_spec(MINIMAL, [f"{path}={value}" for path, value in changes.items()])


def test_same_names_of_texts_are_refused() -> None:
    document = yaml.safe_load(MINIMAL)
    document["evaluation"] *= 2
    with pytest.raises(ValidationError, match="names must differ"):
        JobSpec.model_validate(document)


@pytest.mark.parametrize("text", ["", "- a\n- b", "a: [1", "just words"])
def test_not_a_mapping(text: str) -> None:
    with pytest.raises(ValueError, match="job spec"):
        parse_spec(text)


def test_method_fingerprint_ignores_where_and_what_else_is_measured() -> None:
    base = parse_spec(MINIMAL).method_fingerprint()
    same = ["cluster.num_shards=3", "output.uri=elsewhere", "name=y", "evaluation.0.num_sequences=5"]
    assert parse_spec(MINIMAL, same).method_fingerprint() == base
    for change in ("pruning.target_sparsity=0.3", "curvature.damping.g=0.5", "updates.joint=exact", "model.dtype=bfloat16"):
        other = parse_spec(MINIMAL, [change])
        assert (other.method_fingerprint() != base) or other == parse_spec(MINIMAL)


def test_schedules() -> None:
    linear = parse_spec(MINIMAL, ["pruning.num_shots=4"]).pruning.targets
    assert linear == pytest.approx([0.05, 0.1, 0.15, 0.2])
    geometric = parse_spec(MINIMAL, ["pruning.num_shots=4", "pruning.schedule=geometric"]).pruning.targets
    steps = [b - a for a, b in zip((0.0, *geometric), geometric, strict=False)]
    assert geometric[-1] == pytest.approx(0.2)
    assert steps == sorted(steps, reverse=True)
    assert parse_spec(MINIMAL, ["pruning.sparsities=[0.15, 0.2]"]).pruning.targets == (0.15, 0.2)

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from ray_surgeon.pipeline import main
from ray_surgeon.spec.base import Section
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import parse_spec, validation_message
from ray_surgeon.stages.prune.methods import METHODS

ROOT = Path(__file__).parent.parent
PIPELINES = sorted((ROOT / "pipelines").rglob("*.yaml"))
MINIMAL = """
version: 2
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
    assert len(sections) > 30
    for section in sections:
        assert section["additionalProperties"] is False
        assert section["description"]
        for name, field in section["properties"].items():
            assert field.get("description"), f"{section['title']}.{name}"


def subclasses(kind: type[BaseModel]) -> set[type[BaseModel]]:
    return {kind, *(found for child in kind.__subclasses__() for found in subclasses(child))}


def test_sections_are_frozen() -> None:
    sections = subclasses(Section)
    assert len(sections) > 30
    assert all(s.model_config["frozen"] and s.model_config["extra"] == "forbid" for s in sections)


def test_every_pruning_section_has_a_method_and_is_chosen_by_structure_and_method() -> None:
    found = set()
    for structure, method in [
        (s, "llm_surgeon") for s in ("rows_columns", "rows", "columns", "element", "n_m", "groups")
    ] + [(s, m) for s in ("element", "n_m") for m in ("sparsegpt", "wanda")]:
        whole = ["pruning.target_sparsity=0.5", "pruning.num_shots=1"] if structure == "n_m" else []
        found.add(
            type(
                parse_spec(
                    MINIMAL, [f"pruning.structure={structure}", f"pruning.method={method}", *whole]
                ).pruning
            )
        )
    found.add(
        type(
            parse_spec(MINIMAL, ["pruning.structure=groups", "pruning.allocation=uniform"]).pruning
        )
    )
    assert found == set(METHODS)


def test_curvature_is_kfac_unless_the_method_gathers_its_own() -> None:
    assert parse_spec(MINIMAL).curvature is not None
    assert (
        parse_spec(MINIMAL, ["pruning.method=wanda", "pruning.structure=element"]).curvature is None
    )


def test_optional_sections_are_switched_off_by_null() -> None:
    on = parse_spec(MINIMAL, ["correction.lora_rank=4", "correction.learning_rate=0.1"])
    assert on.correction is not None
    assert (
        parse_spec(yaml.safe_dump(on.model_dump(mode="json")), ["correction=null"]).correction
        is None
    )
    assert parse_spec(MINIMAL, ["correction={}"]).correction is not None


def test_a_file_of_version_1_is_refused() -> None:
    old = yaml.safe_load(MINIMAL) | {"version": 1}
    with pytest.raises(ValidationError, match="version"):
        parse_spec(yaml.safe_dump(old))


def test_shares_of_a_mix_add_up() -> None:
    spec = parse_spec(
        MINIMAL,
        [
            "calibration.num_sequences=7",
            "calibration.mix=[{source: a.txt, weight: 0.5}, {source: b.txt}]",
        ],
    )
    assert [(text.source, count) for text, count in spec.calibration.shares] == [
        ("python-docs", 3),
        ("a.txt", 1),
        ("b.txt", 3),
    ]
    assert (
        spec.method_fingerprint()
        != parse_spec(MINIMAL, ["calibration.num_sequences=7"]).method_fingerprint()
    )


def test_overrides() -> None:
    overrides = [
        "pruning.target_sparsity=0.3",
        "evaluation.0.num_sequences=5",
        "curvature.damping.a=1e-1",
        "cluster.num_shards=2",
    ]
    spec = parse_spec(MINIMAL, overrides)
    assert spec.pruning.target_sparsity == 0.3
    assert spec.evaluation.texts[0].num_sequences == 5
    assert spec.curvature.damping.a == 0.1
    assert spec.cluster.num_shards == 2


@pytest.mark.parametrize(
    "override",
    ["pruning", "=1", "pruning.=1", "evaluation.7.name=x", "evaluation.first.name=x", "name.x=1"],
)
def test_malformed_override(override: str) -> None:
    with pytest.raises((ValueError, ValidationError), match="--set"):
        parse_spec(MINIMAL, [override])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"pruning.target_sparsity": 0}, "target_sparsity"),
    ({"pruning.target_sparsity": 1}, "target_sparsity"),
    ({"pruning.target_sparsity": -3}, "target_sparsity"),
    ({"pruning.target_sparsity": ".nan"}, "target_sparsity"),
    ({"pruning.structure": "blocks"}, "expected structure"),
    ({"pruning.num_shots": 0}, "num_shots"),
    ({"pruning.num_shot": 3}, "num_shot"),
    ({"prunning.num_shots": 3}, "prunning"),
    ({"version": 3}, "version"),
    ({"name": "Not A Name"}, "name"),
    ({"calibration.num_sequences": 0}, "num_sequences"),
    ({"calibration.sequence_length": 1}, "sequence_length"),
    ({"calibration.split": "validation"}, "train and test only"),
    ({"calibration.revision": "main"}, "belong to a Hub data set"),
    (
        {
            "calibration.source": "self",
            "calibration.chat": "true",
            "calibration.weigh": "answers",
            "curvature.kind": "extended_kfac",
        },
        "weigh: answers does not go with",
    ),
    (
        {
            "calibration.source": "self",
            "calibration.chat": "true",
            "calibration.weigh": "answers",
            "curvature.kind": "activations",
        },
        "weigh: answers has no effect",
    ),
    ({"evaluation": "{generation: {num_prompts: 0}}"}, r"generation\S*\.num_prompts"),
    ({"preset": "best"}, "preset"),
    ({"curvature.damping.a": -0.1}, r"damping\.\S*\.a"),
    ({"curvature.max_damping": 0.001}, "below damping"),
    ({"model.revision": "main", "model.source": "s3://b/m"}, "revision belongs to a Hub id"),
    ({"model.wheel": "x==1"}, "belong together"),
    ({"model.wheel": "x==1", "model.wheel_sha256": "ab" * 32}, "wheel belongs to a pkg"),
    ({"cluster.num_replicas": 3}, "cannot be filled by 2"),
    ({"cluster.gpus_per_worker": 2}, "gpus_per_worker"),
    ({"pruning.update": "both"}, "update"),
    ({"pruning.sparsities": "[0.1, 0.3]"}, "must rise"),
    ({"pruning.sparsities": "[0.2, 0.1, 0.2]"}, "must rise"),
    ({"pruning.sparsities": "[]"}, "must rise"),
    ({"pruning.sparsities": "[0.1, 0.2]", "pruning.num_shots": 2}, "takes the place"),
    ({"pruning.structure": "n_m", "pruning.n_m": "[4, 2]"}, "needs N < M"),
    ({"pruning.structure": "n_m", "pruning.n_m": "two:four"}, "n_m"),
    ({"pruning.structure": "n_m", "pruning.target_sparsity": 0.6}, "more than 2:4 can remove"),
    (
        {"pruning.structure": "n_m", "pruning.method": "wanda", "pruning.target_sparsity": 0.6},
        "more than 2:4 can remove",
    ),
    (
        {"pruning.structure": "n_m", "pruning.method": "wanda", "pruning.target_sparsity": 0.5},
        "to 2:4 at once; set target_sparsity to 0.5",
    ),
    (
        {
            "pruning.structure": "n_m",
            "pruning.method": "wanda",
            "pruning.n_m": "[1, 3]",
            "pruning.num_shots": 1,
        },
        "target_sparsity to 0.666667",
    ),
    (
        {"pruning.structure": "n_m", "pruning.method": "sparsegpt", "pruning.num_shots": 1},
        "to 2:4 at once; set target_sparsity to 0.5",
    ),
    (
        {"pruning.structure": "element", "pruning.method": "wanda", "pruning.n_m": "[2, 4]"},
        "has no pattern",
    ),
    ({"pruning.structure": "groups", "pruning.groups": "[ffn, ffn]"}, "name a kind twice"),
    (
        {
            "pruning.structure": "groups",
            "pruning.groups": "[experts]",
            "pruning.remove_blocks": "true",
        },
        "only whole experts go",
    ),
    (
        {
            "pruning.structure": "groups",
            "pruning.groups": "[experts]",
            "curvature.damping": "{a: 0.1}",
        },
        "invert no factor; leave it out",
    ),
    (
        {
            "pruning.groups": "[experts]",
            "pruning.expert_costs": "reap",
            "curvature.kind": "activations",
            "curvature.max_damping": 9,
        }
        | {"pruning.structure": "groups"},
        "max_damping: costs of whole experts invert no factor",
    ),
    ({"calibration.source": "python-docs", "calibration.column": "body"}, "column is 'body'"),
    (
        {
            "pruning.structure": "element",
            "pruning.method": "sparsegpt",
            "pruning.max_damping": 0.001,
        },
        "is below damping",
    ),
    (
        {"pruning.method": "wanda", "pruning.structure": "element", "curvature.damping.a": 0.1},
        "gathers its own",
    ),
    ({"curvature": "null"}, "needs one"),
    ({"calibration.stride": 8, "calibration.seed": 3}, "stride places them"),
    ({"curvature.seed": 3}, "seed draws the labels"),
    (
        {"curvature.kind": "extended_kfac", "pruning.costs": "greedy"},
        "greedy needs one Kronecker term",
    ),
    (
        {"curvature.kind": "extended_kfac", "pruning.structure": "groups"},
        "extended_kfac does not go with structure groups",
    ),
    ({"correction.steps_per_shot": 0}, "set one of them"),
    ({"correction.sequences_per_step": 3}, "more than the 2"),
    ({"output.exports": "[onnx]"}, "exports"),
    ({"calibration.weight": 2.0}, "no effect without mix"),
    ({"calibration.mix": "[{source: python-docstrings, weight: 0.1}]"}, "in 2 sequences is none"),
    ({"calibration.mix": "[{source: python-docstrings, weight: 0}]"}, "weight"),
    (
        {"calibration.mix": "[{source: python-docs, max_tokens: 5}]"},
        "must equal that of python-docs",
    ),
    (
        {"calibration.mix": "[{source: python-docs, weight: 0.8}]"},
        r"mix\.0: these windows of python-docs are in the calibration already",
    ),
    (
        {"calibration.num_sequences": 6, "calibration.mix": "[{source: self}, {source: self}]"},
        r"mix\.1: these windows of self",
    ),
    ({"evaluation": "[]"}, "evaluation"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(c) for c, _ in BAD])
def test_bad_specs_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse_spec(MINIMAL, [f"{path}={value}" for path, value in changes.items()])


IDLE = [
    (
        {"pruning.structure": "element", "pruning.selection": "once"},
        "pruning.selection: is not an option of element",
    ),
    (
        {"pruning.structure": "element", "pruning.n_m": "[4, 8]"},
        "pruning.n_m: is not an option of element",
    ),
    (
        {"pruning.structure": "element", "pruning.update.max_correlate": 5},
        "max_correlate: is not an option of conjugate_gradients",
    ),
    (
        {"pruning.structure": "element", "pruning.update": "{solver: none, tolerance: 1}"},
        "update.tolerance: is not an option of plain",
    ),
    ({"pruning.width_multiple": 8}, "pruning.width_multiple: is not an option of rows_columns"),
    (
        {"pruning.structure": "groups", "pruning.costs": "obd"},
        "pruning.costs: is not an option of groups",
    ),
    (
        {"pruning.structure": "groups", "pruning.allocation": "uniform", "pruning.rank_by": "cost"},
        "of groups, allocation uniform",
    ),
    (
        {"pruning.method": "sparsegpt", "pruning.structure": "element", "pruning.costs": "obd"},
        "pruning.costs: is not an option of sparsegpt",
    ),
    (
        {"pruning.method": "wanda", "pruning.structure": "element", "pruning.damping": 0.1},
        "pruning.damping: is not an option of wanda",
    ),
    (
        {"curvature.kind": "activations", "curvature.fisher": "sampled"},
        "curvature.fisher: is not an option of activations",
    ),
    (
        {"curvature.num_kronecker_terms": 2},
        "curvature.num_kronecker_terms: is not an option of kfac",
    ),
    (
        {"cluster.backend": "local", "cluster.ping_timeout_s": 3},
        "cluster.ping_timeout_s: is not an option of local",
    ),
]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"pruning.structure": "groups", "pruning.groups": "[ffm]"},
            ["pruning.groups.0: Input should be"],
        ),
        ({"evaluation.0.nam": "x"}, ["nam: is not an option"]),
        (
            {"output.exports": "uniform"},
            ["output.exports: expected a list, such as [a, b] (got 'uniform')"],
        ),
        (
            {"calibration": "python-docs"},
            ["calibration: expected fields, such as {name: value} (got 'python-docs')"],
        ),
        (
            {"memory.weights": "gpu"},
            ["memory.weights: Input should be 'auto', 'device', 'host' or 'disk' (got 'gpu')"],
        ),
        (
            {"memory.scratch": "s3://bucket/x"},
            ["memory.scratch: s3://bucket/x is not on a local disk"],
        ),
        ({"model": "{}"}, ["model.source: is missing; add it"]),
        (
            {"model.source": "https://huggingface.co/org/name/tree/main"},
            ["page of the Hub; give the Hub id, org/name"],
        ),
        (
            {"curvature.kind": "activations", "curvature.damping": "{g: 0.2}"},
            ["damping.g has no effect"],
        ),
        (
            {"curvature.kind": "identity", "curvature.damping": "{a: 0.2}"},
            ["curvature.damping: is not an option of identity"],
        ),
    ],
    ids=str,
)
def test_a_mistake_is_said_once_and_in_words_of_the_spec(
    changes: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_spec(MINIMAL, [f"{path}={value}" for path, value in changes.items()])
    first, *lines = validation_message(caught.value, "spec.yaml").split("\n")
    assert first == "spec.yaml is not a valid job spec:"
    assert len(lines) == len(expected), lines
    assert all(part in line for line, part in zip(lines, expected, strict=True)), lines


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibration.source=*.txt", "the value is no YAML .* put it into quotes"),
        ("name.first=x", "name is '.*', which has no fields"),
        ("evaluation.7.name=x", "evaluation is a list with items 0 to 0, and '7' is none of them"),
    ],
)
def test_overrides_that_have_no_place(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_spec(MINIMAL, [override])


def test_a_section_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="pruning is given twice; remove one"):
        parse_spec(MINIMAL + "\npruning: {target_sparsity: 0.1}\n")


def test_overrides_that_the_readme_names() -> None:
    found = re.findall(
        r"`([a-z0-9-]+\.yaml)` with\s+`((?:--set \S+ ?)+)`", (ROOT / "README.md").read_text()
    )
    assert found
    for file, overrides in found:
        parse_spec((ROOT / "pipelines" / file).read_text(), overrides.replace("--set ", "").split())


def test_an_override_may_add_to_a_list_of_texts() -> None:
    assert parse_spec(MINIMAL, ["evaluation.stop_above=3"]).evaluation.stop_above == 3.0


@pytest.mark.parametrize(("changes", "message"), IDLE, ids=[str(c) for c, _ in IDLE])
def test_an_option_without_effect_cannot_be_written(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_spec(MINIMAL, [f"{path}={value}" for path, value in changes.items()])
    assert message in validation_message(caught.value, "spec.yaml")


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
    same = [
        "cluster.num_shards=3",
        "output.uri=elsewhere",
        "name=y",
        "evaluation.0.num_sequences=5",
        "memory.limit_gib=8",
    ]
    assert parse_spec(MINIMAL, same).method_fingerprint() == base
    for change in (
        "pruning.target_sparsity=0.3",
        "curvature.damping.g=0.5",
        "pruning.update=single",
        "model.dtype=bfloat16",
    ):
        other = parse_spec(MINIMAL, [change])
        assert (other.method_fingerprint() != base) or other == parse_spec(MINIMAL)


def test_schedules() -> None:
    linear = parse_spec(MINIMAL, ["pruning.num_shots=4"]).pruning.targets
    assert linear == pytest.approx([0.05, 0.1, 0.15, 0.2])
    geometric = parse_spec(
        MINIMAL, ["pruning.num_shots=4", "pruning.schedule=geometric"]
    ).pruning.targets
    steps = [b - a for a, b in zip((0.0, *geometric), geometric, strict=False)]
    assert geometric[-1] == pytest.approx(0.2)
    assert steps == sorted(steps, reverse=True)
    assert parse_spec(MINIMAL, ["pruning.sparsities=[0.15, 0.2]"]).pruning.targets == (0.15, 0.2)


def test_widths_that_engines_like() -> None:
    groups = ["pruning.structure=groups", "pruning.groups=[ffn]"]
    assert parse_spec(MINIMAL, groups).pruning.multiple == 64
    assert parse_spec(MINIMAL, [*groups, "pruning.tensor_parallel=4"]).pruning.multiple == 256
    assert parse_spec(MINIMAL, [*groups, "output.exports=[deci]"]).pruning.multiple == 256
    assert (
        parse_spec(
            MINIMAL, [*groups, "output.exports=[deci]", "pruning.tensor_parallel=2"]
        ).pruning.multiple
        == 512
    )
    assert parse_spec(MINIMAL, [*groups, "pruning.width_multiple=8"]).pruning.multiple == 8
    quantised = [
        "pruning.allocation=uniform",
        "output.exports=[uniform]",
        "output.quantize.scheme=int8",
    ]
    assert parse_spec(MINIMAL, [*groups, *quantised]).pruning.multiple == 128


def test_a_target_that_is_a_pattern_s_may_be_written_as_errors_print_it() -> None:
    overrides = [
        "pruning.structure=n_m",
        "pruning.method=wanda",
        "pruning.n_m=[1,3]",
        "pruning.num_shots=1",
    ]
    for target in ("0.666667", "0.6667", "0.666"):
        assert (
            parse_spec(MINIMAL, [*overrides, f"pruning.target_sparsity={target}"]).pruning.shots
            == 1
        )

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from ray_surgeon.config.groups import GroupsSection, UniformGroupsSection
from ray_surgeon.config.job import JobSpec, input_schema, parse_spec, validation_message
from ray_surgeon.config.pruning import (
    ElementsSection,
    RowsColumnsSection,
    SparseGPTSection,
    WandaSection,
)
from ray_surgeon.pipeline import SCHEMA, main

ROOT = Path(__file__).parents[2]
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


def spec_of(changes: str = "") -> JobSpec:
    """Return the minimal spec with overrides, separated by semicolons."""
    return parse_spec(MINIMAL, [change for change in changes.split("; ") if change])


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.name)
def test_every_pipeline_parses_and_round_trips(path: Path) -> None:
    spec = parse_spec(path.read_text())
    again = parse_spec(json.dumps(spec.model_dump(mode="json")))
    assert again == spec, "JSON is YAML"
    assert again.method_fingerprint() == spec.method_fingerprint()


def test_every_field_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    write = "json.dump(input_schema(), open(SCHEMA, 'w'), indent=2)"
    assert schema == input_schema(), f"write {SCHEMA} anew: {write}"
    sections = [schema, *schema["$defs"].values()]
    assert len(sections) > 30
    for section in sections:
        assert section["additionalProperties"] is False
        assert section["description"]
        for name, field in section["properties"].items():
            assert field.get("description"), f"{section['title']}.{name}"


SPECS = [
    *PIPELINES,
    *sorted((ROOT / "deploy").rglob("job.yaml")),
]


@pytest.mark.parametrize(
    "path", SPECS, ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_specs_of_the_repository_fit_the_schema(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize(
    ("options", "section"),
    [
        ("structure: rows_columns", RowsColumnsSection),
        ("structure: rows", RowsColumnsSection),
        ("structure: columns", RowsColumnsSection),
        ("structure: element", ElementsSection),
        ("structure: element, method: sparsegpt", SparseGPTSection),
        ("structure: element, method: wanda", WandaSection),
        ("structure: n_m", ElementsSection),
        ("structure: n_m, method: sparsegpt", SparseGPTSection),
        ("structure: n_m, method: wanda", WandaSection),
        ("structure: groups", GroupsSection),
        ("structure: groups, allocation: uniform", UniformGroupsSection),
    ],
)
def test_structure_and_method_select_the_pruning_section(
    options: str, section: type
) -> None:
    spec = spec_of(f"pruning={{{options}, target_sparsity: 0.5, num_shots: 1}}")
    assert type(spec.pruning) is section


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_default_kinds_of_groups(allocation: str) -> None:
    def kinds(target: str) -> object:
        fields = f"structure: groups, allocation: {allocation}, num_shots: 1, {target}"
        return spec_of(f"pruning={{{fields}}}").pruning.groups

    for unit in ("latency_s", "speedup", "decode_tokens_per_s"):
        assert kinds(f"target: {{{unit}: 2, table: t}}") == ("ffn",)
    for target in ("target: {parameters: 2}", "target_sparsity: 0.2", "sizes: [0.2]"):
        assert kinds(target) == ("ffn", "attention")
    assert kinds("target: {speedup: 2, table: t}, groups: [attention]") == ("attention",)


def test_absent_and_null_sections() -> None:
    assert spec_of().curvature is not None
    assert spec_of("pruning.method=wanda; pruning.structure=element").curvature is None
    on = spec_of("recovery.rank=4; recovery.learning_rate=0.1")
    assert on.recovery is not None
    off = parse_spec(yaml.safe_dump(on.model_dump(mode="json")), ["recovery=null"])
    assert off.recovery is None
    assert spec_of("recovery={}").recovery is not None


@pytest.mark.parametrize(
    ("changes", "section", "field", "number"),
    [
        ("pruning.target_sparsity=30%", "pruning", "target_sparsity", 0.3),
        ("pruning.target_sparsity=34.6 %", "pruning", "target_sparsity", 0.346),
        (
            "pruning={target_sparsity: 20%, sparsities: [10%, 0.2]}",
            "pruning",
            "sparsities",
            (0.1, 0.2),
        ),
        (
            "pruning={structure: groups, sizes: [10%, 0.2], num_shots: 1}",
            "pruning",
            "sizes",
            (0.1, 0.2),
        ),
        ("recovery.num_tokens=100k", "recovery", "num_tokens", 100_000),
        (
            "recovery.num_tokens_between_shots=1.5k",
            "recovery",
            "num_tokens_between_shots",
            1_500,
        ),
        (
            "calibration.source=a.txt; calibration.max_tokens=2M",
            "calibration",
            "max_tokens",
            2_000_000,
        ),
    ],
)
def test_numbers_may_be_percentages_or_have_suffixes(
    changes: str, section: str, field: str, number: object
) -> None:
    assert getattr(getattr(spec_of(changes), section), field) == number
    document = yaml.safe_load(MINIMAL)
    for change in changes.split("; "):
        path, _, value = change.partition("=")
        *parents, last = path.split(".")
        place = document
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = yaml.safe_load(value)
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize(
    ("target", "value"),
    [
        ("{parameters: 6M}", 6_000_000),
        ("{flops: 1.5G}", 1_500_000_000),
        ("{bytes: 2GB}", 2 * 10**9),
        ("{bytes: 1.5GiB}", 3 * 2**29),
    ],
)
def test_targets_may_have_suffixes(target: str, value: int) -> None:
    spec = spec_of(f"pruning={{structure: groups, num_shots: 1, target: {target}}}")
    assert spec.pruning.target.value == value


def test_run_is_named_after_a_percentage() -> None:
    named = parse_spec("{model: some/Model, pruning: {target_sparsity: 30%}}")
    assert named.name == "model-30pct"


def test_shares_of_a_mix_sum_to_the_number_of_sequences() -> None:
    seven = "calibration.num_sequences=7"
    spec = spec_of(
        f"{seven}; calibration.mix=[{{source: a.txt, weight: 0.5}}, {{source: b.txt}}]"
    )
    shares = [(text.source, count) for text, count in spec.calibration.shares]
    assert shares == [("python-docs", 3), ("a.txt", 1), ("b.txt", 3)]
    assert spec.method_fingerprint() != spec_of(seven).method_fingerprint()


def test_overrides() -> None:
    changes = (
        "pruning.target_sparsity=0.3; evaluation.0.num_sequences=5; cluster.num_shards=2"
    )
    spec = spec_of(f"{changes}; curvature.damping.a=1e-1; evaluation.stop_above=3")
    assert spec.pruning.target_sparsity == 0.3
    assert spec.evaluation.texts[0].num_sequences == 5
    assert spec.evaluation.stop_above == 3, "a field beside a list of texts"
    assert spec.curvature.damping.a == 0.1
    assert spec.cluster.num_shards == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruning", "expected section.field=value"),
        ("calibration.source=*.txt", "the value is no YAML .* put it into quotes"),
        ("name.first=x", "name is '.*', which has no fields"),
        (
            "evaluation.7.name=x",
            "evaluation is a list with items 0 to 0, and '7' is none of them",
        ),
    ],
)
def test_misplaced_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^--set .*{message}"):
        spec_of(override)


ELEMENT = "pruning.structure=element"
WANDA = f"pruning.method=wanda; {ELEMENT}"
SELF = "calibration.source=self"
SIX = "calibration.num_sequences=6"
A_TEXT = "{name: t, source: a.txt, num_sequences: 2, sequence_length: 8}"
N_M = "pruning.structure=n_m"
GROUPS = "pruning.structure=groups"
WEIGHED = (
    "calibration={source: self, num_sequences: 2, sequence_length: 8, chat: true, "
    "weigh: answers}"
)
NO_OPTION = "is not an option"
MISTAKES = [
    ("pruning.structure=blocks", "expected structure"),
    ("version=1", "version: Input should be 2"),
    ("name=Not A Name", "name: String should match"),
    ("model={}", "model.source: is missing; add it"),
    (
        "model.source=https://huggingface.co/org/name/tree/main",
        "page of the Hub; .*, org/name",
    ),
    ("model.revision=main; model.source=s3://b/m", "revision: belongs to a Hub id"),
    ("model.wheel=x==1", "belongs together"),
    (
        "calibration=python-docs",
        r"expected fields, such as {name: value} \(got 'python-docs'\)",
    ),
    ("calibration.split=validation", "train and test only"),
    ("calibration.revision=main", "belong to a Hub data set"),
    ("calibration.stride=8; calibration.seed=3", "stride places them"),
    ("calibration.weight=2.0", "no effect without mix"),
    ("calibration.source=auto; calibration.stride=4", "stride: cannot be given"),
    ("calibration.chat=true", "set source to self"),
    (f"{SELF}; calibration.split=test", "split: belongs to a text that is read"),
    (
        f"{SELF}; calibration.chat=true; calibration.prompts=a.txt",
        "chat, prompts: say different",
    ),
    (f"{SELF}; calibration.start_tokens=4", "start_tokens: belongs to starts"),
    (f"{SELF}; calibration.temperature=0", "the same text every time"),
    (f"{SELF}; calibration.weigh=answers", "no text of the calibration has any"),
    (
        "calibration.mix=[{source: python-docstrings, weight: 0.1}]",
        "in 2 sequences is none",
    ),
    (
        "calibration.mix=[{source: python-docs, max_tokens: 5}]",
        "must equal that of python-docs",
    ),
    (
        "calibration.mix=[{source: python-docs, weight: 0.8}]",
        r"mix\.0\.source: .* are in",
    ),
    (
        f"{SIX}; calibration.mix=[{{source: self}}, {{source: self}}]",
        r"mix\.1\.source: windows",
    ),
    (f"{WEIGHED}; curvature.kind=extended_kfac", "weigh: answers does not go with"),
    (f"evaluation=[{A_TEXT}, {A_TEXT}]", "names must differ"),
    (
        "memory.weights=gpu",
        r"Input should be 'auto', 'device', 'host' or 'disk' \(got 'gpu'\)",
    ),
    (
        "memory.scratch=s3://bucket/x",
        "memory.scratch: s3://bucket/x is not on a local disk",
    ),
    ("cluster.num_replicas=3", "cannot be filled by 2"),
    (
        "cluster={backend: local, ping_timeout_s: 3}",
        f"ping_timeout_s: {NO_OPTION} of local",
    ),
    ("output.exports=uniform", r"expected a list, such as \[a, b\] \(got 'uniform'\)"),
    ("curvature=null", "needs one"),
    ("curvature.seed=3", "seed: draws labels"),
    ("curvature={kind: activations, damping: {g: 0.2}}", "damping.g: has no effect"),
    (
        "curvature.kind=extended_kfac; pruning.costs=greedy",
        "greedy needs one Kronecker term",
    ),
    (
        f"curvature.kind=extended_kfac; {GROUPS}",
        "extended_kfac does not go with structure groups",
    ),
    ("recovery.rank=some", "recovery.rank"),
    ("pruning.target_sparsity=130%", "more than 0% and less than 100%.*got '130%'"),
    ("pruning.target_sparsity=30", "0.3 or 30% .got 30."),
    (
        "pruning.target_sparsity=6M",
        r"a size is given by target, such as {parameters: 6M}",
    ),
    ("recovery.num_tokens=6 MB", "num_tokens: expected a number, such as 6M or 100k"),
    ("recovery.num_tokens=1.00005k", "expected a whole number"),
    ("pruning.sparsities=[0.2, 0.1, 0.2]", "must rise"),
    ("pruning.sparsities=[0.1, 0.2]; pruning.num_shots=2", "takes the place"),
    ("pruning.width_multiple=8", f"pruning.width_multiple: {NO_OPTION} of rows_columns"),
    (f"{N_M}; pruning.n_m=[4, 2]", "needs N < M"),
    (f"{N_M}; pruning.target_sparsity=0.6", "more than 2:4 can remove"),
    (
        f"{WANDA}; {N_M}; pruning.target_sparsity=0.5",
        "to 2:4 at once; set target_sparsity to 0.5",
    ),
    (f"{WANDA}; curvature.damping.a=0.1", "gathers its own"),
    (f"{ELEMENT}; pruning.costs=obs_sum", "is of N:M groups"),
    (
        f"{ELEMENT}; pruning.update={{solver: single, num_iterations: 4}}",
        "has no iterations",
    ),
    (f"{GROUPS}; pruning.groups=[ffn, ffn]", "name a kind twice"),
    (
        f"{GROUPS}; pruning.groups=[experts]; curvature.damping={{a: 0.1}}",
        "invert no factor",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), MISTAKES, ids=[row[0] for row in MISTAKES]
)
def test_mistake_is_reported_once_and_in_terms_of_the_spec(
    changes: str, message: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        spec_of(changes)
    first, *lines = validation_message(caught.value, "spec.yaml").split("\n")
    assert first == "spec.yaml is not a valid job spec:"
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]


def test_repeated_section_is_refused() -> None:
    with pytest.raises(ValueError, match="pruning is given twice; remove one"):
        parse_spec(f"{MINIMAL}\npruning: {{target_sparsity: 0.1}}\n")


def test_overrides_in_the_readme_are_valid() -> None:
    pattern = r"`([a-z0-9-]+\.yaml)` with\s+`((?:--set \S+ ?)+)`"
    found = re.findall(pattern, (ROOT / "README.md").read_text())
    assert found
    for file, overrides in found:
        parse_spec(
            (ROOT / "pipelines" / file).read_text(),
            overrides.replace("--set ", "").split(),
        )


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ("cluster.num_shards=3; output.uri=elsewhere; name=y; memory.limit_gib=8", True),
        ("evaluation.0.num_sequences=5; model.source=other/place", True),
        ("pruning.target_sparsity=0.3", False),
        ("curvature.damping.g=0.5", False),
    ],
)
def test_method_fingerprint_depends_on_the_method_only(
    changes: str, is_same: bool
) -> None:
    assert (
        spec_of(changes).method_fingerprint() == spec_of().method_fingerprint()
    ) == is_same


def test_schedules_of_targets() -> None:
    linear = spec_of("pruning.num_shots=4").pruning.targets
    assert linear == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert (
        spec_of("pruning.num_shots=3; pruning.target_sparsity=0.23").pruning.targets[-1]
        == 0.23
    )
    assert spec_of("pruning.sparsities=[0.15, 0.2]").pruning.targets == (0.15, 0.2)


@pytest.mark.parametrize(
    ("changes", "multiple"),
    [
        ("name=x", 64),
        ("pruning.tensor_parallel=4", 256),
        ("pruning.width_multiple=8", 8),
        (
            "pruning.allocation=uniform; output.exports=[uniform]; output.quantize.scheme=int8",
            128,
        ),
    ],
)
def test_default_width_multiple(changes: str, multiple: int) -> None:
    overrides = f"output.uri=x; {GROUPS}; pruning.groups=[ffn]; {changes}"
    assert spec_of(overrides).pruning.multiple == multiple


@pytest.mark.parametrize("target", ["0.666667", "0.666"])
def test_target_of_a_pattern_may_be_rounded_as_in_errors(target: str) -> None:
    pattern = f"{WANDA}; {N_M}; pruning.n_m=[1, 3]; pruning.num_shots=1"
    assert spec_of(f"{pattern}; pruning.target_sparsity={target}").pruning.shots == 1

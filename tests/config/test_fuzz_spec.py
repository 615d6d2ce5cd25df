"""Any content of a job spec is parsed, or refused with a message."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_surgeon import pipeline
from ray_surgeon.config.job import JobSpec, parse_spec, validation_message

PIPELINES = sorted((Path(__file__).parents[2] / "pipelines").rglob("*.yaml"))
DOCUMENTS = [
    JobSpec.model_validate(yaml.safe_load(path.read_text())).model_dump(mode="json")
    for path in PIPELINES
]

STRANGE = (
    "",
    "1e400",
    "~",
    "../..",
    "s3://",
    "pkg://",
    "pkg://a/../b.gguf",
    "\x00",
    "\ufb00",
)
TEXTS = st.text(max_size=30) | st.sampled_from([*STRANGE, "1" * 400, "groups", "uniform"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def places(
    document: Any, path: tuple[str | int, ...] = ()
) -> list[tuple[str | int, ...]]:
    """Return the path of every value in a document."""
    inside = document if isinstance(document, dict) else {}
    if isinstance(document, list):
        inside = dict(enumerate(document))
    inner = [
        place for key, value in inside.items() for place in places(value, (*path, key))
    ]
    return [path, *inner] if path else inner


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """A valid spec in which one to three values are replaced, removed or added at random."""
    document: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(DOCUMENTS)))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(places(document)))
        place: Any = document
        for key in parents:
            place = place[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "replace":
            place[last] = draw(VALUES)
        elif kind == "remove":
            del place[last]
        elif isinstance(place, dict):
            place[draw(st.text(max_size=10))] = draw(VALUES)
    return document


FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def as_yaml(value: object) -> str:
    return yaml.safe_dump(value, allow_unicode=True)


@settings(FEW, max_examples=150)
@given(st.text(max_size=200) | (changed() | VALUES).map(as_yaml))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        spec = parse_spec(text)
    except ValidationError as error:
        message = validation_message(error, "spec.yaml")
        assert message.startswith("spec.yaml is not a valid job spec:\n  ")
        assert len(message) < 20_000
    except ValueError as error:
        assert "job spec" in str(error)
    else:
        again = parse_spec(yaml.safe_dump(spec.model_dump(mode="json")))
        assert again == spec
        assert again.method_fingerprint() == spec.method_fingerprint()
        assert math.isfinite(spec.schedule.last_sparsity or 0)
        assert 1 <= spec.schedule.shots <= 1000 or spec.schedule.sparsities is not None


@FEW
@given(st.text(max_size=40), VALUES)
def test_any_override_is_applied_or_refused(place: str, value: Any) -> None:
    try:
        parse_spec(PIPELINES[0].read_text(), [f"{place}={as_yaml(value)}"])
    except ValidationError as error:
        assert validation_message(error, "spec.yaml")
    except ValueError as error:
        assert str(error)


@settings(FEW, max_examples=25)
@given(document=changed())
def test_command_line_never_prints_a_traceback(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run of a changed spec with an absent model is refused with exit code 2."""
    path = tmp_path / "spec.yaml"
    path.write_text(as_yaml(document), encoding="utf-8")
    absent = "model={source: /absent/model}"
    assert pipeline.main([str(path), "--dry-run", "--set", absent]) == 2
    assert capsys.readouterr().err.startswith("error: ")

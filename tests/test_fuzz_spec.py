"""Whatever stands in a job spec, it is understood or refused with a message."""

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
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import parse_spec, validation_message

PIPELINES = sorted((Path(__file__).parent.parent / "pipelines").rglob("*.yaml"))
DOCUMENTS = [
    JobSpec.model_validate(yaml.safe_load(path.read_text())).model_dump(mode="json")
    for path in PIPELINES
]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=30),
    st.sampled_from(
        [
            "",
            "1e400",
            "~",
            "../..",
            "s3://",
            "pkg://",
            "pkg://a/../b.gguf",
            "\x00",
            "ﬀ",
            "1" * 400,
            "groups",
            "uniform",
        ]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=12,
)


def places(document: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the path of everything in a document."""
    found = [path] if path else []
    items = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in items:
        found += places(value, (*path, key))
    return found


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """A sound spec in which one to three places are replaced, removed or joined by a stranger."""
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


def understood_or_refused(text: str) -> None:
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
        assert math.isfinite(spec.pruning.last_sparsity or 0)
        assert 1 <= spec.pruning.shots <= 1000 or spec.pruning.sparsities is not None


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(changed())
def test_changed_specs(document: dict[str, Any]) -> None:
    understood_or_refused(yaml.safe_dump(document, allow_unicode=True))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.text(max_size=200), VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=True))
    )
)
def test_any_text(text: str) -> None:
    understood_or_refused(text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=40), VALUES)
def test_any_override(place: str, value: Any) -> None:
    text = PIPELINES[0].read_text()
    try:
        parse_spec(text, [f"{place}={yaml.safe_dump(value, allow_unicode=True)}"])
    except ValidationError as error:
        assert validation_message(error, "spec.yaml")
    except ValueError as error:
        assert str(error)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(document=changed())
def test_the_command_line_never_shows_a_traceback(
    document: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A dry run of a changed spec with an absent model: refused in time, exit code 2."""
    (tmp_path / "spec.yaml").write_text(
        yaml.safe_dump(document, allow_unicode=True), encoding="utf-8"
    )
    overrides = [
        "--set",
        "model.source=/absent/model",
        "--set",
        "model.wheel=null",
        "--set",
        "model.wheel_sha256=null",
    ]
    assert pipeline.main([str(tmp_path / "spec.yaml"), "--dry-run", *overrides]) == 2
    assert capsys.readouterr().err.startswith("error: ")

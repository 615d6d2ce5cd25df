"""The job spec: the user's settings, read and validated before anything starts."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import ErrorDetails

from ray_surgeon.config import sections
from ray_surgeon.config.base import REASON, Section, refusing
from ray_surgeon.config.curvature import CurvatureSection, KfacSection
from ray_surgeon.config.defaults import (
    PresetName,
    completed,
    is_newest,
    with_names,
    with_preset,
)
from ray_surgeon.config.groups import CoupledSection
from ray_surgeon.config.pruning import PruningSection
from ray_surgeon.config.schedule import NO_PRUNING, ScheduleSection
from ray_surgeon.config.sections import EvaluationSection, RecoverySection
from ray_surgeon.config.texts import CalibrationSection
from ray_surgeon.errors import ConfigError

HELD_SHARE = 0.1
MOST_HELD = 6
"""Default share and maximum number of the calibration windows held aside.

Few windows suffice to compare two states of one model; the others are better used for fitting.
"""


def _default_curvature(fields: dict[str, Any]) -> KfacSection | None:
    pruning = fields.get("pruning", ScheduleSection)
    return KfacSection() if getattr(pruning, "takes_curvature", False) else None


def _seconds(value: Any) -> Any:
    """Return a time such as 30min, 1.5h or 90s in seconds; other values are checked later."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([0-9.]+) *(s|sec|min|m|h)", value.strip())
    if found is None:
        raise ValueError(f"{value!r} is no time; give for example 30min, 2h or 90s")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2][0]]


class JobSpec(Section):
    """A job: one model, one method, one result."""

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    version: Literal[2, 3] = 3
    """Version of this format. 3: everything that is not given is chosen for the model and the
    machine; 2: the defaults of the sections
    """
    preset: PresetName | None = None
    """How long the job may take; fields of the spec override its settings. With version 3: fast:
    4 minutes, balanced: 12 minutes, quality: an hour, or what the job needs at least; balanced if
    neither preset nor time is given. With version 2: fixed settings, the same on every machine.
    Learning rates and damping are chosen during the run on windows held aside
    """
    time: Annotated[float, BeforeValidator(_seconds)] | None = Field(None, gt=0)
    """How long the job may take, in seconds, or with a unit: 90s, 30min, 2h. The number of
    calibration windows, the reconstruction and the recovery are chosen by the plan for this
    hardware. Needs version 3; not together with preset
    """
    name: str = Field(pattern="^[a-z0-9][a-z0-9.-]*$", max_length=63)
    """Name of the run: lower case, digits, dots, dashes"""
    model: sections.ModelSection
    """The model to prune"""
    calibration: CalibrationSection
    """The calibration text. If not given: source auto, a mix suitable for the model"""
    evaluation: EvaluationSection
    """Evaluation of the model: a list of texts, or texts, generation and tasks. If not given: the
    test parts of Python's help and docstrings
    """
    pruning: PruningSection | None
    """Structures to remove, and the amount; null: nothing is removed; then recovery needs a
    teacher, or the unpruned model is quantised or written as GGUF
    """
    curvature: CurvatureSection | None = Field(default_factory=_default_curvature)
    """Curvature of the loss; kfac if not given; none for sparsegpt, wanda and without pruning"""
    recovery: RecoverySection | None = None
    """Training after pruning; null: none"""
    memory: sections.MemorySection = sections.MemorySection()
    """Placement of weights and factors on the workers; may differ on --resume"""
    cluster: sections.ClusterSection = sections.RaySection()
    """Workers and their resources"""
    output: sections.OutputSection
    """Where results go"""

    @model_validator(mode="wrap")
    @classmethod
    def _keeping_the_document(
        cls, document: Any, handler: ModelWrapValidatorHandler[JobSpec]
    ) -> JobSpec:
        """Complete the spec with its defaults, and remember what was given."""
        if not isinstance(document, dict):
            return handler(document)
        spec = handler(cls._filled(document))
        spec._given = document
        return spec

    @property
    def given(self) -> dict[str, Any]:
        """The document that the spec was made from, without defaults."""
        return self._given

    def __eq__(self, other: object) -> bool:
        """Whether two specs have the same fields, however they were given."""
        if not isinstance(other, JobSpec):
            return NotImplemented
        return self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @staticmethod
    def _filled(document: dict[str, Any]) -> dict[str, Any]:
        """Return a document completed by its defaults and the preset's settings.

        The default of width_multiple suits the engines of the exports; the default of a teacher's
        dtype is that of the model.
        """
        document = with_names(document)
        if is_newest(document):
            document = completed(document)
        match document.get("model"), document.get("recovery"):
            case {"dtype": dtype}, {"teacher": {**teacher}, **recovery}:
                recovery["teacher"] = {"dtype": dtype} | teacher
                document = document | {"recovery": recovery}
        match document.get("pruning"), document.get("output"):
            case {"structure": "groups", **pruning}, {"quantize": section} if section:
                devices = pruning.get("tensor_parallel", 1)
                if isinstance(devices, int) and not pruning.get("width_multiple"):
                    width = {"width_multiple": sections.KERNEL_COLUMNS * devices}
                    document = document | {"pruning": document["pruning"] | width}
        return with_preset(document)

    def problems(self) -> Iterator[ConfigError]:
        """Yield conflicts between sections."""
        if self.time is not None and self.version == 2:
            yield ConfigError("time", "needs version: 3", "set it, or give a preset")
        if self.time is not None and self.preset is not None:
            yield ConfigError("time", "stands beside a preset", "give one of them")
        yield from self._problems_of_teacher()
        yield from self._problems_of_curvature()
        yield from self._problems_of_texts()
        yield from self._problems_of_exports()
        recovery = self.recovery
        where = self.memory.weights
        if self.memory.teacher != "auto" and not (recovery and recovery.has_teacher):
            yield ConfigError(
                field="memory.teacher",
                found="needs recovery.texts with loss: kl",
                remedy="remove it",
            )
        if recovery and recovery.trains_all and where not in ("auto", "device"):
            yield ConfigError(
                field="memory.weights",
                found=f"{where} does not go with recovery.rank all",
                remedy="use device, or auto",
            )

    def _problems_of_teacher(self) -> Iterator[ConfigError]:
        has_teacher = getattr(self.recovery, "teacher", None) is not None
        if self.pruning is None and not has_teacher:
            if self.recovery is not None:
                yield ConfigError(
                    field="recovery",
                    found="needs a pruned model or a teacher",
                    remedy="add recovery.teacher, or remove it",
                )
            elif not self.output.for_engines:
                remedy = (
                    "say what to remove, or add recovery.teacher, output.quantize or gguf"
                )
                yield ConfigError(
                    field="pruning",
                    found="null leaves nothing to do",
                    remedy=f"{remedy}",
                )
        if self.pruning is not None and has_teacher:
            own = "a job that prunes trains towards its own dense model"
            yield ConfigError(
                field="recovery.teacher",
                found=f"{own}",
                remedy="remove it, or set pruning to null",
            )
        if has_teacher and getattr(self.recovery, "loss", "kl") != "kl":
            yield ConfigError(
                field="recovery.teacher",
                found="loss cross_entropy needs none",
                remedy="set loss to kl, or remove it",
            )

    def _problems_of_curvature(self) -> Iterator[ConfigError]:
        is_taken = self.schedule.takes_curvature
        if is_taken != (self.curvature is not None):
            method = getattr(self.pruning, "method", "null")
            if is_taken:
                found = f"pruning.method {method} needs one"
                remedy = "remove the null"
            else:
                found = f"pruning.method {method} gathers its own"
                remedy = "remove it"
            yield ConfigError("curvature", found, remedy)
        elif self.curvature is not None and (
            problem := self.schedule.problem_with(self.curvature)
        ):
            yield problem
        kind = "null" if self.curvature is None else self.curvature.kind
        takes_gradients = kind == "kfac" or (kind != "extended_kfac" and self.recovery)
        if self.calibration.weigh == "answers" and not takes_gradients:
            yield ConfigError(
                field="calibration.weigh",
                found=f"answers does not go with curvature {kind}",
                remedy="use kfac or all",
            )

    def _problems_of_texts(self) -> Iterator[ConfigError]:
        most = self.calibration.num_sequences
        replicas = self.cluster.num_replicas
        names = [text.name for text in self.evaluation.texts]
        if len(set(names)) < len(names):
            yield ConfigError(
                field="evaluation",
                found=f"names must differ, got {names}",
                remedy="rename one",
            )
        sequences = f"{most} calibration sequences"
        if replicas > most:
            yield ConfigError(
                field="cluster.num_replicas",
                found=f"{replicas} cannot be filled by {sequences}",
                remedy="lower it",
            )
        backward = None if self.curvature is None else self.curvature.sequences_backward
        if backward is not None and not replicas <= backward <= most:
            remedy = f"every replica needs one, so give {replicas} to {most}"
            yield ConfigError(
                field="curvature.num_backward",
                found=f"{backward} of {sequences}",
                remedy=f"{remedy}",
            )
        self.check_borders()

    def _problems_of_exports(self) -> Iterator[ConfigError]:
        pruning = self.pruning
        exports = self.output.exports
        if self.evaluation.tasks is not None and not set(exports) - {"gguf"}:
            yield ConfigError(
                field="evaluation.tasks",
                found="run on exports for transformers",
                remedy="output.exports has none",
            )
        if not isinstance(pruning, CoupledSection):
            taken = {"masked"} if pruning else {"masked", "uniform", "gguf"}
            for kind in sorted(set(exports) - taken):
                yield ConfigError(
                    field="output.exports",
                    found=f"{kind} needs pruning.structure groups",
                    remedy="remove it, or set the structure",
                )
            if self.output.sizes is not None:
                yield ConfigError(
                    field="output.sizes",
                    found="needs pruning.sizes",
                    remedy="remove it",
                )
            return
        if unknown := set(self.output.sizes or ()) - set(pruning.sizes or ()):
            known = list(pruning.sizes or ())
            yield ConfigError(
                field="output.sizes",
                found=f"{sorted(unknown)} are none of pruning.sizes, {known}",
                remedy="name these",
            )
        limits = pruning.shrinking(pruning.fewest_groups)
        if "uniform" in exports and not limits.same_in_all_blocks:
            yield ConfigError(
                field="output.exports",
                found="uniform needs pruning.allocation uniform",
                remedy="or export per_block",
            )

    def check_borders(self) -> None:
        """Raise if the calibration cuts an evaluation text at another place.

        See `CalibrationSection.check_border`.
        """
        for i, text in enumerate(self.evaluation.texts):
            if text.has_own_split:
                self.calibration.check_border(text, f"evaluation.{i}")
                for number, streamed in enumerate(
                    self.recovery.texts if self.recovery else ()
                ):
                    streamed.check_border(text, f"recovery.texts.{number}")

    @property
    def schedule(self) -> ScheduleSection:
        """The schedule of the pruning."""
        return NO_PRUNING if self.pruning is None else self.pruning

    @property
    def num_held(self) -> int:
        """Number of calibration windows held aside.

        By default a tenth, at most six, if a stage is measured on them.
        """
        share = self.calibration.held_aside
        num_sequences = self.calibration.num_sequences
        # every replica takes part in a pass over them
        num_replicas = self.cluster.num_replicas
        most = num_sequences
        if share is None:
            chooses = self.curvature is not None and self.curvature.chooses_damping
            share = (
                HELD_SHARE
                if chooses or self.schedule.checks_itself or self.recovery
                else 0.0
            )
            most = MOST_HELD
        wanted = (
            max(num_replicas, min(most, round(share * num_sequences))) if share else 0
        )
        return min(wanted, num_sequences - num_replicas)

    def method_fingerprint(self) -> str:
        """Return a SHA-256 over all fields that determine the result.

        It excludes the name, the evaluation, the output, the cluster and the memory.

        It also excludes the model's source, because its content has a separate fingerprint, and the
        interval between commits of a recovery.
        """
        free = dict.fromkeys(
            ("name", "preset", "time", "cluster", "memory", "evaluation", "output"), True
        )
        of_recovery = {"commit_minutes": True, "teacher": {"source"}}
        inside: Any = {"model": {"source"}, "recovery": of_recovery}
        method = self.model_dump(mode="json", exclude=free | inside)
        return hashlib.sha256(json.dumps(method, sort_keys=True).encode()).hexdigest()


def input_schema() -> dict[str, Any]:
    """Return the JSON Schema of what a user writes: a spec before its defaults are filled in."""
    schema = JobSpec.model_json_schema()
    fields = schema["properties"]
    sections_of = schema["$defs"]
    text = {"type": "string"}
    schema["required"] = ["model", "pruning"]
    texts = {"type": "array", "items": {"$ref": "#/$defs/EvaluationText"}, "minItems": 1}
    for name, short in (("model", text), ("output", text), ("evaluation", texts)):
        described = fields[name].pop("description")
        fields[name] = {"anyOf": [fields[name], short], "description": described}
    fields["time"]["anyOf"].append(text)
    del sections_of["EvaluationSection"]["required"]
    del sections_of["OutputSection"]["required"]
    del sections_of["CalibrationSection"]["required"]
    sections_of["ModelSection"]["properties"]["dtype"]["enum"] += ["fp32", "bf16", "fp16"]
    return schema


_YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError)
"""Errors of PyYAML, and of its constructors for values that do not match their tags."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses repeated keys; YAML itself would use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        """Return a mapping."""
        earlier = []
        for key, _ in node.value:
            if key.value in earlier and key.value != "<<":
                problem = f"{key.value} is given twice; remove one"
                raise yaml.constructor.ConstructorError(
                    None, None, problem, key.start_mark
                )
            earlier.append(key.value)
        return super().construct_mapping(node, deep)


def parse_spec(text: str, overrides: Sequence[str] = ()) -> JobSpec:
    """Parse a job spec.

    Args:
        text: YAML or JSON.
        overrides: each ``section.field=value`` with a YAML value; list items by number, e.g.
            ``evaluation.0.num_sequences=8``.

    Raises:
        ValueError: the text is not YAML, or an override is malformed.
        pydantic.ValidationError: a field is wrong.
    """
    with refusing(
        "the job spec is not valid YAML", "see the files in pipelines/", _YAML_ERRORS
    ):
        document = yaml.load(text, _Loader)
    if not isinstance(document, dict):
        raise ValueError(
            "the job spec must be a mapping of sections; see the files in pipelines/"
        )
    for override in overrides:
        _apply_override(document, override)
    return JobSpec.model_validate(document)


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ValueError(
            f"--set {override}: expected section.field=value, e.g. name=test"
        )
    remedy = f"put it into quotes, as in '{path}=\"{value}\"'"
    with refusing(
        f"--set {override}: the value is no YAML ({REASON})", remedy, _YAML_ERRORS
    ):
        content = yaml.safe_load(value)
    texts = document.get("evaluation")
    is_item = len(keys) > 1 and keys[1].isdecimal()
    if keys[0] == "evaluation" and isinstance(texts, list) and not is_item:
        document["evaluation"] = {"texts": texts}  # the long form of a list
    place: Any = document
    for number, key in enumerate(keys):
        at = _place_in(
            place, key, where=f"--set {override}: {'.'.join(keys[:number])} is"
        )
        if number == len(keys) - 1:
            place[at] = content
        elif isinstance(place, dict) and place.get(at) is None:
            # absent, or switched off by null
            place[at] = {}
        place = place[at]


def _place_in(container: Any, key: str, where: str) -> str | int:
    """Return a key of a mapping, or the index of an item of a list."""
    if isinstance(container, dict):
        return key
    if not isinstance(container, list):
        raise ValueError(f"{where} {container!r}, which has no fields; set it itself")
    if not key.isdecimal() or int(key) not in range(len(container)):
        last = len(container) - 1
        raise ValueError(
            f"{where} a list with items 0 to {last}, and {key!r} is none of them"
        )
    return int(key)


_LIST = "expected a list, such as [a, b]"
_FIELDS = "expected fields, such as {name: value}"
_SENTENCES = {
    "missing": "is missing; add it, `ray-surgeon schema` describes it",
    "tuple_type": _LIST,
    "list_type": _LIST,
    "model_type": _FIELDS,
    "model_attributes_type": _FIELDS,
    "dict_type": _FIELDS,
    "int_parsing": "expected a whole number, written out",
    "float_parsing": "expected a number; an exponent needs a point and a sign, as in 1.0e+8",
}
"""Type of a pydantic error -> its message for people who write YAML."""


def validation_message(
    error: ValidationError, origin: str, derived: Sequence[str] = ()
) -> str:
    """Return a message about an invalid job spec: one line per field, with the remedy.

    Args:
        error: of `JobSpec`.
        origin: of the spec.
        derived: sections that were made from others; their errors are left out if others have any.
    """
    lines = [f"{origin} is not a valid job spec:"]
    problems = error.errors(include_url=False)
    for problem in problems:
        others = [another["loc"] for another in problems if another is not problem]
        if not _follows(problem, others, derived):
            lines.append(_line(problem))
    return "\n".join(lines)


def _follows(
    problem: ErrorDetails, others: Sequence[tuple[int | str, ...]], derived: Sequence[str]
) -> bool:
    """Whether an error is only a consequence of errors at other places."""
    kind = problem["type"]
    place = problem["loc"]
    if kind == "default_factory_not_called":
        return True
    # a list is also too short if one of its items is wrong
    if kind == "too_short" and any(loc[: len(place)] == place for loc in others):
        return True
    made = [(section,) for section in derived]
    return place[:1] in made and any(loc[:1] not in made for loc in others)


def _near_name(names: Sequence[str]) -> str | None:
    """Return the field whose name is most like the last one of a path, in the same section."""
    from ray_surgeon.config.reference import sections_below

    named = [name for name in names if not name.isdecimal()]
    if not named:
        return None
    *path, wrong = named
    schema = JobSpec.model_json_schema()
    sections: list[Mapping[str, Any]] = [schema]
    for name in path:
        sections = list(sections_below(schema, sections, name))
    known = set[str]()
    for section in sections:
        known.update(section.get("properties", {}))
    near = difflib.get_close_matches(wrong, sorted(known), n=1)
    return near[0] if near else None


def _line(problem: ErrorDetails) -> str:
    kind = problem["type"]
    names = []
    tags = []
    for part in map(str, problem["loc"]):
        if part.startswith("<"):
            tags.append(part[1:-1])
        else:
            names.append(part)
    error = problem.get("ctx", {}).get("error")
    if isinstance(error, ConfigError):
        names.append(error.field)
        return f"  {'.'.join(names)}: {error.found}; {error.remedy}"
    message = _SENTENCES.get(kind, problem["msg"].removeprefix("Value error, "))
    if kind not in ("missing", "value_error"):
        got = f" (got {reprlib.repr(problem['input'])[:80]})"
    else:
        got = ""
    if kind == "extra_forbidden":
        message = f"is not an option of {tags[-1]}" if tags else "is not an option"
        near = _near_name(names)
        if near:
            got += f"; do you mean {near}?"
        else:
            got += (
                "; remove it or correct its name, `ray-surgeon schema` lists the fields"
            )
    return f"  {'.'.join(names) or 'spec'}: {message}{got}"

"""Chooses what a spec of version 3 leaves open: dtype, groups, workers, and the use of its time.

The result is a spec that says everything, so that the run can be repeated exactly.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import ValidationError

from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.config.base import count
from ray_surgeon.config.defaults import (
    LEVELS,
    PRESET_SECONDS,
    ModelFacts,
    can_recover,
    completed,
    fill,
    is_newest,
    mapping,
    with_names,
)
from ray_surgeon.config.job import JobSpec, validation_message
from ray_surgeon.distributed.memory_plan.device_resources import (
    DEVICES,
    Device,
    Room,
    available_cpus,
    named_device,
    resources_here,
)
from ray_surgeon.distributed.memory_plan.planner import DoesNotFitError, Plan
from ray_surgeon.errors import ConfigError
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.recovery.training import most_useful_tokens
from ray_surgeon.storage import files

_DTYPES = ("float32", "bfloat16", "float16")
_CPUS_OF_A_WORKER = 4
"""CPUs per worker on a machine with more CPUs than this; fewer threads are used better."""
_FEWEST_TOKENS = 8_192
"""A recovery of fewer tokens is left out."""
_REFERENCE_TOKENS = 65_536
"""Tokens of the recovery by which the time of a token is planned."""
_SHARE_OF_A_PASS = 0.8
"""A level is taken if its recovery sees at least this share of its calibration tokens."""
_AROUND_S = 15.0
"""Seconds of a job in which its processes start and end."""
_ONCE = {"teacher", "load", "sampling", "export", "quantise"}
"""Steps that run once, whatever the number of shots."""


@dataclass(frozen=True)
class Machines:
    """The hardware that a job may use."""

    num_cpus: int
    num_gpus: int = 0
    gpu: str = "h100"  # name of the GPUs in devices.yaml
    where: str = "this machine"
    host_bytes: float = 0.0  # memory of each machine; 0 for that of this one
    disk_bytes: float = 0.0  # free on each machine; 0 for that of this one
    workers_each: int = 8  # workers on one machine, at most


@dataclass(frozen=True)
class Resolved:
    """A job spec that says everything."""

    spec: JobSpec
    notes: tuple[
        str, ...
    ] = ()  # lines for the user: what was chosen, and how to change it
    deadline_s: float | None = (
        None  # time.time() by which the job should end; None for no limit
    )


Planned = Callable[[JobSpec, Room, Device], Plan]
"""Returns the plan of a spec from its model's layout, without reading its texts."""


def resolve(
    spec: JobSpec, layout: ModelLayout, machines: Machines | None, planned: Planned
) -> Resolved:
    """Return the spec with everything chosen that it leaves open.

    A run that has begun keeps its choices.

    Args:
        spec: parsed.
        layout: of its model.
        machines: the hardware; this machine if not given.
        planned: makes plans.

    Raises:
        ValueError: the time is too short, or the spec does not fit the model.
    """
    began_s = time.time()
    facts = facts_of(layout, spec.model.source)
    if not is_newest(spec.given) or not spec.given:
        return _with_dtype(spec, facts)
    given = with_names(spec.given)
    document = completed(given, facts)
    wanted_s = spec.time or PRESET_SECONDS.get(str(document.get("preset")))
    deadline_s = None
    if wanted_s is not None:
        deadline_s = began_s + wanted_s - _AROUND_S
    earlier = _earlier_choices(spec.output.uri)
    if earlier is not None:
        return Resolved(
            _validated(_merged(earlier, given)),
            notes=("continuing with the settings of the run",),
            deadline_s=deadline_s,
        )
    machines = machines or this_machine()
    notes = _notes(given, document)
    typical = dict(document)
    fill(typical, LEVELS["balanced"])
    document["cluster"] = with_workers(typical, machines, planned)
    notes.append(_note_on_workers(document["cluster"], machines))
    if wanted_s is None:
        return Resolved(_validated(document), tuple(notes))
    document, note = with_time(
        document,
        wanted_s,
        seconds_of=lambda one: planned_seconds(one, machines, planned),
        num_parameters=layout.num_parameters,
        is_strict=spec.time is not None,
    )
    notes.append(note)
    return Resolved(_validated(document), tuple(notes), deadline_s)


def facts_of(layout: ModelLayout, source: str) -> ModelFacts:
    """Return the properties of a model that defaults depend on.

    Args:
        layout: of the model.
        source: of the model; a GGUF file, whose weights may have fewer bits, becomes bfloat16.
    """
    dtype = str(getattr(layout.config, "dtype", None)).removeprefix("torch.")
    if dtype not in _DTYPES or source.endswith(".gguf"):
        dtype = "bfloat16"
    widths = []
    for groups in layout.group_sets:
        if groups.kind == "ffn":
            widths.append(len(groups.columns))
    kinds = tuple(layout.kinds)
    return ModelFacts(dtype=dtype, kinds=kinds, width=min(widths, default=0))


def _with_dtype(spec: JobSpec, facts: ModelFacts) -> Resolved:
    """Return a spec of version 2, whose dtype may be auto."""
    notes = _notes_on_version_2(spec)
    if spec.model.dtype != "auto":
        return Resolved(spec, notes)
    model = spec.model.model_copy(update={"dtype": facts.dtype})
    recovery = spec.recovery
    if recovery is not None and recovery.teacher is not None:
        teacher = recovery.teacher.model_copy(update={"dtype": facts.dtype})
        recovery = recovery.model_copy(update={"teacher": teacher})
    resolved = spec.model_copy(update={"model": model, "recovery": recovery})
    return Resolved(resolved, notes)


def _notes_on_version_2(spec: JobSpec) -> tuple[str, ...]:
    """Return a line about the defaults that a spec of version 2 keeps, if it takes any."""
    given = spec.given
    kept = []
    if "dtype" not in mapping(given.get("model")):
        kept.append("dtype float32")
    if "exports" not in mapping(given.get("output")):
        kept.append("export masked")
    pruning = given.get("pruning")
    if isinstance(pruning, Mapping) and "structure" not in pruning:
        kept.append("structure rows_columns")
    if not kept or not given:
        return ()
    return (f"version 2 keeps its defaults: {', '.join(kept)}; version 3 has others",)


def _validated(document: Mapping[str, Any]) -> JobSpec:
    """Return the spec of a document; preset and time have become its other fields."""
    try:
        return JobSpec.model_validate({**document, "preset": None, "time": None})
    except ValidationError as error:
        raise ValueError(
            validation_message(error, "the spec, with the model's defaults,")
        ) from error


def _earlier_choices(uri: str) -> dict[str, Any] | None:
    """Return the resolved spec of a run that has begun in a folder."""
    directory = RunDirectory(uri)
    path = directory.path("spec.yaml")
    if not files.exists(path):
        return None
    document = yaml.safe_load(files.read_text(path))
    return document if isinstance(document, dict) else None


def _merged(earlier: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the earlier document with what is given now in its place."""
    merged = dict(earlier)
    for name, value in given.items():
        if isinstance(value, Mapping) and isinstance(earlier.get(name), Mapping):
            merged[name] = _merged(earlier[name], value)
        else:
            merged[name] = value
    return merged


def _notes(given: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    """Return a line for each default that the model decides."""
    notes = []
    dtype = document["model"]["dtype"]
    if mapping(given.get("model")).get("dtype", "auto") == "auto":
        notes.append(f"dtype: {dtype}, from the checkpoint (--set model.dtype=float32)")
    pruning = mapping(document.get("pruning"))
    if "groups" in pruning and "groups" not in mapping(given.get("pruning")):
        notes.append(
            f"structure: groups of {', '.join(pruning['groups'])}, allocation "
            f"{pruning['allocation']} (--set pruning.groups=[ffn,attention])"
        )
    output = document["output"]
    if "exports" not in mapping(given.get("output")):
        kinds = ", ".join(output["exports"])
        notes.append(f"export: {kinds}, into {output['uri']} (--output FOLDER)")
    return notes


# Workers


def this_machine() -> Machines:
    """Return the hardware of this machine."""
    num_gpus = torch.cuda.device_count()
    gpu = "h100"
    if num_gpus:
        name = torch.cuda.get_device_name(0).lower().replace(" ", "")
        known = [key for key in DEVICES if key in name]
        gpu = max(known, key=len, default="a100")
    return Machines(available_cpus(), num_gpus, gpu)


def with_workers(
    document: Mapping[str, Any], machines: Machines, planned: Planned
) -> dict[str, Any]:
    """Return the section `cluster` with workers for all GPUs, or else for all CPUs.

    There are as few shards as keep weights and factors on the devices, and as many replicas as
    there is room for. Fields that are given stay.
    """
    section = dict(mapping(document.get("cluster")))
    num_gpus = machines.num_gpus
    if section.get("gpus_per_worker") == 0:
        num_gpus = 0
    if section.get("backend") == "local":
        section.setdefault("num_shards", 1)
        section.setdefault("num_replicas", 1)
        num_workers = section["num_shards"] * section["num_replicas"]
        section.setdefault("gpus_per_worker", min(1, num_gpus))
        section.setdefault("cpus_per_worker", max(1, machines.num_cpus // num_workers))
        return section
    num_workers = num_gpus or _workers_of_cpus(machines.num_cpus)
    section.setdefault("gpus_per_worker", min(1, num_gpus))
    if "num_shards" not in section:
        section["num_shards"] = _enough_shards(
            document, section, num_workers, machines, planned
        )
    if "num_replicas" not in section:
        section["num_replicas"] = max(1, num_workers // section["num_shards"])
    if "cpus_per_worker" not in section:
        used = section["num_shards"] * section["num_replicas"]
        section["cpus_per_worker"] = max(1, machines.num_cpus // used)
    return section


def _workers_of_cpus(num_cpus: int) -> int:
    if num_cpus <= _CPUS_OF_A_WORKER:
        return num_cpus
    return num_cpus // _CPUS_OF_A_WORKER


def _enough_shards(
    document: Mapping[str, Any],
    section: Mapping[str, Any],
    num_workers: int,
    machines: Machines,
    planned: Planned,
) -> int:
    """Return the smallest number of shards that keeps everything on the devices."""
    for num_shards in range(1, num_workers + 1):
        if num_workers % num_shards:
            continue
        replicas = section.get("num_replicas", num_workers // num_shards)
        cluster = {**section, "num_shards": num_shards, "num_replicas": replicas}
        with contextlib.suppress(DoesNotFitError):
            spec = _validated({**document, "cluster": cluster})
            plan = _plan(spec, machines, planned)
            if plan.stores.weights == plan.stores.factors == "device":
                return num_shards
    return num_workers


def _plan(spec: JobSpec, machines: Machines, planned: Planned) -> Plan:
    """Return the plan of a spec on the machines.

    Raises:
        DoesNotFitError: no plan fits.
    """
    section = spec.cluster
    here = resources_here(torch.device("cpu"), spec.memory.scratch).room
    together = min(section.num_workers, machines.workers_each)
    host = (machines.host_bytes or here.host) / together
    disk = (machines.disk_bytes or here.disk) / together
    if section.gpus_per_worker:
        device = named_device(section.device_speed or machines.gpu, 1)
        room = Room(device.memory_bytes, host, disk, device_is_host=False)
    else:
        device = named_device(section.device_speed or "cpu", section.cpus_per_worker)
        room = Room(host, host, disk, device_is_host=True)
    return planned(spec, room, device)


def _note_on_workers(section: Mapping[str, Any], machines: Machines) -> str:
    num_workers = section["num_shards"] * section["num_replicas"]
    each = f"{section['cpus_per_worker']} CPUs"
    if section["gpus_per_worker"]:
        each = "a GPU"
    return (
        f"workers: {num_workers} of {machines.where} with {each} each, "
        f"{section['num_shards']} shards x {section['num_replicas']} replicas (--shards N)"
    )


# Time


@dataclass(frozen=True)
class PlannedTime:
    """Planned seconds of a job."""

    total_s: float
    recovery_s: float


def planned_seconds(
    document: Mapping[str, Any], machines: Machines, planned: Planned
) -> PlannedTime:
    """Return the planned time of a job.

    Raises:
        DoesNotFitError: it does not fit the memory.
    """
    spec = _validated(document)
    seconds = seconds_of_run(spec, _plan(spec, machines, planned))
    return PlannedTime(sum(seconds.values()), seconds.get("recovery", 0.0))


def seconds_of_run(spec: JobSpec, plan: Plan) -> dict[str, float]:
    """Return step -> planned time in all shots together.

    Args:
        spec: of the job.
        plan: for it, with the times of one shot, whose recovery is that of the last shot.
    """
    seconds = {}
    for name, one in plan.seconds.items():
        seconds[name] = one * _times(spec, name)
    return seconds


def _times(spec: JobSpec, step: str) -> float:
    """Return how many times the planned step a run has."""
    num_shots = spec.schedule.shots
    if step in _ONCE:
        return 1.0
    if step != "recovery" or spec.recovery is None:
        return float(num_shots)
    num_ends = len(spec.schedule.size_shots)
    between = spec.recovery.num_tokens_between_shots / spec.recovery.num_tokens
    return num_ends + (num_shots - num_ends) * between


def with_time(
    document: Mapping[str, Any],
    time_s: float,
    *,
    seconds_of: Callable[[Mapping[str, Any]], PlannedTime],
    num_parameters: int,
    is_strict: bool,
) -> tuple[dict[str, Any], str]:
    """Return the document with settings that use the time, and a line about them.

    The largest level is taken whose recovery sees most of its calibration text; the rest of the
    time is the recovery's.

    Args:
        document: completed, with workers.
        time_s: seconds of the whole job.
        seconds_of: returns the planned seconds of a document.
        num_parameters: of the model.
        is_strict: whether a time that is too short is refused.

    Raises:
        ValueError: the time is too short; gives the shortest.
    """
    floor, *larger = LEVELS
    use = _at_level(document, floor, time_s, seconds_of, num_parameters)
    if use.planned_s > time_s and is_strict:
        raise ConfigError(
            field="time",
            found=f"{time_s:.0f} seconds, but the plan needs {use.planned_s:.0f} at least",
            remedy=f"give {math.ceil(use.planned_s / 60)}min or more, or smaller sections",
        )
    for name in larger:
        try:
            more = _at_level(document, name, time_s, seconds_of, num_parameters)
        except DoesNotFitError:
            break
        sees_enough = more.num_tokens >= _SHARE_OF_A_PASS * more.calibration_tokens
        if more.planned_s > time_s or not sees_enough:
            break
        use = more
    recovery = "no recovery"
    if use.num_tokens:
        recovery = f"a recovery of {use.num_tokens:,} tokens"
    windows = use.document["calibration"]["num_sequences"]
    note = (
        f"time: {time_s / 60:.3g} minutes asked, {use.planned_s / 60:.3g} planned, with "
        f"{windows} calibration windows and {recovery} (--time 30min)"
    )
    return use.document, note


class _Use(NamedTuple):
    """A use of the time."""

    document: dict[str, Any]
    planned_s: float
    num_tokens: int  # of the recovery

    @property
    def calibration_tokens(self) -> int:
        section = self.document["calibration"]
        return int(section["num_sequences"] * section["sequence_length"])


def _at_level(
    document: Mapping[str, Any],
    name: str,
    time_s: float,
    seconds_of: Callable[[Mapping[str, Any]], PlannedTime],
    num_parameters: int,
) -> _Use:
    """Return the use of the time at a level."""
    chosen = dict(document)
    fill(chosen, LEVELS[name])
    given = document.get("recovery", {})
    if not can_recover(document):
        return _Use(chosen, seconds_of(chosen).total_s, 0)
    if given is None or "num_tokens" in mapping(given):
        tokens = int(count(mapping(given).get("num_tokens", 0)))
        return _Use(chosen, seconds_of(chosen).total_s, tokens)
    level = LEVELS[name]["recovery"] or {"rank": 32}
    section = {**level, **mapping(given)}
    reference = _REFERENCE_TOKENS
    planned = seconds_of({**chosen, "recovery": _of_length(section, reference)})
    base_s = planned.total_s - planned.recovery_s
    tokens = int((time_s - base_s) * reference / max(planned.recovery_s, 1e-9))
    windows = chosen["calibration"]
    most = most_useful_tokens(
        num_parameters, windows["num_sequences"] * windows["sequence_length"]
    )
    tokens = min(most, tokens) // 1024 * 1024
    if tokens < _FEWEST_TOKENS:
        chosen["recovery"] = None
        return _Use(chosen, base_s, 0)
    chosen["recovery"] = _of_length(section, tokens)
    return _Use(chosen, base_s + planned.recovery_s * tokens / reference, tokens)


def _of_length(section: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
    """Return the section of a recovery of a number of tokens, after every shot."""
    return {
        **section,
        "num_tokens": num_tokens,
        "num_tokens_between_shots": num_tokens,
    }

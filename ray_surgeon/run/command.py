"""The part of the command line that runs a job; `pipeline` imports it only if it is needed."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console

from ray_surgeon.checkpointing import RunDirectory, TakenOverError
from ray_surgeon.config.defaults import is_newest
from ray_surgeon.config.job import JobSpec, parse_spec, validation_message
from ray_surgeon.config.sections import RaySection
from ray_surgeon.distributed.memory_plan.device_resources import (
    DEVICES,
    Device,
    Room,
    named_device,
    resources_here,
)
from ray_surgeon.distributed.memory_plan.planner import DoesNotFitError, plan_table
from ray_surgeon.errors import ConfigError
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.checkpoint import BadWeightsError
from ray_surgeon.preparation.inputs import Inputs, check
from ray_surgeon.preparation.reading import as_input_error
from ray_surgeon.preparation.resolve import Machines, this_machine
from ray_surgeon.report.display import Display, new_console, shots_table
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.report.summary import summary_lines
from ray_surgeon.run.arguments import quiet_transformers, towards
from ray_surgeon.run.result import PruneResult, ended_before, run
from ray_surgeon.storage import files

_MAX_SPEC_BYTES = 2**20
_LARGE = 2.0**40
"""Bytes of memory and disk of a Kubernetes node, if not given."""

DONE = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

_REFUSED = (BadWeightsError, DoesNotFitError, OutOfReachError)
"""Errors of the input that are found only during a run."""
_ENDS = (
    ValueError,
    RuntimeError,
    OSError,
    FloatingPointError,
    KeyboardInterrupt,
    SystemExit,
)
"""Errors that end a command with a message; any other is a defect and shows a traceback."""


def _read_spec(arguments: argparse.Namespace) -> JobSpec:
    """Return the job spec of the command line: a file, or a model with options."""
    settings = [*_settings(arguments), *arguments.set]
    try:
        return parse_spec(_spec_text(arguments), settings)
    except ValidationError as error:
        origin = arguments.source if arguments.is_spec else "the command line"
        raise ValueError(validation_message(error, origin)) from error


def _spec_text(arguments: argparse.Namespace) -> str:
    """Return the text of a job spec, or that of one which only names the model."""
    source = arguments.source
    if source == "-":
        return sys.stdin.read()
    if arguments.is_spec:
        with as_input_error(f"cannot read the job spec {source}"):
            files.check_size(
                source,
                _MAX_SPEC_BYTES,
                "this is no job spec; see the files in pipelines/",
            )
            return files.read_text(source)
    document: dict[str, Any] = {"model": {"source": source}, "pruning": {}}
    if "teacher" in arguments:
        document = towards(arguments.teacher, document)
    return json.dumps(document)


def _settings(arguments: argparse.Namespace) -> list[str]:
    """Return the fields that options stand for, as --set takes them."""
    fields = {
        "output.uri": arguments.output,
        "time": arguments.time,
        "preset": arguments.preset,
        "cluster.num_shards": arguments.shards,
    }
    settings = []
    if getattr(arguments, "sparsity", None) is not None:
        settings.append(f"pruning.target_sparsity={arguments.sparsity}")
    for name, value in fields.items():
        if value is not None:
            settings.append(f"{name}={json.dumps(value)}")
    if arguments.prompts is not None:
        prompts = json.dumps(arguments.prompts)
        settings += ["calibration.source=self", f"calibration.prompts={prompts}"]
    if arguments.gpus == 0:
        settings.append("cluster.gpus_per_worker=0")
    return settings


def _machines(arguments: argparse.Namespace, spec: JobSpec) -> Machines | None:
    """Return the hardware that a job of version 3 may use; None for all of this machine.

    Raises:
        ValueError: there are fewer GPUs than the command line asks for.
    """
    if not is_newest(spec.given):  # it says how many workers there are
        return None
    section = spec.cluster
    machines = replace(
        this_machine(),
        host_bytes=arguments.host_memory or 0.0,
        disk_bytes=arguments.disk or 0.0,
        workers_each=arguments.workers_per_machine or 8,
    )
    has_address = isinstance(section, RaySection) and (
        section.address or os.environ.get("RAY_ADDRESS")
    )
    if arguments.dry_run and arguments.device not in (None, "cpu"):
        number = arguments.gpus or arguments.workers_per_machine or 1
        return replace(machines, num_gpus=number, gpu=arguments.device)
    if isinstance(section, RaySection) and has_address and not arguments.dry_run:
        from ray_surgeon.run.driver import hardware

        machines = hardware(section)
    if arguments.gpus is None:
        return machines
    if arguments.gpus > machines.num_gpus:
        raise ConfigError(
            field="--gpus",
            found=f"{arguments.gpus}, but {machines.where} has {machines.num_gpus} (torch "
            f"{torch.__version__}, built for CUDA {torch.version.cuda})",
            remedy="install torch with CUDA and a driver, or ask for fewer",
        )
    return replace(machines, num_gpus=arguments.gpus)


@quiet_transformers()
def perform(arguments: argparse.Namespace, words: Sequence[str], prog: str) -> int:
    """Run a job spec and return the exit code.

    Args:
        arguments: of the command line.
        words: the same as they were typed, for the command that resumes the run.
        prog: name of the command.
    """
    # Ray and Kubernetes stop jobs with it
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = new_console()
    resume_with = ""
    try:
        spec = _read_spec(arguments)
        inputs = check(
            spec,
            resume=arguments.resume,
            dry_run=arguments.dry_run or arguments.print_spec,
            machines=_machines(arguments, spec),
        )
        if arguments.print_spec:
            sys.stdout.write(inputs.spec_yaml)
            return DONE
        if arguments.kubernetes:
            from ray_surgeon.run.kubernetes import ray_job

            plan = inputs.plan(*_planned_for(arguments, inputs))
            sys.stdout.write(ray_job(inputs, plan))
            return DONE
        for line in inputs.notes:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        if arguments.dry_run:
            if not inputs.fingerprints:
                console.print(
                    "planned from config.json alone: there are no weights to check"
                )
            _show_plan(arguments, inputs, console)
            return DONE
        result = ended_before(inputs, console.print)
        if result is None:
            _connect(inputs, console)
            resume_with = f"continue with: {prog} {shlex.join([*words, '--resume'])}"
            with Display(console, inputs.spec.name) as display:
                result = run(inputs, display, disconnects=True)
    except _ENDS as error:
        return _end(error, resume_with)
    _show(result, console)
    return DONE


def _show_plan(arguments: argparse.Namespace, inputs: Inputs, console: Console) -> None:
    from ray_surgeon.run.plan_text import plan_lines

    plan = inputs.plan(*_planned_for(arguments, inputs))
    for line in plan_lines(inputs.spec, plan):
        console.print(line, soft_wrap=True, highlight=False)
    if arguments.verbose:
        console.print(plan_table(plan))


def _connect(inputs: Inputs, console: Console) -> None:
    """Connect to Ray, if the job runs there."""
    if not isinstance(inputs.spec.cluster, RaySection):
        return
    from ray_surgeon.run.driver import connect  # Ray is imported only if it is used

    where = f"running on {connect(inputs.ray)} into {inputs.spec.output.uri}"
    console.print(where, soft_wrap=True)
    # again, because ray.init installs another handler
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _planned_for(arguments: argparse.Namespace, inputs: Inputs) -> tuple[Room, Device]:
    """Return a worker's room and device, from the command line or else from this machine."""
    section = inputs.spec.cluster
    name = arguments.device or section.device_speed
    if not name:
        wants_gpu = section.gpus_per_worker or arguments.device_memory
        name = "h100" if wants_gpu else "cpu"
    if arguments.device is not None and name not in DEVICES:
        raise ValueError(f"--device: {name} is none of {', '.join(sorted(DEVICES))}")
    device = named_device(name, section.cpus_per_worker)
    if arguments.kubernetes:  # a pod is made as large as the job needs it
        host = arguments.host_memory or _LARGE
        disk = arguments.disk or _LARGE
    else:
        here = resources_here(torch.device("cpu"), inputs.spec.memory.scratch).room
        together = min(section.num_workers, arguments.workers_per_machine or 8)
        host = (arguments.host_memory or here.host) / max(1, together)
        disk = (arguments.disk or here.disk) / max(1, together)
    if not device.memory_bytes:
        return Room(host, host, disk, device_is_host=True), device
    memory = arguments.device_memory or device.memory_bytes
    return Room(memory, host, disk, device_is_host=False), device


def _end(error: BaseException, resume_with: str) -> int:
    """Print why the command ends, and return its exit code.

    Args:
        error: that ended it.
        resume_with: the command that resumes the run; empty if no run has begun.
    """
    console = Console(stderr=True)
    if isinstance(error, SystemExit) and error.code != signal.SIGTERM:
        raise error  # Ray turns SIGTERM into an exit while it starts, and nothing else
    if isinstance(error, KeyboardInterrupt | SystemExit):
        if resume_with:
            console.print(f"interrupted; {resume_with}", markup=False, soft_wrap=True)
        return INTERRUPTED
    of_input = isinstance(error, _REFUSED if resume_with else ValueError)
    if of_input:
        message = f"error: {error}"
    else:
        message = f"failed: {error}"
        if resume_with and not isinstance(error, TakenOverError):
            message += f"\n{resume_with}"
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    return BAD_INPUT if of_input else FAILED


def _show(result: PruneResult, console: Console) -> None:
    if len(result.report["shots"]) > 1:
        console.print(shots_table(result.report))
    for line in summary_lines(result.report, result.uri):
        # commands are copied, so they are not broken
        soft_wrap = not (console.is_terminal and line.startswith("warning: "))
        console.print(line, soft_wrap=soft_wrap, highlight=False, markup=False)


def export_more(argv: Sequence[str], run_job: Callable[[Sequence[str], str], int]) -> int:
    """Write more exports of a finished run in addition to those that it has.

    Args:
        argv: arguments after the command's name.
        run_job: function that runs the command line of a job.

    Returns:
        The exit code.
    """
    prog = "ray-surgeon export"
    description = "Write further exports of a finished run."
    parser = argparse.ArgumentParser(prog, description=description)
    parser.add_argument("run", help="run directory, on any fsspec URI")
    parser.add_argument("--exports", required=True, help="kinds, as uniform,gguf")
    parser.add_argument(
        "--size", type=float, help="of pruning.sizes; all of them if not given"
    )
    arguments, rest = parser.parse_known_args(argv)
    directory = RunDirectory(arguments.run)
    try:
        with as_input_error(f"{arguments.run} holds no finished run"):
            before = directory.report()
    except ValueError as error:
        return _end(error, "")
    output: dict[str, Any] = {
        "exports": arguments.exports.split(","),
        "quantize": None,
        "sizes": None,
    }
    if arguments.size is not None:
        output["sizes"] = [arguments.size]
    changes = []
    for name, value in output.items():
        changes.append(f"--set=output.{name}={json.dumps(value)}")
    try:
        return run_job([directory.path("spec.yaml"), "--resume", *changes, *rest], prog)
    finally:
        _keep_earlier_exports(directory, before)


def _keep_earlier_exports(directory: RunDirectory, before: dict[str, Any]) -> None:
    """Add the spec and the exports of an earlier report to the report of a run."""
    now = directory.report()
    places = {export["uri"] for export in now["exports"]}
    kept = [export for export in before["exports"] if export["uri"] not in places]
    now["spec"] = before["spec"]
    now["exports"] = kept + now["exports"]
    directory.write_report(now)
    LivePage(directory).draw(directory.report(), final=True)

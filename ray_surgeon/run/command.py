"""What the command line does once it runs a job; see `pipeline`, which imports it only then."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console

from ray_surgeon.checkpointing.run_directory import RunDirectory, TakenOverError
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.checkpoint import BadWeightsError
from ray_surgeon.plan.device_resources import DEVICES, Device, Room, named_device, resources_here
from ray_surgeon.plan.plan import DoesNotFitError, plan_table
from ray_surgeon.preparation.inputs import Inputs, check
from ray_surgeon.preparation.reading import as_input_error
from ray_surgeon.report.display import Display, new_console, shots_table, summary_lines
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.run.arguments import document_of, towards
from ray_surgeon.run.kubernetes import ray_job
from ray_surgeon.run.result import PruneResult, ended_before, run
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import parse_spec, validation_message
from ray_surgeon.spec.sections import RaySection
from ray_surgeon.storage import files

_MAX_SPEC_BYTES = 2**20
_LARGE = 2.0**40
"""Bytes of memory and disk of a node of Kubernetes, if not given."""

DONE = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

_REFUSED = (BadWeightsError, DoesNotFitError, OutOfReachError)
"""What only a run can find to be wrong with its input."""
_ENDS = (ValueError, RuntimeError, OSError, FloatingPointError, KeyboardInterrupt, SystemExit)
"""What ends a command with words; anything else is a defect, and has a traceback."""


def _read_spec(arguments: argparse.Namespace) -> JobSpec:
    try:
        return parse_spec(_spec_text(arguments), arguments.set)
    except ValidationError as error:
        raise ValueError(validation_message(error, arguments.spec)) from error


def _spec_text(arguments: argparse.Namespace) -> str:
    """Return a job spec: that of a file, or the one that a recovery's arguments stand for."""
    uri = arguments.spec
    if "teacher" in arguments:
        sections = {} if arguments.output is None else {"output": arguments.output}
        return json.dumps(document_of(uri, None, towards(arguments.teacher, sections)))
    with as_input_error(f"cannot read the job spec {uri}"):
        files.check_size(uri, _MAX_SPEC_BYTES, "this is no job spec; see the files in pipelines/")
        return files.read_text(uri)


def perform(arguments: argparse.Namespace, words: Sequence[str], prog: str) -> int:
    """Run a job spec and return the exit code.

    Args:
        arguments: of the command line.
        words: the same as they were typed, for the command that goes on.
        prog: how the command is called.
    """
    # with which Ray and Kubernetes stop jobs
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = new_console()
    resume_with = ""
    try:
        spec = _read_spec(arguments)
        inputs = check(spec, resume=arguments.resume, dry_run=arguments.dry_run)
        if arguments.kubernetes:
            plan = inputs.plan(*_planned_for(arguments, inputs))
            sys.stdout.write(ray_job(inputs, plan))
            return DONE
        for line in inputs.notes:
            console.print(line, soft_wrap=True, highlight=False)
        if arguments.dry_run:
            if not inputs.fingerprints:
                console.print("planned from config.json alone: there are no weights to check")
            console.print(plan_table(inputs.plan(*_planned_for(arguments, inputs))))
            return DONE
        result = ended_before(inputs, console.print)
        if result is None:
            if isinstance(inputs.spec.cluster, RaySection):
                from ray_surgeon.run.driver import connect  # Ray is imported only if it is used

                where = f"running on {connect(inputs.ray)} into {inputs.spec.output.uri}"
                console.print(where, soft_wrap=True)
                # again, because ray.init has a handler of its own
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            resume_with = f"continue with: {prog} {shlex.join([*words, '--resume'])}"
            with Display(console, inputs.spec.name) as display:
                result = run(inputs, display, disconnects=True)
    except _ENDS as error:
        return _end(error, resume_with)
    _show(result, console)
    return DONE


def _planned_for(arguments: argparse.Namespace, inputs: Inputs) -> tuple[Room, Device]:
    """Return what a worker has, as the command line says it, or else as it is here."""
    section = inputs.spec.cluster
    this_machine = resources_here(torch.device("cpu"), inputs.spec.memory.scratch).room
    wants_gpu = section.gpus_per_worker or arguments.device_memory
    name = arguments.device or section.device_speed or ("h100" if wants_gpu else "cpu")
    if arguments.device is not None and name not in DEVICES:
        raise ValueError(f"--device: {name} is none of {', '.join(sorted(DEVICES))}")
    device = named_device(name, section.cpus_per_worker)
    together = max(1, min(section.num_workers, arguments.workers_per_machine or 8))
    host = (arguments.host_memory or this_machine.host) / together
    disk = (arguments.disk or this_machine.disk) / together
    if arguments.kubernetes:  # a pod is made as large as the job wants it
        host, disk = arguments.host_memory or _LARGE, arguments.disk or _LARGE
    if not device.memory_bytes:
        return Room(host, host, disk, device_is_host=True), device
    memory = arguments.device_memory or device.memory_bytes
    return Room(memory, host, disk, device_is_host=False), device


def _end(error: BaseException, resume_with: str) -> int:
    """Say why the command ends, and return its exit code.

    Args:
        error: what ended it.
        resume_with: the command that goes on; empty where nothing has begun.
    """
    console = Console(stderr=True)
    if isinstance(error, SystemExit) and error.code != signal.SIGTERM:
        raise error  # Ray makes an exit of SIGTERM while it starts, and of nothing else
    if isinstance(error, KeyboardInterrupt | SystemExit):
        if resume_with:
            console.print(f"interrupted; {resume_with}", markup=False, soft_wrap=True)
        return INTERRUPTED
    of_input = isinstance(error, _REFUSED if resume_with else ValueError)
    message = f"error: {error}" if of_input else f"failed: {error}"
    if resume_with and not (of_input or isinstance(error, TakenOverError)):
        message += f"\n{resume_with}"
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    return BAD_INPUT if of_input else FAILED


def _show(result: PruneResult, console: Console) -> None:
    console.print(shots_table(result.report))
    for part in ("exports", "answers"):
        for line in summary_lines(part, result.report):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    page = files.join(result.uri, "report.html")
    console.print(f"report: {page}, with report.json and plots beside it", soft_wrap=True)


def export_more(argv: Sequence[str], run_job: Callable[[Sequence[str], str], int]) -> int:
    """Write further exports of a finished run beside those that it has.

    Args:
        argv: what follows the command's name.
        run_job: runs the command line of a job.

    Returns:
        The exit code.
    """
    prog = "ray-surgeon export"
    parser = argparse.ArgumentParser(prog, description="Write further exports of a finished run.")
    parser.add_argument("run", help="run directory, on any fsspec URI")
    parser.add_argument("--exports", required=True, help="kinds, as uniform,gguf")
    parser.add_argument("--size", type=float, help="of pruning.sizes; all of them if not given")
    arguments, rest = parser.parse_known_args(argv)
    directory = RunDirectory(arguments.run)
    try:
        with as_input_error(f"{arguments.run} holds no finished run"):
            before = directory.report()
    except ValueError as error:
        return _end(error, "")
    output: dict[str, Any] = {"exports": arguments.exports.split(","), "quantize": None}
    output["sizes"] = None if arguments.size is None else [arguments.size]
    changes = [f"--set=output.{name}={json.dumps(value)}" for name, value in output.items()]
    try:
        return run_job([directory.path("spec.yaml"), "--resume", *changes, *rest], prog)
    finally:  # the report of the whole run, with what there is now
        now = directory.report()
        places = {export["uri"] for export in now["exports"]}
        kept = [export for export in before["exports"] if export["uri"] not in places]
        directory.write_report(now | {"spec": before["spec"], "exports": kept + now["exports"]})
        LivePage(directory).draw(directory.report(), final=True)

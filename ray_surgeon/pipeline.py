"""``python -m ray_surgeon.pipeline SPEC`` and ``ray-surgeon``: the command line.

Exit codes: 0 done, 1 failed, 2 bad spec or input, weights that are not numbers included, 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

import ray_surgeon
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.checkpoint import BadWeightsError
from ray_surgeon.plan.plan import DoesNotFitError, plan_table
from ray_surgeon.plan.room import DEVICES, Device, Room, named_device, resources_here
from ray_surgeon.report.directory import RunDirectory, TakenOverError
from ray_surgeon.report.display import Display, new_console, shots_table, summary_lines
from ray_surgeon.report.display import main as compare
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.run.arguments import document_of, towards
from ray_surgeon.run.inputs import Inputs, check
from ray_surgeon.run.reading import as_input_error
from ray_surgeon.run.result import PruneResult, ended_before, run
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import parse_spec, validation_message
from ray_surgeon.spec.sections import RaySection
from ray_surgeon.storage import files

_MAX_SPEC_BYTES = 2**20

DONE = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

_REFUSED = (BadWeightsError, DoesNotFitError, OutOfReachError)
"""What only a run can find to be wrong with its input."""
_ENDS = (ValueError, RuntimeError, OSError, FloatingPointError, KeyboardInterrupt, SystemExit)
"""What ends a command with words; anything else is a defect, and has a traceback."""


def _bytes(text: str) -> float:
    """Return a size such as 80GB or 1.5TiB in bytes."""
    return float(TypeAdapter(ByteSize).validate_python(text))


_OPTIONS: dict[str, dict[str, Any]] = {
    "--dry-run": {"action": "store_true", "help": "check everything, print the plan, and stop"},
    "--resume": {"action": "store_true", "help": "go on after the run's last committed shot"},
    "--set": {"action": "append", "default": [], "metavar": "section.field=value"},
    "--schema": {"action": "store_true", "help": "print the JSON Schema of the job spec"},
}
_OF_RECOVERY = {
    "--teacher": "the model to train towards, of the same vocabulary",
    "--output": "run directory; below ./runs if not given",
}
_DEVICE = "what workers compute on, whose times are expected; if not given, the CPU, or an h100"
_SIZES: dict[str, tuple[Any, str, str]] = {
    "--device-memory": (_bytes, "80GB", "of each worker's device; the device's own if not given"),
    "--host-memory": (_bytes, "1TB", "of each machine; this one's if not given"),
    "--disk": (_bytes, "4TB", "free on each machine; this one's if not given"),
    "--workers-per-machine": (int, "8", "that share its memory and disk, at most; 8 if not given"),
}
"""Option -> type, example and help: what other machines have that a plan is made for."""


def _arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Return the arguments of the command line; it ends with exit code 2 if they do not fit."""
    recovers = prog.endswith(" recover")
    parser = argparse.ArgumentParser(prog, description="Prune a language model as a job spec says.")
    what = "the model to train" if recovers else "job spec: YAML or JSON"
    parser.add_argument("spec", nargs="?", help=f"{what}, on any fsspec URI")
    for option, text in _OF_RECOVERY.items() if recovers else ():
        parser.add_argument(option, required=option == "--teacher", help=text)
    for option, settings in _OPTIONS.items():
        parser.add_argument(option, **settings)
    plans = parser.add_argument_group("a plan for other machines", "ray-surgeon plan, or --dry-run")
    plans.add_argument("--device", choices=sorted(DEVICES), help=_DEVICE)
    for option, (kind, example, text) in _SIZES.items():
        plans.add_argument(option, type=kind, metavar=example, help=text)
    arguments = parser.parse_args(argv)
    if not arguments.schema and arguments.spec is None:
        parser.error("a job spec is needed, for instance pipelines/quickstart.yaml")
    options = ("--device", *_SIZES)
    named = [o for o in options if getattr(arguments, o[2:].replace("-", "_")) is not None]
    if named and not arguments.dry_run:
        problem = f"{', '.join(named)}: only for a plan (ray-surgeon plan, or --dry-run)"
        parser.error(f"{problem}; a run asks its workers what they have")
    if arguments.device == "cpu" and arguments.device_memory is not None:
        parser.error("--device-memory: a CPU has the machine's; give --host-memory")
    return arguments


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


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_surgeon.pipeline") -> int:
    """Run a job spec and return the exit code; `prog` is how the help calls the command."""
    arguments = _arguments(argv, prog)
    if arguments.schema:
        # the schema is the output
        print(json.dumps(JobSpec.model_json_schema(), indent=2))  # noqa: T201
        return DONE
    # with which Ray and Kubernetes stop jobs
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = new_console()
    resume_with = ""
    try:
        spec = _read_spec(arguments)
        inputs = check(spec, resume=arguments.resume, dry_run=arguments.dry_run)
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

                console.print(f"running on {connect(inputs.ray)}")
                # again, because ray.init has a handler of its own
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            words = [word for word in argv or sys.argv[1:] if word != "--resume"]
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
    device = named_device(name, section.cpus_per_worker)
    together = max(1, min(section.num_workers, arguments.workers_per_machine or 8))
    host = (arguments.host_memory or this_machine.host) / together
    disk = (arguments.disk or this_machine.disk) / together
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


def _export_more(argv: Sequence[str]) -> int:
    """Write further exports of a finished run beside those that it has; return the exit code."""
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
        return main([directory.path("spec.yaml"), "--resume", *changes, *rest], prog)
    finally:  # the report of the whole run, with what there is now
        now = directory.report()
        places = {export["uri"] for export in now["exports"]}
        kept = [export for export in before["exports"] if export["uri"] not in places]
        directory.write_report(now | {"spec": before["spec"], "exports": kept + now["exports"]})
        LivePage(directory).draw(directory.report(), final=True)


_COMMANDS = {
    "prune": ("prune a model as a job spec says", []),
    "recover": ("train a pruned model towards another one", []),
    "plan": ("check a job spec and print what it will need", ["--dry-run"]),
    "export": ("write further exports of a finished run", []),
    "report": ("compare finished runs", []),
    "schema": ("print the JSON Schema of the job spec", ["--schema"]),
}
"""Command -> what it does, and the options of `main` that do it."""


def cli(argv: Sequence[str] | None = None) -> int:
    """Run ``ray-surgeon COMMAND ...`` and return the exit code."""
    parser = argparse.ArgumentParser("ray-surgeon", description=ray_surgeon.__doc__)
    version = f"ray-surgeon {ray_surgeon.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, _) in _COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    known, rest = parser.parse_known_args(argv)
    if known.command == "report":
        return compare(rest)
    if known.command == "export":
        return _export_more(rest)
    return main([*rest, *_COMMANDS[known.command][1]], f"ray-surgeon {known.command}")


if __name__ == "__main__":
    sys.exit(main())

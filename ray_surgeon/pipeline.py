"""``python -m ray_surgeon.pipeline SPEC`` and ``ray-surgeon``: the command line.

Exit codes: 0 done, 1 failed, 2 bad spec or input, weights that are not numbers included, 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import torch
from pydantic import ValidationError
from rich.console import Console

import ray_surgeon
from ray_surgeon.maths.threshold import OutOfReachError
from ray_surgeon.models.checkpoint import BadWeightsError
from ray_surgeon.plan.devices import DEVICES, Device, Room
from ray_surgeon.plan.plan import DoesNotFitError, plan_table
from ray_surgeon.plan.room import resources_here
from ray_surgeon.report import tables
from ray_surgeon.report.directory import RunDirectory, TakenOverError
from ray_surgeon.report.display import Display, new_console
from ray_surgeon.report.tables import export_lines, generation_lines, shots_table
from ray_surgeon.run.execution import ended_before, run
from ray_surgeon.run.inputs import Inputs, check
from ray_surgeon.run.result import PruneResult
from ray_surgeon.spec.cluster import RaySection
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import parse_spec, validation_message
from ray_surgeon.storage import files

_MAX_SPEC_BYTES = 2**20

DONE = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


def _interrupt_on_sigterm() -> None:
    """Treat SIGTERM, with which Ray and Kubernetes stop jobs, like Ctrl-C.

    Again after ray.init, which has a handler of its own.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description="Prune a language model as a job spec says."
    )
    parser.add_argument(
        "spec", nargs="?", help="job spec: a YAML or JSON file, local or on any fsspec URI"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, and stop"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue after the last committed shot of this run"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.field=value",
        help="override a field; repeatable",
    )
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of the job spec and stop"
    )
    plan_options = parser.add_argument_group(
        "a plan for other machines than this one", "ray-surgeon plan, or --dry-run"
    )
    plan_options.add_argument(
        "--device",
        choices=sorted(DEVICES),
        help="what workers compute on; expected times are this device's; if not given, the CPU, or "
        "an h100 where the spec has gpus_per_worker, or with --device-memory",
    )
    plan_options.add_argument(
        "--device-memory",
        type=_bytes,
        metavar="80GB",
        help="of each worker's device; the device's own if not given",
    )
    plan_options.add_argument(
        "--host-memory", type=_bytes, metavar="1TB", help="of each machine; this one's if not given"
    )
    plan_options.add_argument(
        "--disk", type=_bytes, metavar="4TB", help="free on each machine; this one's if not given"
    )
    plan_options.add_argument(
        "--workers-per-machine",
        type=_positive,
        metavar="N",
        help="that share its memory and disk, at most; 8 if not given",
    )
    arguments = parser.parse_args(argv)
    if not arguments.schema and arguments.spec is None:
        parser.error("a job spec is needed, for instance pipelines/quickstart.yaml")
    options_of_plan = [
        f"--{name.replace('_', '-')}" for name in _OF_A_PLAN if getattr(arguments, name) is not None
    ]
    if options_of_plan and not arguments.dry_run:
        parser.error(
            f"{', '.join(options_of_plan)}: only for a plan (ray-surgeon plan, or --dry-run); "
            "a run asks its workers what they have"
        )
    if arguments.device == "cpu" and arguments.device_memory is not None:
        parser.error("--device-memory: a CPU has the machine's; give --host-memory")
    return arguments


_OF_A_PLAN = ("device", "device_memory", "host_memory", "disk", "workers_per_machine")
"""Options that tell of other machines."""
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _bytes(text: str) -> float:
    """Return a size such as 80GB or 1.5TiB in bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*([kmgt]?i?)b?", text.lower())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 80GB or 1.5TiB")
    return float(match[1]) * _UNITS[match[2]]


def _planned_for(arguments: argparse.Namespace, inputs: Inputs) -> tuple[Room, Device]:
    """Return what a worker has, as the command line says it, or else as it is here."""
    section = inputs.spec.cluster
    this_machine = resources_here(torch.device("cpu"), inputs.spec.memory.scratch).room
    name = arguments.device or (
        "h100" if section.gpus_per_worker or arguments.device_memory else "cpu"
    )
    device = DEVICES[name] if name != "cpu" else DEVICES[name].times(section.cpus_per_worker)
    together = max(1, min(section.num_workers, arguments.workers_per_machine or 8))
    host, disk = (
        (option or measured) / together
        for option, measured in (
            (arguments.host_memory, this_machine.host),
            (arguments.disk, this_machine.disk),
        )
    )
    if not device.memory_bytes:
        return Room(host, host, disk, device_is_host=True), device
    return Room(
        arguments.device_memory or device.memory_bytes, host, disk, device_is_host=False
    ), device


def _read_spec(uri: str, overrides: Sequence[str]) -> JobSpec:
    try:
        files.check_size(uri, _MAX_SPEC_BYTES, "this is no job spec; see the files in pipelines/")
        text = files.read_text(uri)
    except OSError as error:
        raise ValueError(
            f"cannot read the job spec {uri}: {error}; check the path, the permissions and the "
            "network"
        ) from error
    try:
        return parse_spec(text, overrides)
    except ValidationError as error:
        raise ValueError(validation_message(error, uri)) from error


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_surgeon.pipeline") -> int:
    """Run a job spec and return the exit code; `prog` is how the help calls the command."""
    arguments = _arguments(argv, prog)
    console = new_console()
    errors = Console(stderr=True)
    if arguments.schema:
        # the schema is the output
        print(json.dumps(JobSpec.model_json_schema(), indent=2))  # noqa: T201
        return DONE
    _interrupt_on_sigterm()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def fail(message: str, code: int) -> int:
        errors.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        return code

    try:
        inputs = check(
            _read_spec(arguments.spec, arguments.set),
            resume=arguments.resume,
            dry_run=arguments.dry_run,
        )
        shots = inputs.spec.pruning.shots
        console.print(
            f"{shots} shot{'s' * (shots > 1)} to {inputs.goal}, {inputs.calibration.size} "
            "calibration tokens each"
        )
        for line in inputs.notes:
            console.print(line, soft_wrap=True, highlight=False)
        if arguments.dry_run:
            if not inputs.fingerprints:
                console.print("planned from config.json alone: there are no weights to check")
            if inputs.widths is not None:
                console.print(inputs.widths)
            console.print(plan_table(inputs.plan(*_planned_for(arguments, inputs))))
            return DONE
        result = ended_before(inputs, console.print)
        if result is None and isinstance(inputs.spec.cluster, RaySection):
            from ray_surgeon.run.driver import connect_to_ray  # Ray is imported only if it is used

            console.print(f"running on {connect_to_ray(inputs)}")
            _interrupt_on_sigterm()
    except ValueError as error:
        return fail(f"error: {error}", BAD_INPUT)
    except (RuntimeError, OSError) as error:
        return fail(f"failed: {error}", FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as ending:
        if ending.code != signal.SIGTERM:  # which Ray makes an exit of while it starts
            raise
        return INTERRUPTED
    overrides = "".join(f" --set {shlex.quote(override)}" for override in arguments.set)
    resume_with = (
        f"continue with: python -m ray_surgeon.pipeline {shlex.quote(arguments.spec)} "
        f"--resume{overrides}"
    )
    try:
        if result is None:
            with Display(console, inputs.spec.name) as display:
                result = run(inputs, display, disconnects=True)
    except KeyboardInterrupt:
        errors.print(f"interrupted; {resume_with}", markup=False, soft_wrap=True)
        return INTERRUPTED
    except TakenOverError as error:
        return fail(f"failed: {error}", FAILED)
    except (BadWeightsError, DoesNotFitError, OutOfReachError) as error:
        return fail(f"error: {error}", BAD_INPUT)
    except (RuntimeError, OSError, ValueError, FloatingPointError) as error:
        return fail(f"failed: {error}\n{resume_with}", FAILED)
    _show(result, console)
    return DONE


def _show(result: PruneResult, console: Console) -> None:
    console.print(shots_table(result.report))
    for line in (*export_lines(result.report), *generation_lines(result.report)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    directory = RunDirectory(result.uri)
    console.print(
        f"report: {directory.path('report.html')} and report.json, plots in "
        f"{directory.path('plots')}",
        soft_wrap=True,
    )


_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "prune": ("prune a model as a job spec says", lambda argv: main(argv, "ray-surgeon prune")),
    "plan": (
        "check a job spec and print what it will need",
        lambda argv: main([*argv, "--dry-run"], "ray-surgeon plan"),
    ),
    "report": ("compare finished runs", tables.main),
    "schema": (
        "print the JSON Schema of the job spec",
        lambda argv: main([*argv, "--schema"], "ray-surgeon schema"),
    ),
}


def cli(argv: Sequence[str] | None = None) -> int:
    """Run ``ray-surgeon COMMAND ...`` and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="ray-surgeon",
        description="Prune large language models with The LLM Surgeon over Ray workers.",
    )
    parser.add_argument(
        "--version", action="version", version=f"ray-surgeon {ray_surgeon.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, _) in _COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    known, rest = parser.parse_known_args(argv)
    return _COMMANDS[known.command][1](rest)


if __name__ == "__main__":
    sys.exit(main())

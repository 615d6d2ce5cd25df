"""``python -m ray_surgeon.pipeline SPEC`` and ``ray-surgeon``: the command line.

Exit codes: 0 done, 1 failed, 2 bad spec or input, weights that are not numbers included, 130
interrupted. Until a job is run nothing large is imported, so help, the schema and submitting need
no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray_surgeon
from ray_surgeon.version import __version__

SCHEMA = Path(__file__).parent / "config" / "schema.json"
"""The JSON Schema of the job spec, for editors, too; a test says how it is written anew."""


def _bytes(text: str) -> float:
    """Return a size such as 80GB or 1.5TiB in bytes."""
    from pydantic import ByteSize, TypeAdapter

    return float(TypeAdapter(ByteSize).validate_python(text))


_OPTIONS: dict[str, dict[str, Any]] = {
    "--dry-run": {
        "action": "store_true",
        "help": "check everything, print the plan, and stop",
    },
    "--resume": {
        "action": "store_true",
        "help": "go on after the run's last committed round",
    },
    "--set": {"action": "append", "default": [], "metavar": "section.field=value"},
    "--schema": {"action": "store_true", "help": "print the JSON Schema of the job spec"},
    "--verbose": {"action": "store_true", "help": "show all steps of a plan"},
}
_OF_RECOVERY = {
    "--teacher": "the model to train towards, of the same vocabulary",
    "--output": "run directory; below ./runs if not given",
}
_DEVICE = "whose times are expected; if not given, h100 where workers have GPUs, else cpu"
_SIZES: dict[str, tuple[Any, str, str]] = {
    "--device-memory": (
        _bytes,
        "80GB",
        "of each worker's device; the device's own if not given",
    ),
    "--host-memory": (_bytes, "1TB", "of each machine; this one's if not given"),
    "--disk": (_bytes, "4TB", "free on each machine; this one's if not given"),
    "--workers-per-machine": (
        int,
        "8",
        "that share its memory and disk, at most; 8 if not given",
    ),
}
"""Option -> type, example and help: what other machines have that a plan is made for."""


def _arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Return the arguments of the command line; it ends with exit code 2 if they do not fit."""
    recovers = prog.endswith(" recover")
    parser = argparse.ArgumentParser(
        prog, description="Prune a language model as a job spec says."
    )
    what = "the model to train" if recovers else "job spec: YAML or JSON"
    parser.add_argument("spec", nargs="?", help=f"{what}, on any fsspec URI")
    for option, text in _OF_RECOVERY.items() if recovers else ():
        parser.add_argument(option, required=option == "--teacher", help=text)
    for option, settings in _OPTIONS.items():
        parser.add_argument(option, **settings)
    plans = parser.add_argument_group(
        "a plan for other machines", "ray-surgeon plan, or --dry-run"
    )
    plans.add_argument("--device", help=_DEVICE)
    text = "print a RayJob of KubeRay for exactly this job; one worker a pod"
    plans.add_argument("--kubernetes", action="store_true", default=None, help=text)
    for option, (kind, example, text) in _SIZES.items():
        plans.add_argument(option, type=kind, metavar=example, help=text)
    arguments = parser.parse_args(argv)
    if not arguments.schema and arguments.spec is None:
        parser.error("a job spec is needed, for instance pipelines/quickstart.yaml")
    options = ("--device", "--kubernetes", *_SIZES)
    named = [
        o for o in options if getattr(arguments, o[2:].replace("-", "_")) is not None
    ]
    if named and not arguments.dry_run:
        problem = f"{', '.join(named)}: only for a plan (ray-surgeon plan, or --dry-run)"
        parser.error(f"{problem}; a run asks its workers what they have")
    if arguments.kubernetes and arguments.set:
        parser.error("--set: pods have the file alone; write that into the job spec")
    if arguments.device == "cpu" and arguments.device_memory is not None:
        parser.error("--device-memory: a CPU has the machine's; give --host-memory")
    return arguments


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m ray_surgeon.pipeline"
) -> int:
    """Run a job spec and return the exit code; `prog` is how the help calls the command."""
    arguments = _arguments(argv, prog)
    if arguments.schema:
        sys.stdout.write(SCHEMA.read_text(encoding="utf-8"))
        return 0
    from ray_surgeon.run.command import perform

    words = [word for word in argv or sys.argv[1:] if word != "--resume"]
    return perform(arguments, words, prog)


_COMMANDS = {
    "prune": ("prune a model as a job spec says", []),
    "recover": ("train a pruned model towards another one", []),
    "plan": ("check a job spec and print what it will need", ["--dry-run"]),
    "submit": ("run a job spec on a Ray cluster, and follow it", []),
    "export": ("write further exports of a finished run", []),
    "report": ("compare finished runs", []),
    "schema": ("print the JSON Schema of the job spec", ["--schema"]),
}
"""Command -> what it does, and the options of `main` that do it."""


def cli(argv: Sequence[str] | None = None) -> int:
    """Run ``ray-surgeon COMMAND ...`` and return the exit code."""
    parser = argparse.ArgumentParser("ray-surgeon", description=ray_surgeon.__doc__)
    version = f"ray-surgeon {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, _) in _COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    known, rest = parser.parse_known_args(argv)
    if known.command == "report":
        from ray_surgeon.report.display import main as compare

        return compare(rest)
    if known.command == "submit":
        from ray_surgeon.run.submit import main as submit

        return submit(rest)
    if known.command == "export":
        from ray_surgeon.run.command import export_more

        return export_more(rest, main)
    return main([*rest, *_COMMANDS[known.command][1]], f"ray-surgeon {known.command}")


if __name__ == "__main__":
    sys.exit(main())

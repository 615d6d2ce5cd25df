"""``python -m ray_surgeon.pipeline`` and ``ray-surgeon``: the command line.

Exit codes: 0 done, 1 failed, 2 bad spec or input, weights that are not numbers included, 130
interrupted. Nothing large is imported until a job runs, so help, the schema, submitting and
mistyped files need no torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray_surgeon
from ray_surgeon.version import __version__

SCHEMA = Path(__file__).parent / "config" / "schema.json"
"""The JSON Schema of the job spec, for editors, too; a test says how it is written anew."""
_SPECS = (".yaml", ".yml", ".json")
"""Suffixes of job specs; everything else is a model."""
_EXAMPLES = {
    "prune": """\
examples:
  {prog} Qwen/Qwen3-8B --sparsity 0.2
  {prog} ./my-model --sparsity 0.3 --time 2h --output s3://bucket/runs/small
  {prog} spec.yaml --set pruning.target_sparsity=0.25 --resume
  {prog} Qwen/Qwen3-8B --sparsity 0.2 --print-spec > spec.yaml
""",
    "plan": """\
examples:
  {prog} Qwen/Qwen3-8B --sparsity 0.2
  {prog} spec.yaml --device h100 --workers-per-machine 8
  {prog} spec.yaml --kubernetes > rayjob.yaml
""",
    "recover": """\
examples:
  {prog} runs/small/export/uniform --teacher Qwen/Qwen3-8B
""",
}


def is_spec(source: str) -> bool:
    """Whether an argument names a job spec (a file, or - for standard input), not a model."""
    return source == "-" or source.lower().endswith(_SPECS)


def _bytes(text: str) -> float:
    """Return a size such as 80GB or 1.5TiB in bytes."""
    from pydantic import ByteSize, TypeAdapter

    return float(TypeAdapter(ByteSize).validate_python(text))


def _new_parser(prog: str, command: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog,
        usage=f"{prog} MODEL|SPEC [options]",
        description=_EXAMPLES[command].format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_job_options(parser: argparse.ArgumentParser, command: str) -> None:
    add = parser.add_argument
    add(
        "source",
        nargs="?",
        metavar="MODEL|SPEC",
        help="Hub id, folder, URI, FILE.gguf, pkg://PACKAGE/FILE.gguf; or a job spec, .yaml or "
        ".json; - reads a spec from standard input",
    )
    if command == "recover":
        add("--teacher", required=True, help="the model to train towards")
    else:
        text = "fraction of the blocks' parameters to remove, 0.2 or 20%%"
        add("--sparsity", metavar="S", help=text)
    add("--output", metavar="URI", help="run directory; ./runs/NAME if not given")
    add("--time", help="how long it may take, as 30min or 2h")
    add(
        "--preset",
        choices=["fast", "balanced", "quality"],
        help="4 minutes, 12 minutes (the default) or an hour",
    )
    text = "JSON lines with `prompt` or `messages`, to calibrate on your use"
    add("--prompts", metavar="FILE", help=text)
    add("--shards", type=int, metavar="N", help="workers that share the model's blocks")
    add("--gpus", type=int, metavar="N", help="GPUs to use; all if not given")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of the spec, see `ray-surgeon schema`",
    )
    add("--resume", action="store_true", help="go on after the run's last commit")
    text = "check everything, print the plan, and stop"
    add("--dry-run", action="store_true", help=text)
    text = "print the whole spec that this stands for, and stop"
    add("--print-spec", action="store_true", help=text)
    add("--verbose", action="store_true", help="show all steps of a plan")
    add("--schema", action="store_true", help=argparse.SUPPRESS)


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
"""Option -> type, example and help: resources of other machines, for their plan."""


def _add_plan_options(parser: argparse.ArgumentParser, *, shown: bool) -> None:
    """Add the options of a plan for other machines; a run refuses them."""
    plans = parser.add_argument_group("a plan for other machines" if shown else None)
    text = "its speed; h100 where workers have GPUs, else cpu"
    plans.add_argument("--device", help=text if shown else argparse.SUPPRESS)
    text = "print a RayJob of KubeRay for exactly this job; one worker a pod"
    plans.add_argument(
        "--kubernetes",
        action="store_true",
        default=None,
        help=text if shown else argparse.SUPPRESS,
    )
    for option, (kind, example, text) in _SIZES.items():
        text = text if shown else argparse.SUPPRESS
        plans.add_argument(option, type=kind, metavar=example, help=text)


def _arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Return the arguments of the command line; it ends with exit code 2 if they do not fit."""
    command = prog.rpartition(" ")[2]
    if command not in _EXAMPLES:
        command = "prune"
    parser = _new_parser(prog, command)
    _add_job_options(parser, command)
    _add_plan_options(parser, shown=command == "plan")
    arguments = parser.parse_args(argv)
    if arguments.schema:
        return arguments
    problem = (
        _problem_of_source(arguments, command)
        or _problem_of_plan(arguments)
        or _problem_of_time(arguments)
    )
    if problem:
        parser.error(problem)
    arguments.is_spec = is_spec(arguments.source)
    return arguments


def _problem_of_source(arguments: argparse.Namespace, command: str) -> str | None:
    """Return what is wrong with the model or the spec, as far as it shows without reading it."""
    source = arguments.source
    if source is None:
        return "name a model or a job spec, for instance pipelines/quickstart.yaml"
    if is_spec(source):
        return _problem_of_file(source)
    path = Path(source).expanduser()
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if "://" not in source and is_path and not path.exists():
        return f"there is no file or folder {source}; a Hub id has the form NAME or OWNER/NAME"
    if path.is_file() and path.suffix != ".gguf":
        return (
            f"{source} is a file; give the folder of a model, a GGUF file that ends with .gguf, "
            f"or a spec that ends with {', '.join(_SPECS)}"
        )
    sets_target = any(text.startswith("pruning") for text in arguments.set)
    if command != "recover" and arguments.sparsity is None and not sets_target:
        return "say how much to remove, for instance --sparsity 0.2"
    return None


def _problem_of_file(source: str) -> str | None:
    if source == "-" or "://" in source or Path(source).expanduser().is_file():
        return None
    folder = Path(source).expanduser().parent
    names = os.listdir(folder) if folder.is_dir() else []
    near = difflib.get_close_matches(Path(source).name, names, n=1)
    problem = f"there is no file {source}"
    if near:
        problem += f"; do you mean {folder / near[0]}?"
    return problem


def _problem_of_plan(arguments: argparse.Namespace) -> str | None:
    options = ("--device", "--kubernetes", *_SIZES)
    named = [
        o for o in options if getattr(arguments, o[2:].replace("-", "_")) is not None
    ]
    if named and not arguments.dry_run:
        return (
            f"{', '.join(named)}: only for a plan (ray-surgeon plan, or --dry-run); a run asks "
            "its workers what they have"
        )
    if arguments.kubernetes and arguments.set:
        return "--set: pods have the file alone; write that into the job spec"
    if arguments.kubernetes and not is_spec(arguments.source):
        return "--kubernetes: pods need a file; make one with --print-spec"
    if arguments.device == "cpu" and arguments.device_memory is not None:
        return "--device-memory: a CPU has the machine's; give --host-memory"
    return None


def _problem_of_time(arguments: argparse.Namespace) -> str | None:
    if arguments.time is not None and arguments.preset is not None:
        return "--time and --preset are two ways to say the same; give one"
    return None


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m ray_surgeon.pipeline"
) -> int:
    """Run a job and return the exit code; `prog` is how the help calls the command."""
    arguments = _arguments(argv, prog)
    if arguments.schema:
        sys.stdout.write(SCHEMA.read_text(encoding="utf-8"))
        return 0
    from ray_surgeon.run.command import perform

    words = [word for word in argv or sys.argv[1:] if word != "--resume"]
    return perform(arguments, words, prog)


_COMMANDS = {
    "prune": ("make a model smaller", []),
    "recover": ("train a pruned model towards another one", []),
    "plan": ("check a job and print what it will need", ["--dry-run"]),
    "submit": ("run a job spec on a Ray cluster, and follow it", []),
    "export": ("write further exports of a finished run", []),
    "report": ("compare finished runs", []),
    "family": ("print what is known, or found, of a model's family", []),
    "schema": ("print the fields of the job spec", ["--schema"]),
}
"""Command -> what it does, and the options of `main` that do it."""


def cli(argv: Sequence[str] | None = None) -> int:
    """Run ``ray-surgeon COMMAND ...`` and return the exit code."""
    parser = argparse.ArgumentParser(
        "ray-surgeon",
        description=f"{ray_surgeon.__doc__}\n\n"
        + _EXAMPLES["prune"].format(prog="ray-surgeon prune"),
        epilog="ray-surgeon COMMAND --help shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    if known.command == "family":
        from ray_surgeon.run.family import main as show_family

        return show_family(rest)
    if known.command == "schema":
        from ray_surgeon.config.reference import main as show

        return show(rest, SCHEMA)
    return main([*rest, *_COMMANDS[known.command][1]], f"ray-surgeon {known.command}")


if __name__ == "__main__":
    sys.exit(main())

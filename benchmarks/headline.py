"""Measures the headline result of the README with several seeds.

``python -m benchmarks.headline OUT --seeds 0 1 2`` fetches Qwen2.5-Coder-0.5B-Instruct, prunes it
once per seed by ``preset: balanced`` (every feed-forward layer from 4864 to 3904 channels),
evaluates the dense and the pruned models by `benchmarks.tasks`, and prints two tables: every run
with its interval and paired with the dense model, and the mean over seeds.

The seed determines the windows and the text written by the model, the labels of the Fisher, and the
order and initial values of the training. Finished results in OUT are read, not repeated, and an
interrupted pruning run resumes after its last commit. HumanEval runs generated code, as in
`benchmarks.humaneval`; the option ``--run-code`` allows it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray_surgeon
from benchmarks import tasks
from benchmarks.humaneval import comparison
from benchmarks.intervals import mean_and_standard_error
from benchmarks.presets import GENERATION
from benchmarks.real_models import MODELS, fetch

SHARE = 0.17
"""Fraction of the linears' parameters to remove; widths are multiples of 64, so it is 17.3 %."""


def sections_of(seed: int) -> dict[str, Any]:
    """Return the sections of a job spec with a seed, completed by the preset."""
    return {
        "calibration": {"source": "auto", "seed": seed},
        "curvature": {"seed": seed},
        "recovery": {"seed": seed},
        "pruning": {
            "structure": "groups",
            "groups": ["ffn"],
            "allocation": "uniform",
            "target_sparsity": SHARE,
            "num_shots": 1,
            "reconstruction": {"seed": seed},
        },
    }


def pruned(dense: Path, folder: Path, seed: int, num_threads: int) -> Path:
    """Return the export of a seed's run; start or resume the run unless it is complete.

    Args:
        dense: checkpoint to prune.
        folder: run directory.
        seed: seed of all random numbers.
        num_threads: number of threads of the only worker.
    """
    export = folder / "export" / "uniform"
    report = folder / "report.json"
    if report.exists() and json.loads(report.read_text()).get("exports"):
        return export
    ray_surgeon.prune(
        {"source": str(dense), "dtype": "bfloat16"},
        **sections_of(seed),
        preset="balanced",
        evaluation={"generation": GENERATION},
        cluster={"cpus_per_worker": num_threads},
        output={"uri": str(folder), "exports": ["uniform"]},
        name=folder.name,
        resume=folder.exists(),
    )
    return export


def mean_table(outcomes: Mapping[str, Mapping[str, tasks.Outcomes]]) -> str:
    """Return a Markdown table of means over runs, with a line per set.

    The standard error is that of the mean over runs on these problems. It does not include the
    choice of the problems, which the interval of each run covers.

    Args:
        outcomes: model -> set -> outcomes; the first model is the dense one, the others are runs.
    """
    dense, *runs = outcomes
    lines = [
        "| set | cases | dense | mean of the runs | runs | lost, won on average |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, of_dense in outcomes[dense].items():
        found = [comparison(of_dense, outcomes[run][name]) for run in runs]
        passed = [run.passed for run in found]
        mean, error = mean_and_standard_error(passed)
        counts = ", ".join(map(str, passed))
        lost, _ = mean_and_standard_error([run.lost for run in found])
        won, _ = mean_and_standard_error([run.won for run in found])
        num_dense = comparison(of_dense, of_dense).passed
        lines.append(
            f"| {name} | {len(of_dense)} | {num_dense} | {mean:.1f} ± {error:.1f} | {counts} "
            f"| {lost:.1f}, {won:.1f} |"
        )
    return "\n".join(lines) + "\n"


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headline")
    add = parser.add_argument
    add("out", type=Path, help="folder for the model, the runs and the answers")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two or more")
    add("--model", choices=MODELS, default="qwen2.5-coder-0.5b-instruct")
    add("--sets", nargs="+", choices=tasks.SETS, default=tasks.SETS)
    add("--limit", type=int, help="only the first N cases of each set, for a trial")
    add("--threads", type=int, default=2, help="of torch; %(default)s")
    add("--batch-size", type=int, default=16)
    add("--run-code", action="store_true", help="run the code generated for humaneval")
    arguments = parser.parse_args(argv)
    if len(set(arguments.seeds)) < 2 or len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error(
            f"--seeds: expected two different seeds or more, got {arguments.seeds}; a standard "
            "error needs two runs"
        )
    tasks.check_run_code(parser, arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prune with every seed, evaluate all models, and print the tables."""
    arguments = arguments_of(argv)
    dense = fetch(arguments.model, arguments.out / "models" / arguments.model)
    models = [f"dense={dense}"]
    for seed in arguments.seeds:
        folder = arguments.out / f"seed-{seed}"
        export = pruned(dense, folder, seed, arguments.threads)
        models.append(f"seed-{seed}={export}")
    answers = arguments.out / "tasks.json"
    options = ["--out", str(answers), "--resume", "--threads", str(arguments.threads)]
    options += ["--batch-size", str(arguments.batch_size)]
    if arguments.limit is not None:
        options += ["--limit", str(arguments.limit)]
    if arguments.run_code:
        options += ["--run-code"]
    tasks.main([*models, "--sets", *arguments.sets, *options])
    records = tasks.read(answers)
    names = ["dense", *(f"seed-{seed}" for seed in arguments.seeds)]
    outcomes = tasks.outcomes_in([records[name] for name in names], arguments.sets)
    sys.stdout.write("\n" + mean_table(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())

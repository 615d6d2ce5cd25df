"""Compares methods of removing blocks, as a Markdown table.

``python -m benchmarks.depth FOLDER`` removes 3, 6 and 9 of SmolLM2's 30 blocks, one shot each, and
evaluates every size on Python's help, docstrings and descriptions of packages: divergence from the
dense model, and perplexity after the slash. Methods: ours; ours without the update; SLEB's
selection by the loss (Song et al. 2024, arXiv 2402.09025); ShortGPT's by block influence (Men et
al. 2024, arXiv 2403.03853); the last blocks; random blocks. With ``--corrected`` every size has the
same low-rank corrections. Finished runs are reused, and interrupted runs resume.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import ray_surgeon
from benchmarks.peers import file_name
from benchmarks.recovery import QUICKSTART
from ray_surgeon.config.job import JobSpec, parse_spec

WAYS: dict[str, dict[str, Any]] = {
    "ours": {},
    "without the update": {"update": False},
    "SLEB": {"costs": "loss", "update": False},
    "ShortGPT": {"costs": "influence", "update": False},
    "the last": {"costs": "last", "update": False},
    "random": {"costs": "random", "update": False},
}
SIZES = (0.1, 0.2, 0.3)
CORRECTIONS = {"rank": 32, "num_tokens": 16_384, "num_tokens_between_shots": 16_384}


def spec_of(
    pruning: Mapping[str, Any],
    uri: Path,
    exports: Sequence[str] = (),
    recovery: Any = None,
    settings: Sequence[str] = (),
) -> JobSpec:
    """Return the quickstart's job with another pruning of groups and equal widths.

    It has no answers and no text written by the model, which would vary between runs.

    Args:
        pruning: section of the spec, without the fields shared by all jobs.
        uri: run directory.
        exports: kinds of exports.
        recovery: section of the spec; None for no training.
        settings: each ``section.field=value``; they override all others.
    """
    document = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    document["evaluation"]["generation"] = None
    del document["calibration"]["mix"][-1]
    pruning = {"structure": "groups", "allocation": "uniform", **pruning}
    document |= {"name": uri.name, "pruning": pruning, "recovery": recovery}
    document |= {"output": {"uri": str(uri), "exports": list(exports)}}
    return parse_spec(yaml.safe_dump(document), settings)


def run_of(
    name: str, depth: Mapping[str, Any], folder: Path, recovery: Any
) -> dict[str, Any]:
    """Return the report of a run; start the run if it does not exist.

    Args:
        name: name of its folder.
        depth: section of the spec.
        folder: parent folder of the runs.
        recovery: section of the spec; None for no training.
    """
    written = folder / name / "report.json"
    if not written.exists():
        pruning: dict[str, Any] = {"groups": ["blocks"], "depth": dict(depth)}
        pruning |= {"sparsities": list(SIZES), "target_sparsity": SIZES[-1]}
        spec = spec_of(pruning, folder / name, recovery=recovery)
        ray_surgeon.prune(spec=spec, resume=(folder / name).exists())
    report: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    return report


def rows_of(way: str, report: Mapping[str, Any]) -> list[list[str]]:
    """Return a line of the table for every size."""
    rows = []
    removed = list[str]()
    for shot in report["shots"]:
        removed += [
            step["layer"].removeprefix("block ") for step in shot["layers_removed"]
        ]
        texts = [f"{value:.3f}" for value in shot["divergence"].values()]
        perplexities = [f"{value:.2f}" for value in shot["perplexity"].values()]
        cells = [" / ".join(pair) for pair in zip(texts, perplexities, strict=True)]
        seconds = f"{sum(shot['seconds'].values()):.0f}"
        rows.append([way, str(len(removed)), *cells, ", ".join(removed), seconds])
    return rows


def table(texts: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    header = ("way", "blocks gone", *texts, "which", "s")
    lines = [
        "| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Start the runs, and print the table after each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.depth", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--corrected", action="store_true", help="with corrections after each size"
    )
    arguments = parser.parse_args(argv)
    rows = list[list[str]]()
    for way in arguments.ways:
        name = file_name(way) + "-corrected" * arguments.corrected
        recovery = CORRECTIONS if arguments.corrected else None
        report = run_of(name, WAYS[way], arguments.folder, recovery)
        rows += rows_of(way, report)
        sys.stdout.write(table(list(report["shots"][-1]["divergence"]), rows) + "\n\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

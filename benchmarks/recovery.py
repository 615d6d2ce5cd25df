"""Measures recovery after pruning by the number of training tokens, as a Markdown table.

``python -m benchmarks.recovery FOLDER`` prunes SmolLM2 in two ways: a quarter of the channels of
every feed-forward layer, or 40 % of the parameters in coupled groups. It then trains low-rank
corrections of two ranks, or all weights, on texts found on this machine. The first row of each way
is the preset's recovery on the calibration windows. The table shows divergence from the dense model
/ perplexity on Python's help, docstrings and package descriptions, and the acceptance rate of the
dense model's answers. ``--ways``, ``--ranks`` and ``--tokens`` select the runs. Finished runs are
read, not repeated; interrupted runs are resumed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import ray_surgeon
from ray_surgeon.config.job import JobSpec

QUICKSTART = Path(__file__).parents[1] / "pipelines/smollm2-balanced.yaml"
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"groups": ["ffn"], "allocation": "uniform", "target_sparsity": 0.1875},
    "groups": {"groups": ["ffn", "attention"], "target_sparsity": 0.4},
}
TEXTS = (
    {"source": "python-docs", "weight": 0.08},
    {"source": "python-docstrings", "weight": 0.12},
    {"source": "package-docstrings", "split": "all", "weight": 1.0},
    {"source": "python-code", "weight": 1.2},
)
"""Texts and weights; with these weights no text is exhausted before two million tokens."""


def settings_of(rank: int | str, num_tokens: int) -> dict[str, Any]:
    """Return the `recovery` section of the job spec."""
    texts = [dict(text) for text in TEXTS]
    return {
        "rank": rank,
        "num_tokens": num_tokens,
        "sequences_per_step": 4,
        "texts": texts,
    }


def run_of(
    name: str, pruning: Mapping[str, Any], folder: Path, recovery: Any
) -> dict[str, Any]:
    """Return the report of a run; a finished run is not repeated.

    Args:
        name: name of the run.
        pruning: `pruning` section of the spec, without the structure.
        folder: parent folder of the run directories.
        recovery: `recovery` section of the spec; None for the preset's.
    """
    written = folder / name / "report.json"
    if not written.exists():
        document = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
        document |= {"name": name, "pruning": {"structure": "groups", **pruning}}
        document |= {"output": {"uri": str(folder / name), "exports": []}}
        document |= {} if recovery is None else {"recovery": recovery}
        ray_surgeon.prune(
            spec=JobSpec.model_validate(document), resume=(folder / name).exists()
        )
    report: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    return report


def row_of(name: str, report: Mapping[str, Any]) -> list[str]:
    """Return one row of the table."""
    shot = report["shots"][-1]
    checks = shot["recovery_held_aside"]
    texts = shot["divergence"]
    return [
        name,
        str(checks[-1]["tokens"]),
        "undone" if shot["recovery_undone"] else f"{shot['recovery_rate']:g}",
        f"{checks[0]['value']:.3f} to {min(check['value'] for check in checks):.3f}",
        *(f"{texts[text]:.3f} / {shot['perplexity'][text]:.2f}" for text in texts),
        f"{shot['generation_before_recovery']['acceptance']:.1%}",
        f"{shot['generation']['acceptance']:.1%}",
        f"{shot['seconds']['recovery']:.0f}",
    ]


def table(texts: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    header = (
        "run",
        "tokens",
        "rate",
        "held aside",
        *texts,
        "accepted before",
        "after",
        "s",
    )
    lines = [
        "| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)
    ]
    return "\n".join(lines)


def wanted(
    ways: Sequence[str], ranks: Sequence[str], tokens: Sequence[int]
) -> Iterator[Any]:
    """Yield the name, pruning and recovery of each run, the shortest recovery first."""
    for way in ways:
        yield f"{way}-preset", WAYS[way], None
    for num_tokens in sorted(tokens):
        for way in ways:
            for rank in ranks:
                section = settings_of(rank if rank == "all" else int(rank), num_tokens)
                yield f"{way}-{rank}-{num_tokens}", WAYS[way], section


def main(argv: Sequence[str] | None = None) -> int:
    """Run the jobs, and print the table after each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--ranks", nargs="+", default=["32", "128", "all"], help="%(default)s"
    )
    tokens = [131_072, 524_288, 2_097_152]
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=tokens, help="%(default)s"
    )
    arguments = parser.parse_args(argv)
    rows = list[list[str]]()
    for name, pruning, recovery in wanted(
        arguments.ways, arguments.ranks, arguments.tokens
    ):
        report = run_of(name, pruning, arguments.folder, recovery)
        rows.append(row_of(name, report))
        sys.stdout.write(table(list(report["shots"][-1]["divergence"]), rows) + "\n\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

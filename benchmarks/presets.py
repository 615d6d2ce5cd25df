"""Prunes several models with one preset and prints a Markdown table.

The table shows the divergence from the dense model and the acceptance rate of its answers, before
and after the low-rank corrections.

``python -m benchmarks.presets FOLDER --preset balanced`` prunes the models of
`benchmarks.real_models`; ``NAME=FOLDER`` adds another checkpoint, for example the mixture written
by ``python -m benchmarks.upcycled``. Every feed-forward layer, or every expert, loses the same
share of its channels. The divergence is measured on windows held aside from every stage. A model
without a chat template continues beginnings of the evaluation text instead. Finished runs are read,
not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray_surgeon
from benchmarks.real_models import MODELS, fetch

GENERATION = {"num_prompts": 16, "max_new_tokens": 64}


def run_of(
    name: str,
    model: Path,
    folder: Path,
    preset: str,
    share: float,
    settings: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Return the report of a model's run; a finished run is not repeated.

    Args:
        name: name of the model.
        model: folder of its checkpoint.
        folder: parent folder of the run directories.
        preset: name of the preset.
        share: fraction of the linears' parameters to remove.
        settings: sections of the spec that override the preset's.
    """
    written = folder / name / "report.json"
    if written.exists():
        report: Mapping[str, Any] = json.loads(written.read_text())
        if report.get("exports"):
            return report
    config = json.loads((model / "config.json").read_text())
    is_mixture = any("expert" in field for field in config)
    groups = ["expert_channels"] if is_mixture else ["ffn"]
    result = ray_surgeon.prune(
        {"source": str(model), "dtype": "bfloat16"},
        pruning={
            "structure": "groups",
            "groups": groups,
            "allocation": "uniform",
            "target_sparsity": share,
            "num_shots": 1,
        },
        preset=preset,
        evaluation={"texts": _texts(config), "generation": GENERATION},
        output={"uri": str(folder / name), "exports": ["uniform"]},
        name=name,
        **settings,
    )
    return result.report


def _texts(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    length = min(512, int(config.get("max_position_embeddings", 512)))
    return [
        {"name": text, "source": text, "num_sequences": 12, "sequence_length": length}
        for text in ("python-docs", "python-docstrings")
    ]


def row_of(name: str, report: Mapping[str, Any]) -> list[str]:
    """Return one row of the table."""
    shot = report["shots"][-1]
    before = shot.get("generation_before_recovery") or {}
    after = shot["generation"]
    held = [entry["value"] for entry in shot.get("recovery_held_aside") or ()]
    first = shot.get("divergence_held_aside")
    errors = list((shot.get("reconstruction") or {}).values())
    undone = sum(trained >= start for start, trained in errors)
    damping = shot.get("damping_chosen") or {}
    return [
        name,
        f"{shot['sparsity']:.1%}",
        f"{damping.get('a', float('nan')):g} / {damping.get('g', float('nan')):g}",
        f"{shot.get('reconstruction_rate', 0):g}"
        + (f", {undone} of {len(errors)} undone" if undone else ""),
        "" if first is None else f"{first:.4f}",
        f"{before['acceptance']:.1%}" if before else "",
        "undone" if shot.get("recovery_undone") else f"{shot.get('recovery_rate', 0):g}",
        f"{held[-1]:.4f}" if held and not shot.get("recovery_undone") else "",
        f"{after['acceptance']:.1%}",
        f"{sum(shot['seconds'].values()):.0f}",
    ]


HEADER = (
    *(
        "model",
        "removed",
        "damping A / G",
        "rate of reconstruction",
        "divergence",
        "accepted",
    ),
    *("rate of corrections", "divergence", "accepted", "s"),
)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, with divergence and acceptance before and after corrections."""
    lines = [
        "| " + " | ".join(line) + " |" for line in (HEADER, ["---"] * len(HEADER), *rows)
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prune every model, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.presets", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="for models and runs")
    parser.add_argument(
        "models",
        nargs="*",
        metavar="NAME[=FOLDER]",
        help=f"{', '.join(MODELS)}, or another by its folder; all of these",
    )
    parser.add_argument(
        "--preset", default="balanced", choices=("fast", "balanced", "quality")
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.17,
        help="fraction of the linears' parameters to remove; %(default)s",
    )
    parser.add_argument(
        "--settings",
        type=json.loads,
        default={"cluster": {"cpus_per_worker": 2}},
        help="sections of the spec that override the preset's, as JSON; %(default)s",
    )
    arguments = parser.parse_args(argv)
    rows = []
    for model_argument in arguments.models or MODELS:
        name, _, path = model_argument.partition("=")
        model = Path(path) if path else fetch(name, arguments.folder / "models" / name)
        report = run_of(
            name,
            model,
            arguments.folder / arguments.preset,
            arguments.preset,
            arguments.share,
            arguments.settings,
        )
        rows.append(row_of(name, report))
        sys.stdout.write(table(rows) + "\n\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Divergence at equal decoding speed, for pruned widths, depth and both, as a Markdown table.

``python -m benchmarks.equal_speed FOLDER --engine llamacpp --python PYTHON`` measures a table of
seconds (`examples.engine_table`), prunes SmolLM2 by every method to speeds from this table, and
serves each size alternately with the dense model, one request at a time. It then interpolates
linearly between neighbouring sizes to get the divergence at 1.25 and 1.5 times the dense model's
decoding speed, on Python's help, docstrings and descriptions of packages. The Python environment
has xllamacpp or, with ``--engine vllm``, vLLM. With ``--engine transformers`` the jobs measure the
speeds, and widths may differ by block. ``--set 'model={source: FOLDER, dtype: bfloat16}'`` selects
another model. Finished tables and runs are reused, and interrupted runs resume.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ray_surgeon
from benchmarks.depth import spec_of
from benchmarks.peers import add_settings, file_name
from benchmarks.recovery import QUICKSTART
from examples import engine_table, serve_llamacpp, serve_vllm
from examples.serving import fastest
from ray_surgeon.config.job import parse_spec
from ray_surgeon.storage.sources import open_model

WAYS: dict[str, dict[str, Any]] = {
    "width": {"groups": ["ffn"]},
    "width and heads": {"groups": ["ffn", "attention"]},
    "depth": {"groups": ["blocks"]},
    "depth, then width": {"groups": ["blocks", "ffn"], "depth": {"num_removed": 4}},
    "depth, then width and heads": {
        "groups": ["blocks", "ffn", "attention"],
        "depth": {"num_removed": 4},
    },
}
SIZES = (1.3, 1.6)
"""Speedups according to the table; the measured speedup of the whole model may be smaller."""
SPEEDS = (1.25, 1.5)
ROUNDS = 5
"""Number of rounds, each of which serves all models; the fastest of each model counts."""
REQUEST = {"prompt_length": 16, "num_new_tokens": 64}
"""Lengths of a request; decoding takes nearly all of the time."""
NUM_THREADS = 2
"""Number of torch threads for transformers."""

Point = tuple[float, dict[str, float]]
"""Decoding speedup of a size, and its divergence by text."""
Command = Callable[[Path], list[str]]
Results = Mapping[str, ray_surgeon.PruneResult]
"""Results of the runs by method."""
Speeds = Mapping[str, Sequence[float]]
"""Speedups of the sizes of each method."""


def run_of(
    way: str, folder: Path, table: Path, settings: Sequence[str]
) -> ray_surgeon.PruneResult:
    """Return a run with a family of sizes and no recovery; start it if it does not exist.

    Args:
        way: one of `WAYS`.
        folder: parent folder of the runs.
        table: seconds of an engine, in a file named after the engine; with transformers, widths may
            differ by block, and the job measures speeds.
        settings: settings of the job.
    """
    uri = folder / f"{file_name(way)}-{table.stem}"
    target: dict[str, Any] = {"speedup": SIZES[-1], "table": str(table)}
    pruning = {"sizes": list(SIZES), "target": target, "num_shots": 1, **WAYS[way]}
    exports = ["uniform"]
    if table.stem == "transformers":
        exports = ["per_block"]
        pruning["allocation"] = "global"
        speed = {**REQUEST, "num_threads": NUM_THREADS}
        settings = [f"output.speed={json.dumps(speed)}", *settings]
    spec = spec_of(pruning, uri, exports, settings=settings)
    return ray_surgeon.prune(spec=spec, resume=uri.exists())


def command_of(
    model: Path, *, engine: str, folder: Path, python: str, port: int
) -> list[str]:
    """Return the engine's command for a checkpoint; llama.cpp needs a file in `folder`."""
    if engine == "vllm":
        return serve_vllm.command_of(model, port, "", python)
    file = folder / f"{'-'.join(model.parts[-4:])}.gguf"
    serve_llamacpp.write_uniform(model, file)
    return serve_llamacpp.command_of(file, port, "", python)


def served_speeds(results: Results, dense: Path, command: Command, port: int) -> Speeds:
    """Serve all sizes alternately with the dense model, and return their speedups by method.

    Args:
        results: results of the runs by method.
        dense: folder of the dense model.
        command: returns the engine's command for a checkpoint.
        port: port of the server.
    """
    served = {"dense": command(dense)}
    for way, result in results.items():
        for entry in result.report["exports"]:
            served[f"{way}, {entry['size']:g}"] = command(Path(entry["uri"]))
    rates = fastest(served, port, [1], rounds=ROUNDS)
    speeds = {
        name: decode / rates["dense", 1][1] for (name, _), (_, decode) in rates.items()
    }
    return {
        way: [speeds[f"{way}, {size:g}"] for size in result.sizes]
        for way, result in results.items()
    }


def at_speed(points: Sequence[Point], speed: float, text: str) -> float | None:
    """Return the divergence at a speedup; None if no size reaches it."""
    known = sorted([(1.0, 0.0), *((faster, lost[text]) for faster, lost in points)])
    speeds, losses = zip(*known, strict=True)
    return float(np.interp(speed, speeds, losses)) if speed <= speeds[-1] else None


def row_of(
    way: str, result: ray_surgeon.PruneResult, speeds: Sequence[float]
) -> list[str]:
    """Return a line of the table from the speedups of a run's sizes."""
    losses = [dict(size["divergence"]) for size in result.sizes.values()]
    points: list[Point] = list(zip(speeds, losses, strict=True))
    texts = list(points[0][1])
    cells = []
    for speed in SPEEDS:
        found = [at_speed(points, speed, text) for text in texts]
        cells.append(" / ".join("slower" if x is None else f"{x:.3f}" for x in found))
    seen = ", ".join(
        f"{size:g}: {speed:.2f}" for size, (speed, _) in zip(SIZES, points, strict=True)
    )
    return [way, *cells, seen]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    header = ("way", *(f"{speed:g} times as fast" for speed in SPEEDS), "speeds of sizes")
    lines = [
        "| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)
    ]
    return "\n".join(lines)


def table_for(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Return the dense model's folder and an engine's table, which is measured if missing."""
    model = parse_spec(QUICKSTART.read_text(encoding="utf-8"), arguments.set).model
    dense = open_model(model).small_files_folder()
    seconds: Path = arguments.folder / f"{arguments.engine}.json"
    if not seconds.exists():
        arguments.folder.mkdir(parents=True, exist_ok=True)
        request = [
            f"--{name.replace('_', '-')}={value}" for name, value in REQUEST.items()
        ]
        options = ["--engine", arguments.engine, "--python", arguments.python, *request]
        if arguments.engine == "transformers":
            options.append(f"--threads={NUM_THREADS}")
        engine_table.main([str(dense), str(seconds), *options])
    return dense, seconds


def in_transformers(arguments: argparse.Namespace) -> tuple[Results, Speeds]:
    """Return runs with a table of transformers, and their measured speedups."""
    _, seconds = table_for(arguments)
    results = {
        way: run_of(way, arguments.folder, seconds, arguments.set)
        for way in arguments.ways
    }

    def of_sizes(result: ray_surgeon.PruneResult) -> list[float]:
        exports = result.report["exports"]
        ratios = {export["size"]: export["speed"]["decode_ratio"] for export in exports}
        return [ratios[size] for size in result.sizes]

    return results, {way: of_sizes(result) for way, result in results.items()}


def in_engine(arguments: argparse.Namespace) -> tuple[Results, Speeds]:
    """Return runs with a table of an engine, and the speedups of their sizes in it."""
    folder, engine, python = arguments.folder, arguments.engine, arguments.python
    dense, seconds = table_for(arguments)
    results = {way: run_of(way, folder, seconds, arguments.set) for way in arguments.ways}

    port = arguments.port
    command = functools.partial(
        command_of, engine=engine, folder=folder, python=python, port=port
    )
    return results, served_speeds(results, dense, command, port)


def main(argv: Sequence[str] | None = None) -> int:
    """Start the runs, serve them, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.equal_speed", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument(
        "--engine", choices=["llamacpp", "vllm", "transformers"], default="llamacpp"
    )
    parser.add_argument("--python", default=sys.executable, help="one with the engine")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--port", type=int, default=8013)
    add_settings(parser)
    arguments = parser.parse_args(argv)
    measured = in_transformers if arguments.engine == "transformers" else in_engine
    results, speeds = measured(arguments)
    rows = [row_of(way, result, speeds[way]) for way, result in results.items()]
    sys.stdout.write(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

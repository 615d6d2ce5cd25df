"""What is lost at equal speed of decoding, by width, by depth and by both, as a Markdown table.

``python -m benchmarks.equal_speed FOLDER --engine llamacpp --python PYTHON`` measures a table of
seconds (`examples.engine_table`), prunes SmolLM2 in every way to speeds by it, serves each size in
turns with the dense model, one request at a time, and reads off what is lost where decoding is 1.25
and 1.5 times as fast as the dense model's: divergence on Python's help, docstrings and descriptions
of packages, a line between neighbouring sizes. The Python has xllamacpp or, with ``--engine vllm``,
vLLM. Tables and runs that are there are read, not made again, and runs that were stopped go on.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ray_surgeon
from benchmarks.depth import spec_of
from benchmarks.peers import file_name
from benchmarks.recovery import QUICKSTART
from examples import engine_table, serve_llamacpp, serve_vllm
from examples.serving import fastest
from ray_surgeon.spec.parsing import parse_spec
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
"""Times as fast by the table; what is measured of the whole model may be less."""
SPEEDS = (1.25, 1.5)
ROUNDS = 5
"""Of serving all models in turns; the fastest of each model counts."""
REQUEST = ("--prompt-length", "16", "--num-new-tokens", "64")
"""Nearly all of it is decoding."""

Point = tuple[float, dict[str, float]]
"""How fast a size decodes, in speeds of the dense model, and its divergence by text."""
Command = Callable[[Path], list[str]]


def run_of(way: str, folder: Path, table: Path) -> ray_surgeon.PruneResult:
    """Return a run with a family of sizes, which is made unless it is there; without recovery."""
    uri = folder / f"{file_name(way)}-{table.stem}"
    target = {"speedup": SIZES[-1], "table": str(table)}
    pruning = {"sizes": list(SIZES), "target": target, "num_shots": 1, **WAYS[way]}
    spec = spec_of(pruning, uri, ["uniform"])
    return ray_surgeon.prune(spec=spec, resume=uri.exists())


def command_of(model: Path, *, engine: str, folder: Path, python: str, port: int) -> list[str]:
    """Return how an engine serves a checkpoint; llama.cpp has a file of it in `folder`."""
    if engine == "vllm":
        return serve_vllm.command_of(model, port, "", python)
    file = folder / f"{'-'.join(model.parts[-4:])}.gguf"
    serve_llamacpp.write_uniform(model, file)
    return serve_llamacpp.command_of(file, port, "", python)


def points_of(
    results: Mapping[str, ray_surgeon.PruneResult], dense: list[str], command: Command, port: int
) -> dict[str, list[Point]]:
    """Serve all sizes of runs in turns with the dense model, and return them by way.

    Args:
        results: of the runs by way.
        dense: how the engine serves the dense model.
        command: returns how it serves a checkpoint.
        port: of the server.
    """
    served = {"dense": dense}
    for way, result in results.items():
        for entry in result.report["exports"]:
            served[f"{way}, {entry['size']:g}"] = command(Path(entry["uri"]))
    rates = fastest(served, port, [1], rounds=ROUNDS)
    speeds = {name: decode / rates["dense", 1][1] for (name, _), (_, decode) in rates.items()}

    def of_run(way: str) -> list[Point]:
        sizes = results[way].sizes.items()
        return [(speeds[f"{way}, {size:g}"], dict(of["divergence"])) for size, of in sizes]

    return {way: of_run(way) for way in results}


def at_speed(points: Sequence[Point], speed: float, text: str) -> float | None:
    """Return the divergence at a speed; None if no size is as fast."""
    known = sorted([(1.0, 0.0), *((faster, lost[text]) for faster, lost in points)])
    speeds, losses = zip(*known, strict=True)
    return float(np.interp(speed, speeds, losses)) if speed <= speeds[-1] else None


def row_of(way: str, points: Sequence[Point]) -> list[str]:
    """Return a line of the table."""
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
    lines = ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs, serve them, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.equal_speed", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--engine", choices=["llamacpp", "vllm"], default="llamacpp")
    parser.add_argument("--python", required=True, help="one with the engine")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--port", type=int, default=8013)
    arguments = parser.parse_args(argv)
    source = parse_spec(QUICKSTART.read_text(encoding="utf-8")).model
    dense = open_model(source).small_files_folder()
    seconds = arguments.folder / f"{arguments.engine}.json"
    if not seconds.exists():
        arguments.folder.mkdir(parents=True, exist_ok=True)
        engine = ["--engine", arguments.engine, "--python", arguments.python]
        engine_table.main([str(dense), str(seconds), *engine, *REQUEST])
    results = {way: run_of(way, arguments.folder, seconds) for way in arguments.ways}

    command = functools.partial(
        command_of,
        engine=arguments.engine,
        folder=arguments.folder,
        python=arguments.python,
        port=arguments.port,
    )
    served = command(dense)
    points = points_of(results, served, command, arguments.port)
    sys.stdout.write(table([row_of(way, of) for way, of in points.items()]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

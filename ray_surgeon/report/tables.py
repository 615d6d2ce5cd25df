"""What the terminal shows of reports; ray-surgeon report compares runs."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ray_surgeon.report.display import new_console
from ray_surgeon.report.html_report import excerpt, has_generation, page
from ray_surgeon.report.plots import FORMATS, perplexity_figure, save
from ray_surgeon.report.progress import is_complete, num_exports, num_shots
from ray_surgeon.storage import files

_EXAMPLE_CHARACTERS = 200
"""Of a prompt or an answer that the terminal shows."""


def shots_table(record: Mapping[str, Any]) -> Table:
    """Return the terminal's table of a report: one line for the dense model and one a shot."""
    texts = list(record["dense"]["perplexity"])
    table = Table(title=str(record["spec"]["name"]))
    answers = has_generation([record])
    accepted = ("accepted",) if answers else ()
    perplexities = (f"perplexity {text} (KL)" for text in texts)
    for column in (
        "shot",
        *accepted,
        "sparsity",
        "threshold",
        *perplexities,
        "wall s",
        "CPU s",
        "peak memory GiB",
    ):
        table.add_column(column, justify="right")
    dense = [_perplexity_text(record["dense"]["perplexity"][text]) for text in texts]
    table.add_row("dense", *(("100.0%",) if answers else ()), "0.00 %", "", *dense, "", "", "")
    for shot in record["shots"]:
        values = [
            f"{_perplexity_text(shot['perplexity'][text])} ({shot['divergence'][text]:.3f})"
            for text in texts
        ]
        times = f"{sum(shot['seconds'].values()):.0f}", f"{sum(shot['cpu_seconds'].values()):.0f}"
        threshold = "" if shot["threshold"] is None else f"{shot['threshold']:.3g}"
        memory = f"{shot['peak_rss_bytes'] / 2**30:.2f}"
        accepted = (_acceptance_text(shot),) if answers else ()
        table.add_row(
            str(shot["index"]),
            *accepted,
            f"{shot['sparsity']:.2%}",
            threshold,
            *values,
            *times,
            memory,
        )
    return table


def _acceptance_text(shot: Mapping[str, Any]) -> str:
    return f"{shot['generation']['acceptance']:.1%}" if shot.get("generation") else ""


def generation_lines(record: Mapping[str, Any]) -> list[str]:
    """Return what a run ends by saying of the model's answers, and one of them.

    Nothing if they are not compared.

    The example is text of users and models: print these lines without markup.
    """
    generation = record["shots"][-1].get("generation") if record["shots"] else None
    if not generation:
        return []
    dense = record["dense"].get("generation") or {}
    parts = generation["tokens_until_departure"]
    of = f" of {dense['num_prompts']} prompts, {dense['num_tokens']} tokens" if dense else ""
    lines = [
        f"answers of the dense model{of}",
        f"  {'accepted':<28} {generation['acceptance']:10.1%}",
        f"  {'same most likely token':<28} {generation['agreement']:10.1%}",
        f"  {'divergence, nats per token':<28} {generation['divergence']:10.3f}",
        f"  {'own answers part after':<28} {parts['mean']:10.1f} tokens (median "
        f"{parts['median']:g})",
    ]
    if generation["not_ended"] is not None:
        lines.append(f"  {'not ended, of those ended':<28} {generation['not_ended']:10.0%}")
    lines.append(f"  {'caught in a loop':<28} {generation['repeating']:10.0%}")
    return lines + [
        f"  {part:<8}{excerpt(generation['example'][part], _EXAMPLE_CHARACTERS)}"
        for part in ("prompt", "dense", "pruned")
    ]


def export_lines(record: Mapping[str, Any]) -> list[str]:
    """Return what a run ends by saying of every export.

    That is size, perplexity and speed before and after, and how to load it.
    """
    before = (
        record["parameters"]["before"] * getattr(torch, record["spec"]["model"]["dtype"]).itemsize
    )
    lines = []
    for export in record["exports"]:
        lines.append(f"{export['kind']} export: {export['uri']}")
        lines.append(_change("weights, MB", before / 1e6, export["size_bytes"] / 1e6))
        if "files" in export:
            lines += [
                f"  {file['file']}: {file['size_bytes'] / 1e6:.1f} MB" for file in export["files"]
            ] + [f"  load it: {export['load']}"]
            continue
        # a quantised one has its own
        after = export.get("perplexity", record["shots"][-1]["perplexity"])
        for text, value in record["dense"]["perplexity"].items():
            lines.append(_change(f"perplexity {text}", value, after[text]))
        for step in ("prefill", "decode") if "speed" in export else ():
            speeds = [
                export["speed"][model][f"{step}_tokens_per_s"]["median"]
                for model in ("dense", "pruned")
            ]
            lines.append(_change(f"{step}, tokens per second", *speeds))
        if "speed" in export:
            memory = [
                export["speed"][model]["peak_gpu_bytes"] or export["speed"][model]["peak_rss_bytes"]
                for model in ("dense", "pruned")
            ]
            lines.append(_change("memory of a process, MB", memory[0] / 1e6, memory[1] / 1e6))
        for task, metrics in export.get("tasks", {}).items():
            for metric, value in metrics.items():
                if not metric.endswith("_stderr"):
                    lines.append(
                        _change(f"{task} {metric}", record["dense"]["tasks"][task][metric], value)
                    )
        lines.append(f"  load it: {export['load']}")
    return lines


def _change(what: str, before: float, after: float) -> str:
    ratio = f"   x {after / before:.3f}" if before else ""
    return f"  {what:<28} {before:10.3f} -> {after:10.3f}{ratio}"


def _perplexity_text(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) and value < 1e4 else f"{value:.3g}"


def comparison_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return a line a shot of every run: name, structure, sparsity, perplexities."""
    texts = list(
        dict.fromkeys(text for record in records for text in record["dense"]["perplexity"])
    )
    table = Table()
    answers = has_generation(records)
    accepted = ("accepted",) if answers else ()
    for column in (
        "run",
        "structure",
        "shot",
        *accepted,
        "sparsity",
        *(f"perplexity {text}" for text in texts),
    ):
        table.add_column(column, justify="right" if column != "run" else "left")
    for record in records:
        name = str(record["spec"]["name"])
        structure = str(record["spec"]["pruning"]["structure"])
        lines = [
            (
                "dense",
                "100.0%" if has_generation([record]) else "",
                0.0,
                record["dense"]["perplexity"],
            )
        ]
        lines += [
            (str(shot["index"]), _acceptance_text(shot), shot["sparsity"], shot["perplexity"])
            for shot in record["shots"]
        ]
        for shot, acceptance, sparsity, perplexity in lines:
            accepted = (acceptance,) if answers else ()
            values = [
                _perplexity_text(perplexity[text]) if text in perplexity else "" for text in texts
            ]
            table.add_row(name, structure, shot, *accepted, f"{sparsity:.2%}", *values)
    return table


def _read_report(run: str) -> dict[str, Any]:
    uri = files.join(run, "report.json")
    record = files.read_json(uri)
    needed = {
        "spec",
        "dense",
        "shots",
        "linears",
        "parameters",
        "exports",
        "fingerprints",
        "environment",
    }
    if not isinstance(record, dict) or not needed <= record.keys():
        raise ValueError(f"{uri} is no report of this program")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Print and plot the comparison of run directories, and write it as a page.

    The exit code is 2 if one has no report.
    """
    parser = argparse.ArgumentParser(
        prog="ray-surgeon report", description="Compare runs in one table, one plot and one page."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory, local or on any fsspec URI"
    )
    parser.add_argument(
        "--plot",
        default="perplexity.png",
        metavar="FILE",
        help=f"plot to write, a .{', .'.join(FORMATS)} file on any URI; %(default)s",
    )
    parser.add_argument(
        "--html",
        default="comparison.html",
        metavar="FILE",
        help="page to write, with every run whole, on any URI; %(default)s",
    )
    parser.add_argument(
        "--text", help="evaluation text of the plot; the first one of the first run if not given"
    )
    arguments = parser.parse_args(argv)
    console = new_console()
    errors = Console(stderr=True)
    try:
        records = [_read_report(run) for run in arguments.runs]
    except (OSError, ValueError) as error:
        errors.print(
            f"error: no report: {error}; give run directories with a report.json",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        return 2
    names = Counter(record["spec"]["name"] for record in records)
    for run, record in zip(arguments.runs, records, strict=True):
        if names[record["spec"]["name"]] > 1:
            record["spec"]["name"] = run
    console.print(comparison_table(records))
    for record in records:
        if not is_complete(record):
            state = (
                f"{len(record['shots'])} of {num_shots(record)} shots, {len(record['exports'])} of "
                f"{num_exports(record)} exports"
            )
            console.print(
                f"not complete: {record['spec']['name']}, {state}", markup=False, soft_wrap=True
            )
    texts = list(
        dict.fromkeys(text for record in records for text in record["dense"]["perplexity"])
    )
    try:
        if (arguments.text or texts[0]) not in texts:
            raise ValueError(
                f"--text: no run has a text {arguments.text!r}; they have {', '.join(texts)}"
            )
        save(perplexity_figure(records, arguments.text or texts[0]), arguments.plot)
        files.write_text(arguments.html, page(records))
    except (OSError, ValueError) as error:
        errors.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    console.print(f"plot: {arguments.plot}\npage: {arguments.html}", markup=False, soft_wrap=True)
    return 0

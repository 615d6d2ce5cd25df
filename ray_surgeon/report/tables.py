"""What the terminal shows of reports; ray-surgeon report compares runs."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_surgeon.report import progress
from ray_surgeon.report.display import new_console
from ray_surgeon.report.html_report import page, rendered
from ray_surgeon.report.plots import FORMATS, perplexity_figure, save
from ray_surgeon.report.record import RunReport
from ray_surgeon.storage import files


def shots_table(record: Mapping[str, Any]) -> Table:
    """Return the terminal's table of a report: one line for the dense model and one a shot."""
    before = ("shot", "accepted", "sparsity", "threshold")
    perplexities = (f"perplexity {text} (KL)" for text in progress.texts_of([record]))
    after = ("wall s", "CPU s", "peak memory GiB")
    return _table((*before, *perplexities, *after), _rows(record), str(record["spec"]["name"]))


def comparison_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return a line a shot of every run: name, structure, sparsity, perplexities."""
    before = ("run", "structure", "shot", "accepted", "sparsity")
    perplexities = (f"perplexity {text}" for text in progress.texts_of(records))
    rows = []
    for record in records:
        name = str(record["spec"]["name"])
        structure = str(record["spec"]["pruning"]["structure"])
        rows += [{"run": name, "structure": structure} | row for row in _rows(record)]
    return _table((*before, *perplexities), rows)


def _table(
    columns: Sequence[str], rows: Sequence[Mapping[str, str]], title: str | None = None
) -> Table:
    """Return a table of the columns that some row has."""
    table = Table(title=title)
    columns = [column for column in columns if any(column in row for row in rows)]
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    return table


def _rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row for the dense model and one a shot, each the contents of columns by name."""
    dense = {"shot": "dense", "sparsity": "0.00%"} | _perplexities(record["dense"])
    if progress.has_generation([record]):
        dense["accepted"] = "100.0%"
    rows = [dense]
    for shot in record["shots"]:
        threshold = shot["threshold"]
        row = {
            "shot": str(shot["index"]),
            "sparsity": f"{shot['sparsity']:.2%}",
            "threshold": "" if threshold is None else f"{threshold:.3g}",
            "wall s": f"{sum(shot['seconds'].values()):.0f}",
            "CPU s": f"{sum(shot['cpu_seconds'].values()):.0f}",
            "peak memory GiB": f"{shot['peak_rss_bytes'] / 2**30:.2f}",
        }
        if shot.get("generation"):
            row["accepted"] = f"{shot['generation']['acceptance']:.1%}"
        rows.append(row | _perplexities(shot))
    return rows


def _perplexities(measured: Mapping[str, Any]) -> dict[str, str]:
    row = dict[str, str]()
    for text, perplexity in measured["perplexity"].items():
        is_usual = math.isfinite(perplexity) and perplexity < 1e4
        shown = f"{perplexity:.3f}" if is_usual else f"{perplexity:.3g}"
        # the dense model has none from itself
        divergence = f" ({measured['divergence'][text]:.3f})" if "divergence" in measured else ""
        row |= {f"perplexity {text}": shown, f"perplexity {text} (KL)": shown + divergence}
    return row


def generation_lines(record: Mapping[str, Any]) -> list[str]:
    """Return what a run ends by saying of the model's answers, and one of them.

    Nothing if they are not compared.

    The example is text of users and models: print these lines without markup.
    """
    return _lines("answers", record)


def export_lines(record: Mapping[str, Any]) -> list[str]:
    """Return what a run ends by saying of every export.

    That is size, perplexity and speed before and after, and how to load it.
    """
    return _lines("exports", record)


def _lines(part: str, record: Mapping[str, Any]) -> list[str]:
    dense_bytes = progress.dense_bytes(record)
    text = rendered("summary.txt.jinja", part=part, record=record, dense_bytes=dense_bytes)
    return text.split("\n")[:-1]


def _read_report(run: str) -> dict[str, Any]:
    uri = files.join(run, "report.json")
    record = files.read_json(uri)
    parts = RunReport({}, {}, {}, 1).as_record().keys() - {"plan", "retries"}  # those are newer
    if not isinstance(record, dict) or not parts <= record.keys():
        raise ValueError(f"{uri} is no report of this program")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Print and plot the comparison of run directories, and write it as a page.

    The exit code is 2 if one has no report.
    """
    arguments = _arguments(argv)
    console = new_console()
    errors = Console(stderr=True)

    def fail(message: str) -> int:
        errors.print(message, style="red", markup=False, soft_wrap=True)
        return 2

    try:
        records = [_read_report(run) for run in arguments.runs]
    except (OSError, ValueError) as error:
        return fail(f"error: no report: {error}; give run directories with a report.json")
    names = Counter(record["spec"]["name"] for record in records)
    for run, record in zip(arguments.runs, records, strict=True):
        if names[record["spec"]["name"]] > 1:
            record["spec"]["name"] = run
    console.print(comparison_table(records))
    for record in records:
        if not progress.is_complete(record):
            shots = f"{len(record['shots'])} of {progress.num_shots(record)} shots"
            exports = f"{len(record['exports'])} of {progress.num_exports(record)} exports"
            line = f"not complete: {record['spec']['name']}, {shots}, {exports}"
            console.print(line, markup=False, soft_wrap=True)
    texts = progress.texts_of(records)
    text = arguments.text or texts[0]
    try:
        if text not in texts:
            raise ValueError(f"--text: no run has a text {text!r}; they have {', '.join(texts)}")
        save(perplexity_figure(records, text), arguments.plot)
        files.write_text(arguments.html, page(records))
    except (OSError, ValueError) as error:
        return fail(f"error: {error}")
    console.print(f"plot: {arguments.plot}\npage: {arguments.html}", markup=False, soft_wrap=True)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ray-surgeon report", description="Compare runs in one table, one plot and one page."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory, local or on any fsspec URI"
    )
    for name, default, text in (
        ("--plot", "perplexity.png", f"plot to write, a .{', .'.join(FORMATS)} file on any URI"),
        ("--html", "comparison.html", "page to write, with every run whole, on any URI"),
    ):
        parser.add_argument(name, default=default, metavar="FILE", help=f"{text}; %(default)s")
    parser.add_argument(
        "--text", help="evaluation text of the plot; the first one of the first run if not given"
    )
    return parser.parse_args(argv)

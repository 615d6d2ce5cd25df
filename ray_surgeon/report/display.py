"""What a person sees of a running job, as bars or as lines of a log, and tables of reports.

``ray-surgeon report RUN RUN ...`` compares run directories in one table, one plot and one HTML
page.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from ray_surgeon.report import record as reports
from ray_surgeon.report.events import Event, Moment
from ray_surgeon.report.html_report import page, rendered
from ray_surgeon.report.plots import quality_figure, save
from ray_surgeon.storage import files

LOG_WIDTH = 140
"""Columns of tables in a log, which has no width of its own."""
_LINE_EVERY_S = 30.0
"""How often a log gets a line about a step that has not ended."""


def new_console() -> Console:
    """Return a console for standard output, which in a log has a fixed width."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


class Display(Progress):
    """``with Display(console, name) as display:`` shows events and moments.

    Without a console it shows nothing.
    """

    def __init__(self, console: Console | None, name: str) -> None:
        """Prepare the bars."""
        # in Jupyter rich draws bars by ipywidgets
        in_notebook = console and console.is_jupyter and find_spec("ipywidgets")
        live = bool(in_notebook or (console and console.is_terminal))
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[rest]}")
        clock = TimeElapsedColumn()
        console = console or Console(quiet=True)
        super().__init__(*columns, clock, console=console, disable=not live, transient=True)
        self._run_bar = self.add_task(name, total=None, rest="shots")
        self._step_bar = self.add_task("", total=None, rest="")
        self._last_line_s = time.monotonic()
        self.also: Callable[[Event], object] = lambda _: None  # gets every event, too

    def note(self, text: str) -> None:
        """Show a line."""
        self._last_line_s = time.monotonic()
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def __call__(self, news: Event | Moment) -> None:
        """Show the end of a step, or how far it has come."""
        if isinstance(news, Event):
            self.note(news.line)
            self.also(news)
            if news.step in ("load", "commit"):
                self.update(self._run_bar, completed=news.shot, total=news.num_shots)
            return
        texts: dict[str, Any] = {"description": news.step, "rest": news.pace}
        self.update(self._step_bar, completed=news.done, total=news.total or None, **texts)
        if self.disable and time.monotonic() - self._last_line_s > _LINE_EVERY_S:
            self.note(news.line)


def shots_table(*records: Mapping[str, Any]) -> Table:
    """Return the terminal's table of runs: a line for each dense model and one for every shot."""
    about = ["shot", "accepted", "sparsity"]
    perplexities = [f"perplexity {text}" for text in reports.texts_of(records)]
    columns = ["run", "structure", *about, *perplexities]
    if len(records) == 1:
        columns = [*about, "threshold", *(f"{name} (KL)" for name in perplexities)]
        columns += ["wall s", "CPU s", "peak memory GiB"]
    rows = [row for record in records for row in _rows(record)]
    columns = [column for column in columns if any(column in row for row in rows)]
    table = Table(title=None if len(records) > 1 else records[0]["spec"]["name"])
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    return table


def _rows(record: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield a row for the dense model and one a shot, each the contents of columns by name."""
    spec = record["spec"]
    about = {"run": spec["name"], "structure": reports.structure_of(record)}
    accepted = {"accepted": "100.0%"} if reports.has_generation([record]) else {}
    yield about | {"shot": "dense", "sparsity": "0.00%"} | accepted | _perplexities(record["dense"])
    for shot in record["shots"]:
        threshold = shot["threshold"]
        row = {"shot": str(shot["index"]), "sparsity": f"{shot['sparsity']:.2%}"}
        row["threshold"] = "" if threshold is None else f"{threshold:.3g}"
        row["wall s"] = f"{sum(shot['seconds'].values()):.0f}"
        row["CPU s"] = f"{sum(shot['cpu_seconds'].values()):.0f}"
        row["peak memory GiB"] = f"{shot['peak_rss_bytes'] / 2**30:.2f}"
        if shot.get("generation"):
            row["accepted"] = f"{shot['generation']['acceptance']:.1%}"
        yield about | row | _perplexities(shot)


def _perplexities(measured: Mapping[str, Any]) -> dict[str, str]:
    row = dict[str, str]()
    for text, perplexity in measured["perplexity"].items():
        shown = f"{perplexity:.3f}" if perplexity < 1e4 else f"{perplexity:.3g}"
        # the dense model has none from itself
        divergence = f" ({measured['divergence'][text]:.3f})" if "divergence" in measured else ""
        row |= {f"perplexity {text}": shown, f"perplexity {text} (KL)": shown + divergence}
    return row


def summary_lines(part: str, record: Mapping[str, Any]) -> list[str]:
    """Return what a run ends by saying of its exports, or of the model's answers.

    Of each export that is size, perplexity and speed before and after, and how to load it. Answers
    have an example, a text of users and models: print these lines without markup.

    Args:
        part: exports or answers.
        record: content of report.json.
    """
    about = {"dense_bytes": reports.dense_bytes(record), "shots": reports.shots_by_size(record)}
    text = rendered("summary.txt.jinja", part=part, record=record, **about)
    return text.split("\n")[:-1]


def _read_report(run: str) -> dict[str, Any]:
    uri = files.join(run, "report.json")
    if not files.exists(uri):
        raise ValueError(f"there is no {uri}; give run directories with a report.json")
    record = files.read_json(uri)
    parts = reports.RunReport({}, {}, {}, 1).as_record().keys() - {"plan", "retries"}
    if not isinstance(record, dict) or not parts <= record.keys():
        raise ValueError(f"{uri} is no report of this program")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Print and plot the comparison of run directories, and write it as a page.

    The exit code is 2 if one has no report.
    """
    try:
        _compare(_arguments(argv), new_console())
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    return 0


def _compare(arguments: argparse.Namespace, console: Console) -> None:
    records = [_read_report(run) for run in arguments.runs]
    names = Counter(record["spec"]["name"] for record in records)
    for run, record in zip(arguments.runs, records, strict=True):
        if names[record["spec"]["name"]] > 1:
            record["spec"]["name"] = run
    console.print(shots_table(*records))
    for record in records:
        if not reports.is_complete(record):
            shots = f"{len(record['shots'])} of {reports.num_shots(record)} shots"
            exports = f"{len(record['exports'])} of {reports.num_exports(record)} exports"
            line = f"not complete: {record['spec']['name']}, {shots}, {exports}"
            console.print(line, markup=False, soft_wrap=True)
    texts = reports.texts_of(records)
    text = arguments.text or texts[0]
    if text not in texts:
        raise ValueError(f"--text: no run has a text {text!r}; they have {', '.join(texts)}")
    save(quality_figure(records, text), arguments.plot)
    files.write_text(arguments.html, page(records))
    console.print(f"plot: {arguments.plot}\npage: {arguments.html}", markup=False, soft_wrap=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    about = "Compare runs in one table, one plot and one page."
    parser = argparse.ArgumentParser("ray-surgeon report", description=about)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, on any fsspec URI")
    plot = "plot to write, a .png, .svg or .pdf file on any URI; %(default)s"
    html = "page to write, with every run whole, on any URI; %(default)s"
    parser.add_argument("--plot", default="perplexity.png", metavar="FILE", help=plot)
    parser.add_argument("--html", default="comparison.html", metavar="FILE", help=html)
    parser.add_argument("--text", help="evaluation text of the plot; if not given, the first one")
    return parser.parse_args(argv)

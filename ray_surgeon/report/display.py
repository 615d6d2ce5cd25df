"""Progress of a running job as bars or as lines of a log, and tables that compare reports.

``ray-surgeon report RUN RUN ...`` compares run directories in a table, and if asked in a plot and a
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

from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from ray_surgeon.report import record as reports
from ray_surgeon.report.events import Event, ProgressReport
from ray_surgeon.report.findings import exports_by_round, faster, megabytes
from ray_surgeon.report.html_report import page, rendered
from ray_surgeon.report.plots import quality_figure, save
from ray_surgeon.storage import files

LOG_WIDTH = 140
"""Columns of tables in a log, which has no width itself."""
_LINE_EVERY_S = 30.0
"""Time between lines of a log about a step that has not ended."""


def new_console() -> Console:
    """Return a console for standard output, with a fixed width if that is no terminal."""
    if sys.stdout.isatty():
        return Console()
    return Console(width=LOG_WIDTH)


class Display(Progress):
    """``with Display(console, name) as display:`` shows events and progress.

    Without a console it shows nothing.
    """

    def __init__(self, console: Console | None, name: str) -> None:
        """Prepare the bars of a run of this name."""
        super().__init__(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            "{task.fields[rest]}",
            TimeElapsedColumn(),
            console=console or Console(quiet=True),
            disable=not _can_draw_bars(console),
            transient=True,
        )
        self._run_bar = self.add_task(name, total=None, rest="shots")
        self._step_bar = self.add_task("", total=None, rest="")
        self._last_line_s = time.monotonic()
        self.also: Callable[[Event], object] = lambda _: None  # called with every event

    def note(self, text: str) -> None:
        """Show a line."""
        self._last_line_s = time.monotonic()
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def __call__(self, news: Event | ProgressReport) -> None:
        """Show the end of a step, or its progress."""
        if isinstance(news, Event):
            self.note(news.line)
            self.also(news)
            if news.step in ("load", "commit"):
                self.update(self._run_bar, completed=news.shot, total=news.num_shots)
            return
        self.update(
            self._step_bar,
            completed=news.done,
            total=news.total or None,
            description=news.step,
            rest=news.pace,
        )
        if self.disable and time.monotonic() - self._last_line_s > _LINE_EVERY_S:
            self.note(news.line)


def _can_draw_bars(console: Console | None) -> bool:
    if console is None:
        return False
    # in Jupyter rich draws bars with ipywidgets
    in_notebook = console.is_jupyter and find_spec("ipywidgets")
    return bool(in_notebook) or console.is_terminal


def shots_table(*records: Mapping[str, Any]) -> Table:
    """Return a table of runs for the terminal.

    It has a row for each dense model and one for every pruning round, with the size and speed of
    the export that was written after it. Columns that are empty in all rows are left out.
    """
    perplexities = [f"perplexity {text}" for text in reports.texts_of(records)]
    after = ["size", "prompts", "generation"]
    if len(records) == 1:
        title = records[0]["spec"]["name"]
        with_divergences = [f"{column} (KL)" for column in perplexities]
        columns = ["round", "agreement", "sparsity", *with_divergences]
        columns += [*after, "wall s", "peak memory GiB"]
    else:
        title = None
        columns = ["run", "structure", "round", "agreement", "sparsity", *perplexities]
        columns += after
    rows: list[dict[str, str]] = []
    for record in records:
        rows.extend(_rows(record))
    columns = [column for column in columns if any(row.get(column) for row in rows)]
    table = Table(title=title)
    for column in columns:
        justify: JustifyMethod = "left" if column == "run" else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    return table


def _rows(record: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield a row for the dense model and one per round, as texts by column."""
    spec = record["spec"]
    about = {"run": spec["name"], "structure": reports.structure_of(record)}
    dense = {**about, "round": "dense", "sparsity": "0.00%"}
    if reports.has_generation([record]):
        dense["agreement"] = "100.0%"
    dense.update(_perplexities(record["dense"]))
    exports = exports_by_round(record)
    if exports:
        dense["size"] = megabytes(reports.dense_bytes(record))
    yield dense
    for shot in record["shots"]:
        row = {
            **about,
            "round": str(shot["index"]),
            "sparsity": f"{shot['sparsity']:.2%}",
            "wall s": f"{sum(shot['seconds'].values()):.0f}",
            "peak memory GiB": f"{shot['peak_rss_bytes'] / 2**30:.2f}",
        }
        if shot.get("generation"):
            row["agreement"] = f"{shot['generation']['acceptance']:.1%}"
        row.update(_perplexities(shot))
        export = exports.get(shot["index"])
        if export is not None:
            row["size"] = megabytes(export["size_bytes"])
            if "speed" in export:
                row["prompts"] = faster(export["speed"]["prefill_ratio"])
                row["generation"] = faster(export["speed"]["decode_ratio"])
        yield row


def _perplexities(measured: Mapping[str, Any]) -> dict[str, str]:
    row: dict[str, str] = {}
    for text, perplexity in measured["perplexity"].items():
        shown = f"{perplexity:.3f}" if perplexity < 1e4 else f"{perplexity:.3g}"
        row[f"perplexity {text}"] = shown
        if "divergence" in measured:  # the dense model does not diverge from itself
            shown = f"{shown} ({measured['divergence'][text]:.3f})"
        row[f"perplexity {text} (KL)"] = shown
    return row


def summary_lines(part: str, record: Mapping[str, Any]) -> list[str]:
    """Return the last lines of a run, about its exports or about the model's answers.

    An export has size, perplexity and speed before and after, and the code that loads it. Answers
    have an example, which is a text of users and models: print these lines without markup.

    Args:
        part: exports or answers.
        record: content of report.json.
    """
    text = rendered(
        "summary.txt.jinja",
        part=part,
        record=record,
        dense_bytes=reports.dense_bytes(record),
        shots=reports.shots_by_size(record),
    )
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
    """Compare run directories: print a table, and write a plot and a page if asked.

    Returns:
        The exit code, which is 2 if a folder has no report.
    """
    try:
        _compare(_arguments(argv), new_console())
    except (OSError, ValueError) as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, soft_wrap=True
        )
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
            line = (
                f"not complete: {record['spec']['name']}, "
                f"{len(record['shots'])} of {reports.num_shots(record)} shots, "
                f"{len(record['exports'])} of {reports.num_exports(record)} exports"
            )
            console.print(line, markup=False, soft_wrap=True)
    texts = reports.texts_of(records)
    text = arguments.text or texts[0]
    if text not in texts:
        raise ValueError(
            f"--text: no run has a text {text!r}; they have {', '.join(texts)}"
        )
    if arguments.plot is not None:
        save(quality_figure(records, text), arguments.plot)
        console.print(f"plot: {arguments.plot}", markup=False, soft_wrap=True)
    if arguments.html is not None:
        files.write_text(arguments.html, page(records))
        console.print(f"page: {arguments.html}", markup=False, soft_wrap=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "ray-surgeon report",
        description="Compare runs in one table, and in a plot and a page if asked.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory, on any fsspec URI"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="plot of perplexities to write, a .png, .svg or .pdf file on any URI",
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="page to write, with every run whole, on any URI",
    )
    parser.add_argument(
        "--text", help="evaluation text of the plot; if not given, the first one"
    )
    return parser.parse_args(argv)

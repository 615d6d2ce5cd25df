"""Progress of a running job as a live table or as lines of a log, and tables that compare reports.

``ray-surgeon report RUN RUN ...`` compares run directories in a table, and if asked in a plot and a
page.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ray_surgeon.report import record as reports
from ray_surgeon.report.events import (
    CHECK,
    Event,
    ProgressReport,
    is_json_log,
    place_of,
)
from ray_surgeon.report.findings import exports_by_round, faster, megabytes
from ray_surgeon.report.html_report import page
from ray_surgeon.report.plots import quality_figure, save
from ray_surgeon.report.wording import duration, perplexity, sentence
from ray_surgeon.storage import files

LOG_WIDTH = 140
"""Columns of tables in a log, which has no width itself."""
_LINE_EVERY_S = 30.0
"""Time between lines of a log about a step that has not ended."""
_MOST_TO_COME = 8
"""Steps to come that the live table names."""
_LOGGER = logging.getLogger("ray_surgeon")
"""Gets all lines, so that Python callers can redirect them."""


def new_console() -> Console:
    """Return a console for standard output, with a fixed width if that is no terminal."""
    if sys.stdout.isatty():
        return Console()
    return Console(width=LOG_WIDTH)


class Display:
    """``with Display(console, name) as display:`` shows the steps of a run.

    On a terminal, and in a notebook with ipywidgets, steps that have ended are lines, and a live
    table below them has the running step with a bar and the steps to come. A log gets one line for
    every step, and one for its progress every 30 s.

    All lines go to the logger ``ray_surgeon`` at level INFO, too. If it has a handler for them,
    they are not printed here. Without a console nothing is printed.
    """

    def __init__(self, console: Console | None, name: str) -> None:
        """Prepare the table of a run of this name."""
        self.console = console or Console(quiet=True)
        self.is_live = _can_draw_table(console)
        self.also: Callable[[Event], object] = lambda _: None  # called with every event
        self._name = name
        self._running: ProgressReport | None = None
        self._last_check = ""  # what the running step's last check has found
        self._num_done = 0
        self._began_s = time.monotonic()
        self._step_began_s = self._began_s
        self._last_line_s = self._began_s
        self._live = Live(
            console=self.console, transient=True, get_renderable=self._live_table
        )

    def __enter__(self) -> Display:
        """Show the live table, if the console can draw it."""
        if self.is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the live table; the lines of steps stay."""
        self._live.stop()

    def note(self, text: str) -> None:
        """Show a line."""
        if self._logs(text):
            return
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def __call__(self, news: Event | ProgressReport) -> None:
        """Show the end of a step, or its progress."""
        if isinstance(news, Event):
            self._show_event(news)
            self.also(news)
            return
        if _step_of(news) != _step_of(self._running):
            self._step_began_s = time.monotonic()
            self._last_check = ""
        self._running = news
        waited_s = time.monotonic() - self._last_line_s
        if not self.is_live and waited_s > _LINE_EVERY_S:
            self.note(news.line)

    def _show_event(self, event: Event) -> None:
        if event.step == CHECK:
            self._last_check = sentence(event.step, event.facts)
        else:
            self._num_done += 1
            self._running = _next_of(self._running)
            self._step_began_s = time.monotonic()
            self._last_check = ""
        if not self.is_live:
            self.note(event.line)
        elif not self._logs(event.line) and event.step != CHECK:
            table = _new_grid()
            _add_event(table, event)
            self.console.print(table)
            self._live.refresh()

    def _logs(self, text: str) -> bool:
        """Send a line to the logger, and return whether a handler has taken it."""
        self._last_line_s = time.monotonic()
        _LOGGER.info("%s", text)
        return _is_redirected()

    def _live_table(self) -> Table:
        """Return the table of the running step and the steps to come."""
        table = _new_grid()
        running = self._running
        if running is None:
            return table
        table.add_row(
            Text("[>]", style="bold cyan"),
            place_of(running.shot, running.num_shots),
            Text(running.step, style="bold"),
            duration(time.monotonic() - self._step_began_s),
            self._progress_of(running),
        )
        num_rows = max(2, min(_MOST_TO_COME, self.console.height - 8))
        shown = running.to_come[:num_rows]
        for step, shot in shown:
            place = place_of(shot, running.num_shots)
            table.add_row(Text("[ ]"), place, step, style="dim")
        num_steps = self._num_done + 1 + len(running.to_come)
        num_left = len(running.to_come) - len(shown)
        more = f"{num_left} more steps; " if num_left else ""
        so_far = duration(time.monotonic() - self._began_s)
        total = f"{more}{self._name}: step {self._num_done + 1} of {num_steps}, {so_far}"
        table.add_row("", "", "", "", Text(total, style="dim"))
        return table

    def _progress_of(self, running: ProgressReport) -> RenderableType:
        """Return the bar of the running step, its rate and time left, and its last check."""
        lines: list[RenderableType] = []
        if running.total:
            row = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=running.total, completed=running.done, width=20)
            row.add_row(bar, f"{running.done} of {running.total} {running.pace}")
            lines.append(row)
        if self._last_check:
            lines.append(Text(self._last_check))
        return Group(*lines)


def _next_of(running: ProgressReport | None) -> ProgressReport | None:
    """Return the report of the step that comes next; None if there is none."""
    if running is None or not running.to_come:
        return None
    (step, shot), *to_come = running.to_come
    return replace(running, step=step, shot=shot, done=0, total=0, to_come=tuple(to_come))


def _is_redirected() -> bool:
    """Whether a handler of the logger takes the lines."""
    return _LOGGER.isEnabledFor(logging.INFO) and _LOGGER.hasHandlers()


def _step_of(report: ProgressReport | None) -> tuple[str, int] | None:
    return None if report is None else (report.step, report.shot)


def _can_draw_table(console: Console | None) -> bool:
    if console is None or is_json_log() or _is_redirected():
        return False
    # in Jupyter rich draws live tables with ipywidgets
    in_notebook = console.is_jupyter and find_spec("ipywidgets")
    return bool(in_notebook) or console.is_terminal


def _new_grid() -> Table:
    """Return a table without rows, in which rows of several tables are aligned."""
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(width=3)
    grid.add_column(width=12)
    grid.add_column(width=14)
    grid.add_column(width=8, justify="right")
    grid.add_column(ratio=1)
    return grid


def _add_event(grid: Table, event: Event) -> None:
    """Add the row of a step that has ended."""
    grid.add_row(
        Text("[x]", style="green"),
        place_of(event.shot, event.num_shots),
        event.step,
        f"{event.seconds:.1f} s",
        Text(sentence(event.step, event.facts)),
    )


AGREEMENT = "agreement with the original"
"""Column of the acceptance of the original model's answers."""


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
        columns = ["round", AGREEMENT, "sparsity", *with_divergences]
        columns += [*after, "wall s", "peak memory GiB"]
    else:
        title = None
        columns = ["run", "structure", "round", AGREEMENT, "sparsity", *perplexities]
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
        dense[AGREEMENT] = "100.0%"
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
            row[AGREEMENT] = f"{shot['generation']['acceptance']:.1%}"
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
    for text, value in measured["perplexity"].items():
        shown = perplexity(value)
        row[f"perplexity {text}"] = shown
        if "divergence" in measured:  # the dense model does not diverge from itself
            shown = f"{shown} ({measured['divergence'][text]:.3f})"
        row[f"perplexity {text} (KL)"] = shown
    return row


_LATER = {"left_whole", "plan", "retries", "source"}
"""Entries that reports of earlier versions lack."""


def _read_report(run: str) -> dict[str, Any]:
    uri = files.join(run, "report.json")
    if not files.exists(uri):
        raise ValueError(f"there is no {uri}; give run directories with a report.json")
    record = files.read_json(uri)
    parts = reports.RunReport({}, {}, {}, 1).as_record().keys() - _LATER
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
                f"{len(record['shots'])} of {reports.num_shots(record)} rounds, "
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

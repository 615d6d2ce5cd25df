"""What a person sees of a running job: bars in a terminal and in Jupyter, lines in a log."""

from __future__ import annotations

import importlib.util
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ray_surgeon.report.events import Event, Moment

LOG_WIDTH = 140
"""Columns of tables in a log, which has no width of its own."""
_LINE_EVERY_S = 30.0
"""How often a log gets a line about a step that has not ended."""


def new_console() -> Console:
    """Return a console for standard output, which in a log has a fixed width."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


class Display:
    """``with Display(console, name) as display:`` shows events and moments.

    Without a console it shows nothing.
    """

    def __init__(self, console: Console | None, name: str) -> None:
        """Prepare the bars."""
        self._console = console
        self._name = name
        live = bool(console and (console.is_terminal or (console.is_jupyter and _has_widgets())))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rest]}"),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, console=console, disable=not live, transient=True)
        self._run_bar = self._bars.add_task(name, total=None, rest="shots")
        self._step_bar = self._bars.add_task("", total=None, rest="")
        self._last_line_s = time.monotonic()
        self._live = live

    def __enter__(self) -> Display:
        """Show the bars."""
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bars."""
        self._bars.stop()

    def note(self, text: str) -> None:
        """Show a line."""
        self._last_line_s = time.monotonic()
        if self._console is not None:
            self._bars.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def __call__(self, news: Event | Moment) -> None:
        """Show the end of a step, or how far it has come."""
        if isinstance(news, Event):
            self.note(news.line)
            resumed_after = int(news.facts.get("resumed_after_shot", 0))
            done = {"load": resumed_after, "commit": news.shot}.get(news.step)
            if done is not None:
                self._bars.update(self._run_bar, completed=done, total=news.num_shots)
            return
        rate = "" if news.tokens_per_s is None else f"{news.tokens_per_s:.0f} tokens/s "
        left = "" if news.left_s is None else f"{news.left_s:.0f} s left"
        self._bars.update(
            self._step_bar,
            description=news.step,
            completed=news.done,
            total=news.total or None,
            rest=f"{news.unit} {rate}{left}",
        )
        if not self._live and time.monotonic() - self._last_line_s > _LINE_EVERY_S:
            self.note(news.line)


def _has_widgets() -> bool:
    """Whether bars can be drawn in Jupyter, for which rich needs ipywidgets."""
    return importlib.util.find_spec("ipywidgets") is not None

"""Reports as one HTML file that needs nothing else: no network, no scripts, its figures inside."""

from __future__ import annotations

import functools
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.report.plots import (
    acceptance_figure,
    inline_svg,
    perplexity_figure,
    run_figures,
    save,
)
from ray_surgeon.report.progress import is_complete, num_shots
from ray_surgeon.storage import files

_TEMPLATE = Path(__file__).with_name("html_report.html.jinja")
_PAGE_EVERY_S = 60.0


@dataclass(frozen=True)
class Step:
    """One step over all shots.

    It has seconds on the wall, of all CPUs, and busy ones of each worker, and the fraction they
    were busy.
    """

    name: str
    wall_s: float
    cpu_s: float
    busy_s: list[float]
    efficiency: float


@dataclass(frozen=True)
class _Run:
    """A report.json as the template wants it."""

    record: Mapping[str, Any]
    anchor: str
    drawn: Mapping[str, str] | None = None

    @property
    def num_shots(self) -> int:
        return num_shots(self.record)

    @property
    def is_complete(self) -> bool:
        return is_complete(self.record)

    @property
    def dense_bytes(self) -> int:
        return int(self.record["parameters"]["before"]) * int(
            getattr(torch, self.record["spec"]["model"]["dtype"]).itemsize
        )

    @functools.cached_property
    def figures(self) -> Mapping[str, str]:
        return self.drawn or {
            name: inline_svg(figure, f"{self.anchor}-{name}")
            for name, figure in run_figures(self.record).items()
        }

    @property
    def workers(self) -> list[str]:
        cluster = self.record["spec"]["cluster"]
        return [
            f"shard {s}, replica {r}"
            for r in range(cluster["num_replicas"])
            for s in range(cluster["num_shards"])
        ]

    @functools.cached_property
    def steps(self) -> list[Step]:
        shots = self.record["shots"]
        names = dict.fromkeys(name for shot in shots for name in shot["seconds"])
        return [
            _step(name, [shot for shot in shots if name in shot["seconds"]], len(self.workers))
            for name in names
        ]

    @property
    def wall_s(self) -> float:
        return sum(step.wall_s for step in self.steps)

    @property
    def damping(self) -> list[dict[str, Any]]:
        return [
            event | {"shot": shot["index"]}
            for shot in self.record["shots"]
            for event in shot["damping_used"]
        ]

    @property
    def has_generation(self) -> bool:
        return has_generation([self.record])

    @property
    def spec_yaml(self) -> str:
        return yaml.safe_dump(dict(self.record["spec"]), sort_keys=False)

    @property
    def identity_yaml(self) -> str:
        return yaml.safe_dump(
            {key: self.record[key] for key in ("fingerprints", "environment")}, sort_keys=False
        )


def _step(name: str, shots: Sequence[Mapping[str, Any]], num_workers: int) -> Step:
    # shots of earlier versions do not tell
    by_shot = [shot.get("worker_seconds", {}).get(name, []) for shot in shots]
    # a run may be resumed on another number of shards
    same = [busy for busy in by_shot if len(busy) == num_workers]
    totals = [sum(busy) for busy in zip(*same, strict=True)] or [0.0]
    offered = sum(
        len(busy) * shot["seconds"][name] for busy, shot in zip(by_shot, shots, strict=True)
    )
    efficiency = sum(map(sum, by_shot)) / offered if offered else 0.0
    return Step(
        name,
        sum(s["seconds"][name] for s in shots),
        sum(s["cpu_seconds"][name] for s in shots),
        totals,
        efficiency,
    )


def has_generation(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run has compared the model's answers with the dense model's."""
    return any(shot.get("generation") for record in records for shot in record["shots"])


def excerpt(text: str, length: int | None = None) -> str:
    """Return a text of a model or a user as it may be shown.

    It is on one line, without control characters, and cut.

    Args:
        text: anything.
        length: characters that are shown, at most; None for all.
    """
    visible = "".join(
        " " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C"
    )
    line = " ".join(visible.split())
    return line if length is None or len(line) <= length else line[: length - 3].rstrip() + "..."


def page(
    records: Sequence[Mapping[str, Any]], drawn: Mapping[int, Mapping[str, str]] | None = None
) -> str:
    """Return an HTML page about one run, or about several, compared and then each.

    Args:
        records: contents of report.json; of runs that have not ended, too.
        drawn: number of a record -> its `run_figures` as `inline_svg`, where they are at hand.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    texts = list(
        dict.fromkeys(text for record in records for text in record["dense"]["perplexity"])
    )
    comparison = {}
    if len(records) > 1:
        figures = {"acceptance": acceptance_figure(records)} if has_generation(records) else {}
        figures |= {f"perplexity-{text}": perplexity_figure(records, text) for text in texts}
        comparison = {name: inline_svg(figure, f"all-{name}") for name, figure in figures.items()}
    records = [{"retries": [], **record} for record in records]
    runs = [
        _Run(record, f"run-{number + 1}", (drawn or {}).get(number))
        for number, record in enumerate(records)
    ]
    title = (
        str(records[0]["spec"]["name"])
        if len(records) == 1
        else f"{len(records)} runs of ray_surgeon"
    )
    environment.filters["excerpt"] = excerpt
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    has_answers = has_generation(records)
    return template.render(
        runs=runs, texts=texts, comparison=comparison, title=title, has_answers=has_answers
    )


class LivePage:
    """Writes report.html of a run, at most once a minute, and at the end with the plots.

    It is written when a shot is committed.
    """

    def __init__(self, run: RunDirectory) -> None:
        """Wait a minute before the first page."""
        self._run = run
        self._last_s = time.monotonic()

    def draw(self, record: Mapping[str, Any], *, final: bool) -> None:
        """Write the page, and at the end the plots.

        A failure is recorded and ignored: a drawing must not end a run of hours, and ``ray-surgeon
        report`` can make it later.
        """
        if not final and time.monotonic() - self._last_s < _PAGE_EVERY_S:
            return
        self._last_s = time.monotonic()
        try:
            figures = run_figures(record)
            drawn = {name: inline_svg(figure, name) for name, figure in figures.items()}
            files.write_text(self._run.path("report.html"), page([record], {0: drawn}))
            for name, figure in figures.items() if final else ():
                files.write_text(self._run.path("plots", f"{name}.svg"), drawn[name])
                save(figure, self._run.path("plots", f"{name}.png"))
        except Exception as error:  # whatever a plotting library raises
            self._run.add_event(
                {"step": "drawing failed", "reason": repr(error), "time": time.time()}
            )

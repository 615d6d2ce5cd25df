"""Runs a job from this process, and returns its result."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.config.sections import RaySection
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.export.folder import local_folder
from ray_surgeon.job import run_job
from ray_surgeon.preparation.inputs import Inputs
from ray_surgeon.report.display import Display
from ray_surgeon.report.events import Trackers
from ray_surgeon.report.record import family_of, has_its_files, is_complete
from ray_surgeon.report.summary import headline
from ray_surgeon.run.arguments import own_modes


@dataclass(frozen=True, repr=False)
class PruneResult:
    """A finished run.

    Attributes:
        uri: the run directory.
        report: the content of report.json.
    """

    uri: str
    report: Mapping[str, Any]

    def __repr__(self) -> str:
        """Return the name with sizes and quality, in two lines."""
        sizes, quality = headline(self.report)
        name = self.report["spec"]["name"]
        return f"PruneResult {name} in {self.uri}: {sizes}\n    {quality}"

    def _repr_html_(self) -> str:
        """Return a small table for notebooks."""
        sizes, quality = headline(self.report)
        rows = {
            "run": f"{self.report['spec']['name']} in {self.uri}",
            "size": sizes,
            "quality": quality,
        }
        cells = []
        for label, text in rows.items():
            cells.append(f"<tr><th>{label}</th><td>{html.escape(text)}</td></tr>")
        return f"<table>{''.join(cells)}</table>"

    @property
    def path(self) -> str:
        """Folder or URI of the pruned model.

        That is the last export listed in `output.exports`, not a quantised copy.

        Raises:
            ValueError: the run has no export.
        """
        return str(self._export(None)["uri"])

    @property
    def sizes(self) -> dict[float, Mapping[str, Any]]:
        """Size of a family, as in the spec -> ``perplexity``, ``exports`` and more.

        Each value is the report's record of the shot that ends at the size, with its exports.
        """
        return family_of(self.report)

    @property
    def perplexity(self) -> dict[str, tuple[float, float]]:
        """Text -> perplexity before and after."""
        before = self.report["dense"]["perplexity"]
        after = self.report["shots"][-1]["perplexity"]
        return {text: (before[text], after[text]) for text in after}

    @property
    def generation(self) -> Mapping[str, Any] | None:
        """The pruned model's answers to prompts beside the dense model's; None without them.

        Keys: ``acceptance`` (mean over the tokens of the dense model's answers of 1 minus the total
        variation between both models' distributions of the next token: how often speculative
        decoding would accept), ``agreement`` (fraction of these tokens for which both have the same
        most likely token), ``divergence`` (nats per token), ``tokens_until_departure`` (``mean``
        and ``median`` of the tokens in which both models' own answers agree from the start),
        ``not_ended`` (fraction of the answers that the dense model ended and the pruned one does
        not; None if it ended none), ``repeating`` (fraction that is caught in a loop), and
        ``example`` (``prompt``, ``dense``, ``pruned``).
        """
        generation: Mapping[str, Any] | None = self.report["shots"][-1].get("generation")
        return generation

    @property
    def sparsity(self) -> float:
        """Removed fraction of the parameters of the blocks' linears."""
        return float(self.report["shots"][-1]["sparsity"])

    def load(
        self, kind: str | None = None, *, size: float | None = None, **options: Any
    ) -> PreTrainedModel:
        """Load the pruned model by transformers.

        Args:
            kind: of the export; if not given, the last one that transformers can load, without
                quantised copies.
            size: of a family; its last size if not given.
            options: of `from_pretrained`, such as ``device_map``.

        Raises:
            ValueError: the run has no such export.
        """
        export = self._export(kind, size, for_transformers=kind is None)
        if "from_pretrained" not in export["load"]:
            raise ValueError(
                f"the export {export['kind']} is not for transformers; load another, or: "
                f"{export['load']}"
            )
        # the code beside the weights was written by the run
        trusted = "trust_remote_code=True" in export["load"]
        options = {"dtype": "auto", "trust_remote_code": trusted, **options}
        with local_folder(str(export["uri"])) as (folder, _):
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder,
                **options,
            )
        return model

    def _export(
        self,
        kind: str | None,
        size: float | None = None,
        *,
        for_transformers: bool = False,
    ) -> Mapping[str, Any]:
        """Return the last export of a kind and size.

        Without a kind, it is one of those that the spec names; without a size, of the last size.
        """
        wanted = size
        if wanted is None:
            wanted = next(reversed(self.sizes), None)
        kinds = [kind]
        if kind is None:
            kinds = self.report["spec"]["output"]["exports"]
        kinds_of_size = []
        exports: list[Mapping[str, Any]] = []
        for export in self.report["exports"]:
            if export.get("size") != wanted:
                continue
            kinds_of_size.append(export["kind"])
            is_loadable = "from_pretrained" in export["load"] or not for_transformers
            if export["kind"] in kinds and is_loadable:
                exports.append(export)
        if not exports:
            of_size = "" if size is None else f" of size {size:g}"
            raise ValueError(
                f"the run {self.uri} has no export {kind or 'for this'}{of_size}; it has "
                f"{kinds_of_size}; name one in output.exports"
            )
        return exports[-1]


def ended_before(inputs: Inputs, say: Callable[[str], None]) -> PruneResult | None:
    """Return the run with the same inputs if it has ended and its exports are there."""
    directory = RunDirectory(inputs.spec.output.uri)
    has_ended = False
    # the report may be missing or damaged
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        report = directory.report()
        has_ended = (
            report["spec"] == inputs.spec.model_dump(mode="json")
            and is_complete(report)
            and len(directory.committed_indices()) == len(report["shots"])
            and all(map(has_its_files, report["exports"]))
        )
    if not has_ended:
        return None
    say("this run has ended before, and its exports are there; nothing is done again")
    return PruneResult(directory.uri, report)


@own_modes()
def run(inputs: Inputs, display: Display, *, disconnects: bool = False) -> PruneResult:
    """Run checked inputs on Ray, or with all workers in this process.

    Args:
        inputs: checked.
        display: shows events.
        disconnects: whether to disconnect this process from Ray afterwards even if it was connected
            before.
    """
    section = inputs.spec.cluster
    directory = RunDirectory(inputs.spec.output.uri)
    with Trackers(inputs.spec.model_dump(mode="json"), display.note) as display.also:
        if isinstance(section, RaySection):
            from ray_surgeon.run import driver  # Ray is imported only if it is used

            driver.run_on_ray(inputs, display, disconnects=disconnects)
        else:
            cluster = LocalCluster(
                inputs.layout, inputs.placement, section.cpus_per_worker, section.device
            )
            with closing(cluster):
                run_job(inputs, cluster, directory, display)
    return PruneResult(directory.uri, directory.report())

"""The job spec: what a user asks for, checked before anything starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from ray_surgeon.idle_fields import idle_fields
from ray_surgeon.sections import (
    ClusterSection,
    CorrectionSection,
    CurvatureSection,
    OutputSection,
    PruningSection,
    UpdatesSection,
)
from ray_surgeon.text_sections import CalibrationSection, EvaluationSection, ModelSection, Section

_YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError)
"""PyYAML lets through what its constructors raise on values that do not fit their tags."""


class JobSpec(Section):
    """A job: one model, one method, one result."""

    version: Literal[1] = Field(description="Version of this format")
    name: str = Field(pattern="^[a-z0-9][a-z0-9.-]*$", max_length=63, description="Name of the run: lower case, digits, dots, dashes")
    model: ModelSection = Field(description="The model to prune")
    calibration: CalibrationSection = Field(description="The text whose loss the method keeps low")
    evaluation: EvaluationSection = Field(description="What the model is measured on: a list of texts, or texts and tasks")
    curvature: CurvatureSection = Field(CurvatureSection(), description="Curvature of the loss")
    pruning: PruningSection = Field(description="What is removed and how much")
    updates: UpdatesSection = Field(UpdatesSection(), description="Updates of the weights that stay")
    correction: CorrectionSection = Field(CorrectionSection(), description="Low-rank first-order corrections between the shots")
    cluster: ClusterSection = Field(ClusterSection(), description="Workers and where they run")
    output: OutputSection = Field(description="Where results go")

    @model_validator(mode="after")
    def _sections_fit(self) -> JobSpec:
        if unused := list(idle_fields(self)):
            raise ValueError(f"these fields would have no effect: {'; '.join(unused)}. Remove them")
        names = [text.name for text in self.evaluation.texts]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluation: names must differ, got {names}; rename one")
        if self.cluster.num_replicas > self.calibration.num_sequences:
            raise ValueError(
                f"cluster.num_replicas: {self.cluster.num_replicas} replicas cannot be filled by {self.calibration.num_sequences} "
                "calibration sequences; give fewer replicas or more sequences"
            )
        for i, text in enumerate(self.evaluation.texts):
            for read in (self.calibration, *self.calibration.mix):
                if text.has_own_split and text.source == read.source and text.max_tokens != read.max_tokens:
                    raise ValueError(
                        f"evaluation.{i}.max_tokens: must equal that of {text.source} in calibration, because both are cut from it and "
                        "the border between train and test would move; set both"
                    )
        return self

    @model_validator(mode="after")
    def _possible_together(self) -> JobSpec:
        pruning, updates = self.pruning, self.updates
        by_element = pruning.structure in ("element", "n_m")
        if pruning.method != "llm_surgeon" and not by_element:
            raise ValueError(f"pruning.method: {pruning.method} removes elements; set pruning.structure to element or n_m")
        if self.curvature.num_kronecker_terms > 1 and pruning.selection == "greedy":
            raise ValueError("pruning.selection: greedy needs curvature.num_kronecker_terms 1; choose one of the two")
        if self.curvature.num_kronecker_terms > 1 and by_element and updates.correlations == "full" and updates.solver == "chunks":
            raise ValueError("updates.solver: chunks needs curvature.num_kronecker_terms 1; use conjugate_gradients")
        exports = set(self.output.exports) - {"masked"}
        if exports and pruning.structure != "groups":
            raise ValueError(f"output.exports: {', '.join(sorted(exports))} needs pruning.structure groups; others leave zeros only")
        if "uniform" in exports and pruning.allocation != "uniform":
            raise ValueError("output.exports: uniform needs pruning.allocation uniform; set it, or export per_block")
        if "deci" in exports and (pruning.groups != ("ffn",) or pruning.width_multiple % 256):
            raise ValueError(
                "output.exports: deci holds widths that are multiples of 256 and all heads; set pruning.groups to [ffn] and "
                "pruning.width_multiple to 256"
            )
        if self.evaluation.tasks is not None and not self.output.exports:
            raise ValueError("evaluation.tasks: are of exports, and output.exports has none; add one, or remove tasks")
        target = pruning.target
        if target is not None and target.device == "cuda" and not self.cluster.gpus_per_worker:
            raise ValueError("pruning.target: device cuda is the first worker's GPU; set cluster.gpus_per_worker to 1")
        if self.correction.sequences_per_step > self.calibration.num_sequences:
            raise ValueError(
                f"correction.sequences_per_step: {self.correction.sequences_per_step} is more than the {self.calibration.num_sequences} "
                "calibration sequences; lower it"
            )
        return self

    @property
    def is_greedy(self) -> bool:
        """Whether rows and columns are selected greedily."""
        can_be = self.pruning.costs == "obs" and self.curvature.num_kronecker_terms == 1
        by_structure = self.pruning.structure in ("rows_columns", "rows", "columns")
        return by_structure and (self.pruning.selection == "greedy" or (self.pruning.selection is None and can_be))

    def method_fingerprint(self) -> str:
        """Return a SHA-256 over all that determines the result: not the name, the cluster, the texts evaluated or the output.

        Where the model lies does not count either; its content has a fingerprint of its own.
        """
        method = self.model_dump(
            mode="json", exclude={"name": True, "cluster": True, "evaluation": True, "output": True, "model": {"source"}}
        )
        return hashlib.sha256(json.dumps(method, sort_keys=True).encode()).hexdigest()


def parse_spec(text: str, overrides: Sequence[str] = ()) -> JobSpec:
    """Parse a job spec.

    Args:
        text: YAML or JSON.
        overrides: ``section.field=value`` each, the value being YAML; list items by number, e.g. ``evaluation.0.num_sequences=8``.

    Raises:
        ValueError: it is not YAML, or an override is malformed.
        pydantic.ValidationError: a field is wrong.
    """
    try:
        document = yaml.safe_load(text)
    except _YAML_ERRORS as error:
        raise ValueError(f"the job spec is not valid YAML: {error}; see the files in pipelines/") from error
    if not isinstance(document, dict):
        raise ValueError(f"the job spec must be a mapping of sections, got {type(document).__name__}; see the files in pipelines/")
    for override in overrides:
        _apply_override(document, override)
    return JobSpec.model_validate(document)


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not all((*parents, last)):
        raise ValueError(f"--set {override}: expected section.field=value, e.g. --set pruning.target_sparsity=0.3")
    place: Any = document
    try:
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[int(last) if isinstance(place, list) else last] = yaml.safe_load(value)
    except (TypeError, *_YAML_ERRORS) as error:
        raise ValueError(f"--set {override}: there is no such place in the spec ({error}); list items are numbered from 0") from error

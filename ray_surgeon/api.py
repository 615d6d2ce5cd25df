"""Pruning is one call: check -> plan -> start workers -> shots -> exports.

The command line is a thin shell over this.
"""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ray_surgeon.export.folder import local_folder
from ray_surgeon.maths.kronecker import KroneckerFactors
from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import check_tied, read_state, tensor_reader
from ray_surgeon.models.experts import in_memory
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.report.display import Display, new_console
from ray_surgeon.run.arguments import spec_of
from ray_surgeon.run.caller import own_modes
from ray_surgeon.run.in_memory import a_tokenizer, causal_lm, saved, without_bars
from ray_surgeon.run.inputs import Inputs, check
from ray_surgeon.run.loop import run_shots
from ray_surgeon.runtime.local import LocalCluster
from ray_surgeon.spec.base import local_path
from ray_surgeon.spec.cluster import RaySection
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import validation_message
from ray_surgeon.storage.texts import first_token


@dataclass(frozen=True)
class PruneResult:
    """A finished run.

    Attributes:
        uri: the run directory.
        report: the content of report.json.
    """

    uri: str
    report: Mapping[str, Any] = field(repr=False)

    @property
    def path(self) -> str:
        """Folder or URI of the pruned model.

        That is the last export listed in `output.exports`, not a quantised copy.

        Raises:
            ValueError: the run has no export.
        """
        return str(self._export(None)["uri"])

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

    def load(self, kind: str | None = None, **options: Any) -> PreTrainedModel:
        """Load the pruned model by transformers.

        Args:
            kind: which export; if not given, the last one that transformers loads, quantised copies
                left out.
            options: of `from_pretrained`, such as ``device_map``.

        Raises:
            ValueError: the run has no such export.
        """
        export = self._export(kind, for_transformers=kind is None)
        if "from_pretrained" not in export["load"]:
            raise ValueError(
                f"the export {export['kind']} is not for transformers; load another, or: "
                f"{export['load']}"
            )
        # the code beside the weights is ours, written by the run
        trusted = "trust_remote_code=True" in export["load"]
        with local_folder(str(export["uri"])) as (folder, _), without_bars():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, **({"dtype": "auto", "trust_remote_code": trusted} | options)
            )
        return model

    def _export(self, kind: str | None, *, for_transformers: bool = False) -> Mapping[str, Any]:
        possible = self.report["spec"]["output"]["exports"] if kind is None else [kind]
        exports = [
            export
            for export in self.report["exports"]
            if export["kind"] in possible
            and ("from_pretrained" in export["load"] or not for_transformers)
        ]
        if not exports:
            kinds = [export["kind"] for export in self.report["exports"]]
            wanted = (
                f"export {kind}"
                if kind is not None
                else "export that transformers loads"
                if for_transformers
                else "export at all"
            )
            raise ValueError(
                f"the run {self.uri} has no {wanted}; it has {kinds}; name one in output.exports"
            )
        last: Mapping[str, Any] = exports[-1]
        return last


@own_modes()
def prune(
    model: str | os.PathLike[str] | Mapping[str, Any] | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    spec: JobSpec | None = None,
    calibration: Mapping[str, Any] | None = None,
    pruning: Mapping[str, Any] | None = None,
    curvature: Mapping[str, Any] | None = None,
    correction: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    cluster: Mapping[str, Any] | None = None,
    memory: Mapping[str, Any] | None = None,
    output: str | Mapping[str, Any] | None = None,
    name: str | None = None,
    preset: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> PruneResult:
    """Prune a model.

    Args:
        model: a Hub id, a folder, an fsspec URI, the section of that name (source, dtype,
            revision), or a model in memory; not with `spec`.
        tokenizer: the tokenizer of a model in memory.
        spec: a whole job spec, in place of everything else.
        calibration: section of that name: source, num_sequences, sequence_length and more; needed
            without `spec`, unless a preset is given.
        pruning: section of that name: structure, target_sparsity and more. Needed without `spec`.
        curvature: section of that name; KFAC if not given.
        correction: section of that name; no low-rank corrections if not given.
        evaluation: texts to measure on, generation and tasks; if not given, the test part of the
            calibration text, or of Python's help and docstrings if the calibration is chosen by a
            preset or the model writes it.
        cluster: section of that name; in this process, on one CPU thread, unless it says otherwise:
            ``{"cpus_per_worker": 16}``, ``{"gpus_per_worker": 1}``, ``{"backend": "ray"}``.
        memory: section of that name; if not given, planned from the memory that the machines have.
        output: section of that name, or only its URI; if not given, below ``./runs``.
        name: of the run; if not given, made from the model's name.
        preset: ``"fast"``, ``"balanced"`` or ``"quality"``: settings of text and method, under
            those that are given here.
        resume: whether to continue a run after its last committed shot.
        progress: whether to show how far the run is, in a terminal or a notebook.

    Returns:
        The run: the pruned model's folder, the model itself by ``.load()``, and the report.

    Raises:
        ValueError: something cannot work. The message names the field, what was found, and the
            remedy. It is raised before anything expensive starts, except for weights that are NaN
            or infinite, and for targets that only costs can refuse.
        FloatingPointError: a loss, factor or cost is not usable; committed shots stay.
        RuntimeError: the run failed otherwise; committed shots stay.
    """
    sections = {
        "calibration": calibration,
        "pruning": pruning,
        "curvature": curvature,
        "correction": correction,
        "evaluation": evaluation,
        "cluster": cluster,
        "memory": memory,
        "output": output,
        "name": name,
        "preset": preset,
    }
    given_sections = {key: value for key, value in sections.items() if value is not None}
    source = local_path(model)
    if isinstance(source, Mapping) and "source" not in source:
        raise ValueError(
            f"model: got a {type(source).__name__} of {', '.join(map(str, list(source)[:3]))}; "
            "give its source, or a causal LM"
        )
    if not (source is None or isinstance(source, str | Mapping)):
        source = causal_lm(source)
    if spec is None:
        try:
            spec = spec_of(source, tokenizer, given_sections)
        except ValidationError as error:
            derived = () if evaluation is not None else ("evaluation",)
            raise ValueError(
                validation_message(error, "what prune() was given", derived)
            ) from error
    elif not isinstance(spec, JobSpec):
        raise ValueError(
            f"spec: got a {type(spec).__name__}; give "
            "ray_surgeon.parse_spec(Path('spec.yaml').read_text())"
        )
    elif model is not None or tokenizer is not None or given_sections:
        raise ValueError(
            "spec: it says everything already; leave model, tokenizer and the sections out"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ExitStack() as held:
        if isinstance(source, PreTrainedModel):
            held.enter_context(
                saved(source, a_tokenizer(tokenizer), spec.model.source, spec.output.uri)
            )
        inputs = check(spec, resume=resume)
        display = held.enter_context(Display(new_console() if progress else None, inputs.spec.name))
        for line in inputs.notes:
            display.note(line)
        return ended_before(inputs, display.note) or run(inputs, display)


def ended_before(inputs: Inputs, say: Callable[[str], None]) -> PruneResult | None:
    """Return the run of these very inputs if it has ended, with its exports.

    Nothing is to be done then.
    """
    directory = RunDirectory(inputs.spec.output.uri)
    report = directory.report_if_finished(inputs.spec.model_dump(mode="json"))
    if report is None:
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
    if isinstance(section, RaySection):
        from ray_surgeon.run import driver  # Ray is imported only if it is used

        if not driver.is_connected():
            display.note(f"running on {driver.connect_to_ray(inputs)}")
            disconnects = True
        try:
            driver.run_on_ray(inputs, display)
        finally:
            if disconnects:
                driver.disconnect()
    else:
        cluster = LocalCluster(
            inputs.layout, inputs.placement, section.cpus_per_worker, section.device
        )
        try:
            run_shots(inputs, cluster, directory, display)
        finally:
            cluster.close()
    return PruneResult(directory.uri, directory.report())


@own_modes()
def curvature(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]] | torch.Tensor | Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    linears: Sequence[str] | None = None,
    label_seed: int | None = None,
) -> dict[str, KroneckerFactors]:
    """Gather A and G of the linears of a model in memory, for research.

    Args:
        model: a causal LM of a supported family; its weights are not changed.
        sequences: token sequences, or texts if there is a tokenizer.
        tokenizer: for texts. Each text becomes one sequence; it begins with BOS if the tokenizer
            itself begins a text with it.
        linears: names of the linears wanted, e.g. ``model.layers.0.mlp.down_proj``; all if not
            given. Factors of their roles, here of every block's ``down_proj``, and of what shares
            their inputs are gathered on the model's device, and no others.
        label_seed: seed of labels drawn from the model (sampled Fisher); None takes the text's own
            (empirical Fisher).

    Returns:
        Name -> sums A [C, C] of a a^T and G [R, R] of g g^T over all tokens, with the number of
        tokens; a bias is the last input, whose value is 1. Those of an expert are over the tokens
        that are routed to it. Source: docs/method.md, section 1.

    Raises:
        ValueError: the family is not supported, the model has no such linear, or there is no
            sequence of two tokens or more.
    """
    model = causal_lm(model)
    tokenizer = None if tokenizer is None else a_tokenizer(tokenizer)
    layout = ModelLayout.of(model.config)
    if sequences is None or isinstance(sequences, str) or isinstance(linears, str):
        raise ValueError("sequences and linears: give lists, also of a single text or name")
    if isinstance(sequences, Mapping):
        raise ValueError(
            f"sequences: got a {type(sequences).__name__} of {', '.join(map(str, sequences))}; "
            "give one of these, such as input_ids"
        )
    if any(weight.is_inference() for weight in model.parameters()):
        raise ValueError(
            "model: its weights were made in torch.inference_mode, in which nothing has gradients; "
            "load it outside"
        )
    linears = None if linears is None else list(linears)
    if unknown := [name for name in linears or () if name not in layout.shapes]:
        raise ValueError(
            f"linears: the model has no {', '.join(unknown)}; it has for example "
            f"{', '.join(list(layout.shapes)[:7])}"
        )
    if isinstance(sequences, torch.Tensor) and (
        sequences.ndim != 2 or sequences.is_floating_point()
    ):
        raise ValueError(
            f"sequences: a tensor must be [num_sequences, T] integers, got {list(sequences.shape)} "
            f"{sequences.dtype}"
        )
    tokens = [_tokens(number, sequence, tokenizer) for number, sequence in enumerate(sequences)]
    if not tokens or min(len(ids) for ids in tokens) < 2:
        raise ValueError(
            "sequences: each must have two tokens or more, because the last one predicts nothing; "
            "give longer ones"
        )
    most = model.config.vocab_size
    longest = model.config.max_position_embeddings if layout.family.positions else None
    if not all(0 <= token < most for ids in tokens for token in ids):
        raise ValueError(
            f"sequences: a token is not one of the model's {most}; give those of its own tokenizer"
        )
    if longest is not None and max(len(ids) for ids in tokens) > longest:
        raise ValueError(
            f"sequences: one has {max(len(ids) for ids in tokens)} tokens, the model takes at most "
            f"{longest}; cut it"
        )
    state = model.state_dict()
    check_tied(layout, state, read_state(state), "the model")
    read_stored = tensor_reader(layout, state, read_state(state), "the model")
    # they are never written, so they are read where they are: in the model
    where = Stores(weights="disk")
    shard = ModelShard(
        layout,
        BlockRange(0, layout.num_blocks, layout.num_blocks),
        model.dtype,
        model.device,
        where,
    )

    def read(name: str) -> torch.Tensor:
        of_expert = in_memory(layout.family, state, name)
        return read_stored(name) if of_expert is None else of_expert

    shard.load(read)
    shard.start_curvature(
        only=None if linears is None else frozenset(layout.shapes[name].role for name in linears)
    )
    runner = BlockRunner(shard)
    for number, ids in enumerate(tokens):
        batch = torch.tensor([ids], device=model.device)
        generator = (
            None if label_seed is None else torch.Generator().manual_seed(label_seed + number)
        )
        (hidden,) = runner.forward(number, batch)
        _, gradient, _ = runner.loss(hidden, batch, generator)
        runner.backward(number, [gradient])
    shard.stop_curvature()
    return {
        name: shard.own_factors(name).dense()
        for name in (layout.shapes if linears is None else linears)
    }


def _tokens(number: int, sequence: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if isinstance(sequence, str):
        if tokenizer is None:
            raise ValueError("tokenizer: texts need one; give it, or sequences of tokens")
        first = first_token(tokenizer)
        return [
            *([] if first is None else [first]),
            *tokenizer(sequence, add_special_tokens=False)["input_ids"],
        ]
    try:
        return [operator.index(token) for token in sequence]
    except TypeError as error:
        raise ValueError(
            f"sequences[{number}]: got {reprlib.repr(sequence)}; give a list of integers, or a "
            "text and the tokenizer"
        ) from error

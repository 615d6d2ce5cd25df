"""The Python interface. Pruning is one call: check -> plan -> start workers -> shots -> exports.

The command line is a thin layer over it.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_surgeon.config.base import REASON, local_path, refusing
from ray_surgeon.config.job import JobSpec, parse_spec
from ray_surgeon.data.texts import first_token, tokens_of
from ray_surgeon.errors import ConfigError
from ray_surgeon.maths.kronecker import KroneckerFactors
from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import reader_of
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.loss import Predicted
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.preparation.inputs import check
from ray_surgeon.report.display import Display, new_console
from ray_surgeon.report.summary import warnings
from ray_surgeon.run.arguments import (
    a_tokenizer,
    causal_lm,
    own_modes,
    save,
    spec_of,
    towards,
)
from ray_surgeon.run.result import PruneResult, ended_before, run

__all__ = [
    "JobSpec",
    "KroneckerFactors",
    "PruneResult",
    "curvature",
    "parse_spec",
    "prune",
    "recover",
]


@own_modes()
def prune(  # noqa: PLR0913  the sections of a job spec, by name
    model: str | os.PathLike[str] | Mapping[str, Any] | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    sparsity: float | str | None = None,
    spec: JobSpec | None = None,
    calibration: Mapping[str, Any] | None = None,
    pruning: Mapping[str, Any] | None = None,
    curvature: Mapping[str, Any] | None = None,
    recovery: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    cluster: Mapping[str, Any] | None = None,
    memory: Mapping[str, Any] | None = None,
    output: str | Mapping[str, Any] | None = None,
    name: str | None = None,
    preset: str | None = None,
    time: str | float | None = None,
    resume: bool = False,
    progress: bool = True,
) -> PruneResult:
    """Prune a model: ``prune("Qwen/Qwen3-8B", sparsity=0.2)``.

    Whatever is not given is chosen for the model and this machine, as for a job spec of version 3.

    Args:
        model: a Hub id, a folder, an fsspec URI, the section of that name (source, dtype,
            revision), or a model in memory; not with `spec`.
        tokenizer: the tokenizer of a model in memory.
        sparsity: fraction of the parameters of the blocks' linears to remove, 0.2 or ``"20%"``;
            short for ``pruning={"target_sparsity": ...}``.
        spec: a complete job spec, in place of all other arguments but the last two.
        calibration: section of that name: source, num_sequences, sequence_length and more; a mix
            of texts that suits the model if not given.
        pruning: section of that name: structure, target_sparsity and more; if not given, channels
            of feed-forward layers, or whole experts of a mixture, the same number in every block.
        curvature: section of that name; KFAC if not given.
        recovery: section of that name; as long as there is time for if not given; none if null.
        evaluation: texts to measure on, generation and tasks; if not given, the test part of the
            calibration text, or of Python's help and docstrings if there is none.
        cluster: section of that name; in this process, on its GPU or all its CPUs, unless it says
            otherwise: ``{"cpus_per_worker": 16}``, ``{"backend": "ray"}``.
        memory: section of that name; if not given, planned from the memory that the machines have.
        output: section of that name, or only its URI; if not given, below ``./runs``.
        name: of the run; if not given, made from the model's name.
        preset: ``"fast"`` (4 minutes), ``"balanced"`` (12 minutes, the default) or ``"quality"``
            (an hour). Settings that are given here override what is chosen for it.
        time: how long the job may take, as ``"30min"`` or in seconds, in place of a preset.
        resume: whether to continue a run after its last committed shot.
        progress: whether to show the progress of the run, in a terminal or a notebook.

    Returns:
        The run: the pruned model's folder, the model itself by ``.load()``, and the report.

    Raises:
        ValueError: an argument is not valid. The message names the field, the problem, and the
            remedy. It is raised before anything expensive starts, except for weights that are NaN
            or infinite, and for targets that can be checked only once costs are known.
        FloatingPointError: a loss, factor or cost is not usable; committed shots stay.
        RuntimeError: the run failed otherwise; committed shots stay.
    """
    sections = {
        "name": name,
        "preset": preset,
        "time": time,
        "calibration": calibration,
        "pruning": pruning,
        "curvature": curvature,
        "recovery": recovery,
        "evaluation": evaluation,
        "cluster": cluster,
        "memory": memory,
        "output": output,
    }
    sections = {key: section for key, section in sections.items() if section is not None}
    source = local_path(model)
    if not (source is None or isinstance(source, str | Mapping)):
        source = causal_lm(source)
    if spec is None:
        spec = spec_of(source, tokenizer, sections, sparsity)
    elif not isinstance(spec, JobSpec):
        raise ConfigError(
            field="spec",
            found=f"got a {type(spec).__name__}",
            remedy="give ray_surgeon.parse_spec(Path('spec.yaml').read_text())",
        )
    elif model is not None or tokenizer is not None or sections or sparsity:
        raise ConfigError(
            field="spec",
            found="it says everything already",
            remedy="leave all other arguments out",
        )
    if isinstance(source, PreTrainedModel):
        save(source, a_tokenizer(tokenizer), spec.model.source, spec.output.uri)
    inputs = check(spec, resume=resume)
    console = new_console() if progress else None
    with Display(console, inputs.spec.name) as display:
        for line in inputs.notes:
            display.note(line)
        try:
            result = ended_before(inputs, display.note) or run(inputs, display)
        except KeyboardInterrupt:
            display.note(
                "interrupted; continue with the same call and resume=True "
                f"(output={inputs.spec.output.uri!r})"
            )
            raise
        for warning in warnings(result.report):
            display.note(f"warning: {warning}")
    return result


def recover(
    export: str | os.PathLike[str] | Mapping[str, Any],
    teacher: str | os.PathLike[str] | Mapping[str, Any],
    *,
    resume: bool = False,
    progress: bool = True,
    **sections: Any,
) -> PruneResult:
    """Train a model that was pruned before, here or elsewhere, towards another one.

    Args:
        export: a Hub id, a folder, an fsspec URI, or the section ``model``.
        teacher: a Hub id, a folder, an fsspec URI, or a section like ``model``. The teacher may be
            of any supported family and size, with the same vocabulary.
        resume: as in `prune`.
        progress: as in `prune`.
        sections: as in `prune`: recovery, calibration, evaluation, cluster, memory, output, name
            and preset.

    Returns:
        The run; its report calls the teacher the dense model.

    Raises:
        ValueError: see `prune`.
        FloatingPointError: see `prune`.
        RuntimeError: see `prune`.
    """
    spec = spec_of(local_path(export), None, towards(teacher, sections))
    return prune(spec=spec, resume=resume, progress=progress)


@own_modes()
def curvature(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]] | Tensor | Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    linears: Sequence[str] | None = None,
    label_seed: int | None = None,
) -> dict[str, KroneckerFactors]:
    """Gather the Kronecker factors A and G of linears of a model in memory, for research.

    Args:
        model: a causal LM of a supported family; its weights are not changed.
        sequences: token sequences, or texts if there is a tokenizer.
        tokenizer: for texts. Each text becomes one sequence; it begins with BOS if the tokenizer
            itself begins a text with it.
        linears: names of the linears, e.g. ``model.layers.0.mlp.down_proj``; all if not given. Only
            factors for their roles (here every block's ``down_proj``) and for linears with the same
            inputs are gathered on the model's device.
        label_seed: seed of labels drawn from the model (sampled Fisher); None takes the text's own
            labels (empirical Fisher).

    Returns:
        Name -> sums A [C, C] of a a^T and G [R, R] of g g^T over all tokens, with the number of
        tokens; a bias is the last input, whose value is 1. A linear of a mixture of experts sees
        the tokens that are routed to it. Source: docs/method.md, section 1.

    Raises:
        ValueError: the family is not supported, the model has no such linear, or there is no
            sequence of two tokens or more.
    """
    model = causal_lm(model)
    layout = ModelLayout.of(model.config)
    names = list(layout.shapes if linears is None else linears)
    unknown = [name for name in names if name not in layout.shapes]
    if unknown:
        raise ValueError(
            f"linears: the model has no {', '.join(unknown)}; it has for example "
            f"{list(layout.shapes)[:7]}"
        )
    windows = _token_ids(sequences, tokenizer, layout)
    # weights are never written, so they are read directly from the model
    stores = Stores(weights="disk")
    blocks = BlockRange(0, layout.num_blocks, layout.num_blocks)
    shard = ModelShard(layout, blocks, model.dtype, model.device, stores)
    shard.load(reader_of(layout, model))
    shard.start_curvature(only=frozenset(layout.shapes[name].role for name in names))
    runner = BlockRunner(shard)
    for number, ids in enumerate(windows):
        batch = torch.tensor([ids], device=model.device)
        generator = None
        if label_seed is not None:
            generator = torch.Generator().manual_seed(label_seed + number)
        (hidden,) = runner.forward(number, batch)
        _, gradient, _ = runner.loss(hidden, Predicted(batch, generator=generator))
        runner.backward(number, [gradient])
    shard.stop_curvature()
    return {name: shard.own_factors(name).dense() for name in names}


def _token_ids(
    sequences: Sequence[Sequence[int]] | Tensor | Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None,
    layout: ModelLayout,
) -> list[list[int]]:
    """Return the token ids of sequences or texts.

    Args:
        sequences: token sequences, or texts if there is a tokenizer.
        tokenizer: for texts.
        layout: of the model.

    Raises:
        ValueError: the model cannot take a sequence, or there is none.
    """
    if sequences is None or isinstance(sequences, str | Mapping):
        raise ValueError(
            f"sequences: got a {type(sequences).__name__}; give a list of sequences, "
            "such as input_ids"
        )
    config = layout.config
    longest = math.inf  # rotary embeddings have no limit
    if layout.family.positions:
        longest = config.max_position_embeddings
    windows = []
    for number, sequence in enumerate(sequences):
        windows.append(_ids_of(number, sequence, tokenizer))
    if not windows:
        raise ValueError(
            "sequences: there is none; give at least one of two tokens or more"
        )
    for number, ids in enumerate(windows):
        # one token alone predicts nothing
        smallest = min(ids, default=-1)
        largest = max(ids, default=-1)
        if not (
            2 <= len(ids) <= longest and smallest >= 0 and largest < config.vocab_size
        ):
            raise ValueError(
                f"sequences[{number}]: {len(ids)} tokens from {min(ids, default=None)} "
                f"to {max(ids, default=None)}; the model takes 2 to {longest} tokens, "
                f"from 0 to {config.vocab_size - 1}; use its own tokenizer, and cut them"
            )
    return windows


def _ids_of(
    number: int,
    sequence: Any,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[int]:
    if isinstance(sequence, str):
        if tokenizer is None:
            raise ValueError("tokenizer: texts need one; give it, or sequences of tokens")
        first = first_token(a_tokenizer(tokenizer))
        ids = list(tokens_of(tokenizer, sequence))
        if first is not None:
            ids = [first, *ids]
        return ids
    problem = f"sequences[{number}]: got {reprlib.repr(sequence)} ({REASON})"
    with refusing(
        problem,
        "give a list of integers, or a text and the tokenizer",
        TypeError,
    ):
        ids = [operator.index(token) for token in sequence]
    return ids

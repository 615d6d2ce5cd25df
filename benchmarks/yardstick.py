"""Compares the measures of a run by how well they predict a pruned model's HumanEval score.

``python -m benchmarks.yardstick HUMANEVAL.json=RUN...`` takes files written by ``python -m
benchmarks.humaneval``, one for each family of models, with the dense model first. RUN is a run
directory of that dense model; its answers and its evaluation texts are used to measure all models
of the file. Perplexities are included because they are the usual measure.

Spearman's rank correlation with HumanEval is computed in every family, without its dense model, and
over all pruned models, with HumanEval and perplexities relative to those of the dense model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers import AutoConfig

from benchmarks.humaneval import named_folders
from benchmarks.peers import inputs_of_spec
from ray_surgeon.config.sections import ModelSection
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.distributed.dense_states import ANSWERS
from ray_surgeon.distributed.passes import num_counted, sequence_losses
from ray_surgeon.distributed.placement import place
from ray_surgeon.distributed.weights import ModelRecipe, load
from ray_surgeon.distributed.worker import DenseStates, Worker
from ray_surgeon.evaluation.answers import (
    Answers,
    measure_answers,
    read_answers,
    remember_answers,
)
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.loss import perplexity_of

Measures = dict[str, float]  # name -> value, for one model

LOWER_IS_BETTER = ("divergence", "not ended", "repeating", "perplexity")
"""Prefixes of the names of measures that are lower for better models."""


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Return the ranks of values [n], from 1; equal values share their mean rank."""
    found = np.asarray(values, dtype=np.float64)
    below = (found[:, None] > found[None, :]).sum(axis=1)
    equal = (found[:, None] == found[None, :]).sum(axis=1)
    return np.asarray(below + (equal + 1) / 2, dtype=np.float64)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two sequences; NaN if one of them is constant."""
    x, y = (ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else math.nan


def loaded(folder: str, dtype: str, num_threads: int) -> LocalCluster:
    """Load a checkpoint on one worker in this process."""
    layout = ModelLayout.of(AutoConfig.from_pretrained(folder))
    cluster = LocalCluster(layout, place(layout, 1, 1), num_threads)
    recipe = ModelRecipe(ModelSection.model_validate({"source": folder, "dtype": dtype}))
    cluster.run_all(load, recipe, False, cluster.stores)
    return cluster


def states_of(worker: Worker) -> DenseStates:
    """Return the dense model's states that a worker stores."""
    return worker.state.dense_states


def measures_of(
    cluster: LocalCluster,
    answers: Answers,
    max_tokens: int,
    texts: Mapping[str, NDArray[np.int64]],
) -> Measures:
    """Return the measures that a run takes of its model.

    Args:
        cluster: cluster with the model; its worker stores the dense model's states.
        answers: answers of the dense model.
        max_tokens: largest number of tokens of an answer.
        texts: windows of each evaluation text.
    """
    found = measure_answers(cluster, answers, max_tokens)
    measures = {
        "acceptance": found.acceptance,
        "agreement": found.agreement,
        "divergence": found.divergence,
        "tokens until departure": float(np.mean(found.departures)),
        "not ended": found.not_ended or 0.0,
        "repeating": found.repeating,
    }
    for name, windows in texts.items():
        loss = sum(sequence_losses(cluster, windows)) / num_counted(windows, None)
        measures[f"perplexity {name}"] = perplexity_of(loss)
    return measures


def family_of(
    humaneval: Path, run: Path, dtype: str, num_threads: int
) -> list[dict[str, Any]]:
    """Return the name, passed tasks and measures of every model of a file.

    Args:
        humaneval: file written by `benchmarks.humaneval`, with outcomes.
        run: run directory of the first model of the file, which is dense.
        dtype: dtype of weights and activations.
        num_threads: number of threads of torch.

    Raises:
        ValueError: a checkpoint is missing, or the run has no answers.
    """
    records = json.loads(humaneval.read_text())["models"]
    folders = named_folders(
        [f"{record['name']}={record['folder']}" for record in records]
    )
    if not (run / "answers.json").exists():
        raise ValueError(
            f"{run} has no answers.json; give a run with evaluation.generation"
        )
    inputs = inputs_of_spec(run, [], run)
    answers = read_answers(str(run / "answers.json"))
    section = inputs.spec.evaluation.generation
    max_tokens = getattr(section, "max_new_tokens", max(map(len, answers.answers)))
    states: DenseStates | None = None
    found: list[dict[str, Any]] = []
    for record in records:
        cluster = loaded(folders[record["name"]], dtype, num_threads)
        if states is None:
            remember_answers(cluster, answers)
            (states,) = cluster.run_all(states_of)
        else:
            (worker,) = cluster.workers.values()
            worker.state.dense_states[ANSWERS] = states[ANSWERS]
        measures = measures_of(cluster, answers, max_tokens, inputs.texts)
        cluster.close()
        passed = sum(outcome == "passed" for outcome in record["outcomes"].values())
        entry = {
            "family": humaneval.stem,
            "name": record["name"],
            "passed": passed,
            **measures,
        }
        found.append(relative(entry, found[0] if found else entry))
        sys.stdout.write(json.dumps(found[-1]) + "\n")
        sys.stdout.flush()
    return found


def relative(entry: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's entry with its passed tasks and perplexities relative to the dense model."""
    found = dict(entry)
    found["share of dense"] = entry["passed"] / max(1, dense["passed"])
    for name in entry:
        if name.startswith("perplexity"):
            found[f"{name}, relative"] = entry[name] / dense[name]
    return found


def correlations(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return each measure's rank correlation with HumanEval, positive if both improve together."""
    known = ("family", "name", "passed", "share of dense")
    names = [name for name in entries[0] if name not in known]
    tasks = [entry["share of dense"] for entry in entries]
    found = {}
    for name in names:
        sign = -1 if name.startswith(LOWER_IS_BETTER) else 1
        found[name] = sign * rank_correlation([entry[name] for entry in entries], tasks)
    return found


def table(families: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a table of correlations by family and over all models, the best measure first."""
    of_family = {name: correlations(entries[1:]) for name, entries in families.items()}
    over_all = correlations(
        [entry for entries in families.values() for entry in entries[1:]]
    )
    names = [
        name
        for name in over_all
        if not name.startswith("perplexity") or name.endswith("relative")
    ]
    columns = [*of_family, "all"]
    lines = [f"| measure | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in sorted(names, key=lambda name: -np.nan_to_num(over_all[name], nan=-1)):
        values = [*(found[name] for found in of_family.values()), over_all[name]]
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all models, and write the results and the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.yardstick", description=__doc__
    )
    add = parser.add_argument
    add("families", nargs="+", metavar="HUMANEVAL.json=RUN")
    add("--out", type=Path, default=Path("runs/yardstick.json"))
    add("--dtype", default="bfloat16")
    add("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    families = {}
    for given in arguments.families:
        humaneval, equals, run = given.partition("=")
        if not equals:
            parser.error(f"{given}: expected HUMANEVAL.json=RUN")
        found = family_of(Path(humaneval), Path(run), arguments.dtype, arguments.threads)
        families[Path(humaneval).stem] = found
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(families, indent=2) + "\n")
    sys.stdout.write(table(families))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Quantises a dense and a pruned model in several ways and prints a Markdown table.

The table shows sizes, perplexities, and divergences from the model before it was quantised.

``python -m benchmarks.quantised FOLDER`` prunes channels of feed-forward layers as the quickstart
does, but without corrections, and quantises the dense and the pruned model: to the nearest numbers,
by GPTQ, and by both sides. ``--set`` changes the quickstart's spec. For example, groups of 128 do
not divide SmolLM2's columns; ``--set 'model={source: FOLDER}'`` measures another model. ``--peer
PYTHON`` adds the GPTQ of llm-compressor (0.14), run by the Python of another environment on the
same windows. The pruned model has a second divergence, from the dense model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ray_surgeon
from benchmarks.peers import add_settings, quickstart
from ray_surgeon.config.job import JobSpec
from ray_surgeon.config.sections import ModelSection, QuantizeSection
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.distributed.placement import place
from ray_surgeon.distributed.weights import ModelRecipe, load
from ray_surgeon.export.folder import PrunedModel, run_reload
from ray_surgeon.export.quantise import quantise
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.preparation.inputs import Inputs, check
from ray_surgeon.storage.sources import open_model

Rounding = Literal["nearest", "gptq", "both_sides"]
Texts = Mapping[str, NDArray[np.int64]]
States = tuple[Tensor, dict[str, list[Tensor]]]
"""Weight of the head and hidden states of a model; see `states_of`."""
WAYS: tuple[Rounding, ...] = ("nearest", "gptq", "both_sides")


def states_of(folder: str, texts: Texts) -> States:
    """Return the head's weight, and its inputs [T, d] for every window of every text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options: dict[str, Any] = {"output_hidden_states": True, "use_cache": False}
    states: dict[str, list[Tensor]] = {name: [] for name in texts}
    with torch.no_grad():
        for name, windows in texts.items():
            for window in torch.from_numpy(windows):
                out = model(window[None], logits_to_keep=1, **options)
                states[name].append(out.hidden_states[-1][0])
    return model.lm_head.weight.detach(), states


def divergences(folder: str, reference: States, texts: Texts) -> dict[str, float]:
    """Return the mean KL divergence from a reference to a checkpoint, in nats per token."""
    head, states = states_of(folder, texts)
    head_before, before = reference
    means = {}
    for name in texts:
        values = []
        for own, other in zip(states[name], before[name], strict=True):
            own_log = (own[:-1] @ head.T).log_softmax(dim=-1)
            other_log = (other[:-1] @ head_before.T).log_softmax(dim=-1)
            values.append(
                float((other_log.exp() * (other_log - own_log)).sum(dim=-1).mean())
            )
        means[name] = sum(values) / len(values)
    return means


def row(
    name: str,
    folder: str,
    section: QuantizeSection,
    inputs: Inputs,
    target: Path,
    references: Sequence[States],
) -> dict[str, Any]:
    """Quantise a checkpoint and return its row of the table.

    The references are the states of the checkpoint and, if it is pruned, of the dense model.
    """
    layout = ModelLayout.of(AutoConfig.from_pretrained(folder))
    cluster = LocalCluster(layout, place(layout, 1, 1), 2)
    model = ModelSection(source=folder)
    cluster.run_all(load, ModelRecipe(model), False, cluster.stores)
    pruned = PrunedModel(
        cluster, layout, model, facts_of(layout), inputs.calibration, inputs.texts
    )
    begun_s = time.monotonic()
    found = quantise(pruned, {"uri": folder, "widths": []}, str(target), section)
    wall_s = time.monotonic() - begun_s
    about = {"model": name, "scheme": section.scheme, "wall_s": wall_s}
    if section.has_groups:
        about |= {"group_size": section.columns_together, "rounding": section.rounding}
    return about | found | compared(target, references, inputs.texts)


def compared(target: Path, references: Sequence[States], texts: Texts) -> dict[str, Any]:
    """Return the divergences from each reference for every text."""
    found = [divergences(str(target), reference, texts) for reference in references]
    return {"divergence": {text: [of_one[text] for of_one in found] for text in texts}}


def row_of_peer(
    name: str,
    folder: str,
    size: int,
    python: Path,
    inputs: Inputs,
    target: Path,
    references: Sequence[States],
) -> dict[str, Any]:
    """Return the row of llm-compressor's GPTQ; see `row`."""
    tokens = target.with_suffix(".npy")
    np.save(tokens, inputs.calibration)
    request = {
        "folder": folder,
        "tokens": str(tokens),
        "target": str(target),
        "group_size": size,
    }
    begun_s = time.monotonic()
    script = str(Path(__file__).with_name("llm_compressor.py"))
    subprocess.run(
        [str(python), script], input=json.dumps(request), text=True, check=True
    )
    about = {
        "model": name,
        "scheme": "w4a16",
        "rounding": "llm-compressor",
        "group_size": size,
    }
    about["wall_s"] = time.monotonic() - begun_s
    about["size_bytes"] = sum(
        path.stat().st_size for path in target.glob("*.safetensors")
    )
    texts = {text: tokens.tolist() for text, tokens in inputs.texts.items()}
    about["perplexity"] = run_reload(
        str(target), {"texts": texts, "num_threads": torch.get_num_threads()}
    )
    return about | compared(target, references, inputs.texts)


def facts_of(layout: ModelLayout) -> dict[str, Any]:
    """Return the facts of `PrunedModel` for a checkpoint as it is: every row is kept."""
    linears = [{"name": s.name, "rows_kept": s.num_rows} for s in layout.linears]
    return {"last": {"linears": linears}}


def _all(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of perplexities, with divergences in brackets."""
    texts = list(rows[0]["perplexity"])
    lines = ["| model | weights | MB | seconds | " + " | ".join(texts) + " |"]
    lines.append("|---|---|---:|---:|" + "---:|" * len(texts))
    for line in rows:
        weights = line["scheme"]
        if "rounding" in line:
            weights += f", groups of {line['group_size']}, {line['rounding']}"
        values = [
            f"{line['perplexity'][text]:.3f} ({_all(line['divergence'][text])})"
            for text in texts
        ]
        cells = [
            line["model"],
            weights,
            f"{line['size_bytes'] / 1e6:.1f}",
            f"{line['wall_s']:.0f}",
        ]
        lines.append("| " + " | ".join(cells + values) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write FOLDER/quantised.json and the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantised",
        description="Compare ways to round weights.",
    )
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 64], help="of groups"
    )
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="of rounding"
    )
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="of llm-compressor")
    parser.add_argument("--eight", action="store_true", help="also int8, fp8 and w8a16")
    left_out = parser.add_mutually_exclusive_group()
    left_out.add_argument(
        "--dense", action="store_true", help="leave the pruned model out"
    )
    left_out.add_argument(
        "--pruned", action="store_true", help="leave the dense model's rows out"
    )
    add_settings(parser)
    arguments = parser.parse_args(argv)
    overrides = ["model.dtype=float32", "calibration.num_sequences=72", *arguments.set]
    document = quickstart(overrides)
    run = str(arguments.folder / "pruned")
    document |= {"recovery": None, "output": {"uri": run, "exports": ["uniform"]}}
    document["pruning"] = document["pruning"] | {
        "width_multiple": max(64, *arguments.sizes)
    }
    spec = JobSpec.model_validate(document)
    inputs = check(spec, resume=False, dry_run=True)
    models = {"dense": str(open_model(spec.model).small_files_folder())}
    if not arguments.dense:
        result = ray_surgeon.prune(spec=spec)
        models[f"pruned {result.sparsity:.2%}"] = result.report["exports"][0]["uri"]
    sections = [
        QuantizeSection(scheme="w4a16", group_size=size, rounding=way)
        for size in arguments.sizes
        for way in arguments.ways
    ]
    if arguments.eight:
        sections += [QuantizeSection(scheme="int8"), QuantizeSection(scheme="fp8")]
        sections.append(QuantizeSection(scheme="w8a16", group_size=arguments.sizes[0]))
    rows: list[dict[str, Any]] = []
    references: list[States] = []  # shared by all roundings; the model's own come first
    for name, folder in models.items():
        references = [states_of(folder, inputs.texts), *references]
        if name == "dense" and arguments.pruned:
            continue
        places = (
            arguments.folder / f"{name.partition(' ')[0]}-{n}" for n in itertools.count()
        )
        lines = [partial(row, name, folder, section) for section in sections]
        if arguments.peer:
            peer = partial(row_of_peer, name, folder, python=arguments.peer)
            lines += [partial(peer, size=size) for size in arguments.sizes]
        for line, target in zip(lines, places, strict=False):
            rows.append(line(inputs=inputs, target=target, references=references))
            (arguments.folder / "quantised.json").write_text(
                json.dumps(rows, indent=2) + "\n"
            )
            sys.stderr.write(table(rows[-1:]))
    sys.stdout.write(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

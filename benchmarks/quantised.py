"""SmolLM2-135M pruned and quantised against quantised alone, as a Markdown table.

It has bytes and perplexities.

``python -m benchmarks.quantised FOLDER`` prunes channels of feed-forward layers to every sparsity,
as the quickstart does but without corrections, quantises the dense and the pruned models in the
same ways, and evaluates all of them. ``--set`` changes the quickstart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import ray_surgeon
from benchmarks.peers import without_own_text
from ray_surgeon.export.folder import Pruned
from ray_surgeon.export.for_engines import export_quantised
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.run.inputs import Inputs, check
from ray_surgeon.runtime.cluster import LocalCluster
from ray_surgeon.runtime.placement import place
from ray_surgeon.runtime.weights import ModelRecipe, load
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import parse_spec
from ray_surgeon.spec.sections import ModelSection, QuantizeSection
from ray_surgeon.storage.sources import open_model

SCHEMES = (("int8", None), ("fp8", None), ("w4a16", 64), ("w4a16", 32))


def row(
    name: str, folder: str, scheme: str, size: int | None, inputs: Inputs, target: Path
) -> dict[str, Any]:
    """Quantise a folder and return its line; four bits are rounded by the calibration text."""
    section = QuantizeSection.model_validate({"scheme": scheme, "group_size": size})
    layout = ModelLayout.of(AutoConfig.from_pretrained(folder))
    cluster = LocalCluster(layout, place(layout, 1, 1), 2)
    model = ModelSection(source=folder)
    if size is not None:
        cluster.run_all(load, ModelRecipe(model), False, cluster.stores)
    pruned = Pruned(cluster, inputs.layout, model, {}, inputs.calibration, inputs.texts)
    uniform = {"uri": folder, "widths": []}
    found = export_quantised(pruned, uniform, str(target), section)
    return {"model": name, "scheme": scheme + (f", groups of {size}" if size else ""), **found}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write FOLDER/quantised.json and the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantised", description="Compare pruned and quantised models."
    )
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument(
        "--sparsities",
        type=float,
        nargs="+",
        default=[0.1, 0.1875],
        help="of the parameters of the blocks' linears",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.field=value",
        help="of the quickstart; repeatable",
    )
    arguments = parser.parse_args(argv)
    overrides = ["model.dtype=float32", *arguments.set]
    document = without_own_text(
        parse_spec(Path("pipelines/quickstart.yaml").read_text(), overrides)
    )
    rows: list[dict[str, Any]] = []
    inputs: Inputs | None = None
    for sparsity in arguments.sparsities:
        run = arguments.folder / f"pruned-{sparsity:g}"
        output = {"uri": str(run), "exports": ["uniform"]}
        pruning = document["pruning"] | {
            "target_sparsity": sparsity,
            "num_shots": 1,
            "width_multiple": 64,
        }
        spec = JobSpec.model_validate(
            document | {"recovery": None, "output": output, "pruning": pruning}
        )
        if inputs is None:
            inputs = check(spec, resume=False, dry_run=True)
            dense = str(open_model(spec.model).small_files_folder())
            rows += [
                row("dense", dense, *how, inputs, arguments.folder / f"dense-{i}")
                for i, how in enumerate(SCHEMES)
            ]
        result = ray_surgeon.prune(spec=spec)
        if len(rows) == len(SCHEMES):
            before = result.report["dense"]["perplexity"]
            rows.insert(
                0,
                {
                    "model": "dense",
                    "scheme": "float32",
                    "size_bytes": 4 * result.report["parameters"]["before"],
                    "perplexity": before,
                },
            )
        uniform = result.report["exports"][0]
        after = result.report["shots"][-1]["perplexity"]
        name = f"pruned {result.sparsity:.2%}"
        rows.append(
            {
                "model": name,
                "scheme": "float32",
                "size_bytes": uniform["size_bytes"],
                "perplexity": after,
            }
        )
        rows += [
            row(name, uniform["uri"], *how, inputs, run / f"quantised-{i}")
            for i, how in enumerate(SCHEMES)
        ]
    texts_named = list(rows[0]["perplexity"])
    lines = [
        "| model | weights | MB | " + " | ".join(texts_named) + " |",
        "|---|---|---:|" + "---:|" * len(texts_named),
    ]
    for line in rows:
        values = " | ".join(f"{line['perplexity'][text]:.3f}" for text in texts_named)
        lines.append(
            f"| {line['model']} | {line['scheme']} | {line['size_bytes'] / 1e6:.1f} | {values} |"
        )
    (arguments.folder / "quantised.json").write_text(json.dumps(rows, indent=2) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

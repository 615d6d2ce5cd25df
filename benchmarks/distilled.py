"""Compares our recovery with TRL's distillation of the same export, as a Markdown table.

``python -m benchmarks.distilled EXPORT TEACHER FOLDER --trl ENVIRONMENT/bin/python`` trains a
pruned model, an ordinary folder of transformers, towards its dense one: all weights, in one
process, on the first windows of a stream of Python's texts. TRL's `GKDTrainer` runs in the given
environment in mixed precision, as usual: float32 weights, products in bfloat16. It receives
prepared windows; ours are read and tokenized during the training. One function measures both.
Seconds are those of the training; ours include the checks and the trials of rates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

import ray_surgeon
from benchmarks.peers import load, measure, states
from ray_surgeon.config.job import JobSpec
from ray_surgeon.config.schedule import NO_PRUNING
from ray_surgeon.data.texts import load_tokenizer
from ray_surgeon.preparation.inputs import Inputs, check
from ray_surgeon.recovery.recovery import stream_of
from ray_surgeon.run.arguments import towards

TEXTS = [
    {"source": "python-docs", "weight": 0.1},
    {"source": "python-docstrings", "weight": 0.2},
    {"source": "python-code", "weight": 1.0},
]
LENGTH = 512
PER_STEP = 2
RATES = (2e-5, 1e-4)
"""TRL's default learning rate, and one five times as high."""

_TRL = r"""
import json, sys, time
import numpy as np, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

request = json.load(sys.stdin)
torch.set_num_threads(request["num_threads"])
windows = np.load(request["windows"])


def collate(rows):
    tokens = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


trainer = GKDTrainer(
    model=AutoModelForCausalLM.from_pretrained(request["export"], dtype=torch.float32),
    teacher_model=AutoModelForCausalLM.from_pretrained(request["teacher"], dtype=torch.bfloat16),
    args=GKDConfig(
        output_dir=request["target"],
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        learning_rate=request["rate"],
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=request["per_step"],
        gradient_checkpointing=False,
        max_length=windows.shape[1],
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=8,
        disable_tqdm=True,
    ),
    data_collator=collate,
    processing_class=AutoTokenizer.from_pretrained(request["export"]),
    train_dataset=Dataset.from_dict({"input_ids": windows.tolist()}),
)
start = time.monotonic()
trainer.train()
seconds = time.monotonic() - start
trainer.model.to(torch.bfloat16).save_pretrained(request["target"])
json.dump({"seconds": seconds}, open(request["target"] + "/trained.json", "w"))
"""
"""Program for TRL's environment, which trains the model given on standard input."""


def by_us(arguments: argparse.Namespace) -> tuple[JobSpec, dict[str, Any]]:
    """Return the job of our training and its report; start the job if it does not exist."""
    uri = arguments.folder / "ours"
    sections: dict[str, Any] = {
        "recovery": {
            "rank": "all",
            "num_tokens": arguments.tokens,
            "sequences_per_step": PER_STEP,
            "texts": TEXTS,
        },
        "calibration": {
            "source": "python-docstrings",
            "num_sequences": 16,
            "sequence_length": LENGTH,
        },
        "evaluation": [
            {"name": text, "source": text, "num_sequences": 12, "sequence_length": LENGTH}
            for text in ("python-docs", "python-docstrings", "python-code")
        ],
        "cluster": {"backend": "local", "cpus_per_worker": arguments.threads},
        "output": {"uri": str(uri), "exports": ["uniform"]},
    }
    model = {"source": str(arguments.export), "dtype": "bfloat16"}
    teacher = {"source": str(arguments.teacher), "dtype": "bfloat16"}
    spec = JobSpec.model_validate(
        {"version": 2, "name": "ours", "model": model} | towards(teacher, sections)
    )
    written = uri / "report.json"
    if not written.exists():
        ray_surgeon.prune(spec=spec, resume=uri.exists())
    return spec, json.loads(written.read_text())


def windows_of(spec: JobSpec, inputs: Inputs, folder: Path) -> NDArray[np.int64]:
    """Return the training windows [num_sequences, LENGTH] of the job."""
    section = spec.recovery
    assert section is not None
    stream = stream_of(section, NO_PRUNING, LENGTH, load_tokenizer(folder, str(folder)))
    assert stream is not None
    count = section.num_steps(LENGTH) * PER_STEP
    windows = replace(stream, held=inputs.text.held).windows()
    return np.stack(list(itertools.islice(windows, count)))


def by_trl(
    arguments: argparse.Namespace, windows: Path, rate: float
) -> tuple[Path, float]:
    """Return the folder trained by TRL, and the seconds; train it if it does not exist."""
    target = arguments.folder / f"trl-{rate:g}"
    written = target / "trained.json"
    if not written.exists():
        request = {
            "export": str(arguments.export),
            "teacher": str(arguments.teacher),
            "windows": str(windows),
            "target": str(target),
            "rate": rate,
            "per_step": PER_STEP,
            "num_threads": arguments.threads,
        }
        command = [str(arguments.trl), "-c", _TRL]
        subprocess.run(command, input=json.dumps(request), text=True, check=True)
    return target, float(json.loads(written.read_text())["seconds"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table."""
    texts = list(rows[0]["divergence"])
    header = ["", *texts, "s"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        measured = zip(
            row["divergence"].values(), row["perplexity"].values(), strict=True
        )
        values = [
            f"{divergence:.3f} / {perplexity:.2f}" for divergence, perplexity in measured
        ]
        lines.append(
            [row["name"], *values, "" if row["s"] is None else f"{row['s']:.0f}"]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def loaded(folder: Path) -> PreTrainedModel:
    """Return a model in bfloat16, the dtype of all measurements."""
    return load(folder, "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Train with both programs, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distilled", description=__doc__
    )
    add = parser.add_argument
    add("export", type=Path, help="the pruned model")
    add("teacher", type=Path, help="the dense one")
    add("folder", type=Path, help="output folder")
    add("--trl", type=Path, required=True, help="Python of an environment with TRL 1.16")
    add("--tokens", type=int, default=65_536, help="%(default)s")
    add("--rates", nargs="+", type=float, default=RATES, help="of TRL; %(default)s")
    add("--threads", type=int, default=2, help="%(default)s")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    spec, report = by_us(arguments)
    windows = arguments.folder / "windows.npy"
    inputs = check(spec, resume=True, dry_run=True)
    np.save(windows, windows_of(spec, inputs, arguments.export))
    ours = arguments.folder / "ours/export/uniform"
    models: list[tuple[str, Path, float | None]] = [("pruned", arguments.export, None)]
    models.append(("ours", ours, report["shots"][-1]["seconds"]["recovery"]))
    for rate in arguments.rates:
        models.append((f"TRL, {rate:g}", *by_trl(arguments, windows, rate)))
    dense = states(loaded(arguments.teacher), inputs, inputs.texts)
    rows = list[dict[str, Any]]()
    for name, folder, seconds in models:
        perplexity, divergence = measure(loaded(folder), inputs, dense)
        rows.append(
            {
                "name": name,
                "perplexity": perplexity,
                "divergence": divergence,
                "s": seconds,
            }
        )
    sys.stdout.write(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

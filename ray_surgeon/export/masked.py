"""The `masked` export: the dense model with zeros where structures were removed. No gain in size or speed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_surgeon import storage
from ray_surgeon.cluster.messages import SavedFile
from ray_surgeon.cluster.protocol import Cluster
from ray_surgeon.cluster.steps import logits
from ray_surgeon.cluster.transport import decode
from ray_surgeon.models.gguf import convert_gguf
from ray_surgeon.sources import SMALL_FILES, ModelSource, open_model

_NUM_COMPARED_TOKENS = 64
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}
"""Largest difference of logits by dtype, relative to the largest logit: what another order of sums may do, and no more."""

_MODEL_CARD = """---
library_name: transformers
base_model: {source}
tags: [pruning, llm-surgeon]
---
# {name}

{source}, pruned by The LLM Surgeon (arXiv 2312.17244): {sparsity:.2%} of the parameters of the decoder blocks' linears are
zero ({structure}). The tensors keep their shapes: **no gain in size or speed**.

| text | perplexity before | after |
|---|---|---|
{rows}

Load: `AutoModelForCausalLM.from_pretrained(folder)`. What was kept is in `masks-*.safetensors` of the last shot
of the run (1 = kept).
"""


def export_masked(cluster: Cluster, source: ModelSource, uri: str, tokens: NDArray[np.int64], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write a Hugging Face folder, reload it in a fresh process, and compare logits.

    Args:
        cluster: with the pruned weights.
        source: the dense model, whose tokenizer and configuration go along.
        uri: folder to write.
        tokens: [T] a sequence to compare on.
        facts: for the model card; see `RunReport.model_card_facts`.

    Returns:
        The export's entry in the report.

    Raises:
        RuntimeError: the fresh process cannot load it.
    """
    num_shards = cluster.placement.num_shards
    name = f"model-{{shard:05d}}-of-{num_shards:05d}.safetensors" if num_shards > 1 else "model.safetensors"
    saved = cluster.run_all("save", uri, name, linears_only=False, masks=None)
    files: list[SavedFile] = [file for worker in saved for file in worker]
    if num_shards > 1:
        weight_map = {key: file.uri.rpartition("/")[2] for file in files for key in file.keys}
        total = sum(file.size_bytes for file in files)
        storage.write_json(storage.join(uri, "model.safetensors.index.json"), {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_small_files(source, uri, str(facts["dtype"]))
    rows = "\n".join(f"| {text} | {before:.3f} | {after:.3f} |" for text, (before, after) in facts["perplexity"].items())
    card = _MODEL_CARD.format(source=source.source, name=facts["name"], sparsity=facts["sparsity"], structure=facts["structure"], rows=rows)
    storage.write_text(storage.join(uri, "README.md"), card)
    difference = reload_difference(cluster, uri, tokens[:_NUM_COMPARED_TOKENS], _TOLERANCE[str(facts["dtype"])])
    return {"kind": "masked", "uri": uri, "size_bytes": sum(f.size_bytes for f in files), "reload_max_logit_difference": difference}


def _write_small_files(source: ModelSource, uri: str, dtype: str) -> None:
    dense = open_model(source, convert_gguf)
    for name in SMALL_FILES:
        if name in dense.names and name != "config.json":
            storage.put_file(storage.join(uri, name), dense.fetch(name))
    config = json.loads(dense.fetch("config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    storage.write_json(storage.join(uri, "config.json"), config | {"dtype": dtype})


def reload_difference(cluster: Cluster, uri: str, tokens: NDArray[np.int64], tolerance: float) -> float:
    """Return the largest difference between the workers' logits and those of the export in a fresh process.

    Raises:
        RuntimeError: the fresh process fails, and its last lines are shown; or the logits differ by more than `tolerance`
            times the largest of them.
    """
    here = decode(logits(cluster, [int(t) for t in tokens]), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        for name in storage.list_names(uri):
            storage.download(storage.join(uri, name), folder / name)
        tokens_file, logits_file = Path(scratch) / "tokens.json", Path(scratch) / "logits.safetensors"
        tokens_file.write_text(json.dumps([int(t) for t in tokens]))
        command = [sys.executable, "-m", "ray_surgeon.export.reload", str(folder), str(tokens_file), str(logits_file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise RuntimeError(f"the export {uri} cannot be loaded by transformers:\n{tail}")
        there = storage.read_tensors(str(logits_file))["logits"]
    difference = float((here - there).abs().max())
    if not difference <= tolerance * float(here.abs().max()):
        raise RuntimeError(f"the export {uri} loads, but its logits differ from the workers' by {difference:g}; do not use it")
    return difference

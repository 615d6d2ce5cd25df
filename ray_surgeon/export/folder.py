"""A Hugging Face folder: written by the workers, reloaded in a fresh process, its logits compared with theirs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_surgeon import storage
from ray_surgeon.cluster.alone import run_alone
from ray_surgeon.cluster.messages import SavedFile
from ray_surgeon.cluster.protocol import Cluster
from ray_surgeon.cluster.steps import logits
from ray_surgeon.cluster.transport import decode
from ray_surgeon.models.gguf import convert_gguf
from ray_surgeon.sources import SMALL_FILES, ModelSource, open_model

NUM_COMPARED_TOKENS = 64

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}
"""Largest difference of logits by dtype, relative to the largest logit: what another order of sums may do, and no more."""


def write_weights(cluster: Cluster, uri: str, *, cut_out: bool, masks: bool, left_out: tuple[str, ...] = ()) -> int:
    """Have every shard write its file, and an index if there are several. Returns the bytes of all weights.

    Args:
        cluster: with the pruned weights.
        uri: folder.
        cut_out: see `ShardWorker.save`.
        masks: whether to write the masks too, beside the weights.
        left_out: see `ShardWorker.save`.
    """
    num_shards = cluster.placement.num_shards
    part = f"-{{shard:05d}}-of-{num_shards:05d}" if num_shards > 1 else ""
    masks_name = f"masks{part}.safetensors" if masks else None
    options: dict[str, Any] = {"linears_only": False, "masks": masks_name, "cut_out": cut_out, "left_out": left_out}
    saved = cluster.run_all("save", uri, f"model{part}.safetensors", **options)
    files: list[SavedFile] = [f for worker in saved for f in worker if f.uri.rpartition("/")[2].startswith("model")]
    if num_shards > 1:
        weight_map = {key: file.uri.rpartition("/")[2] for file in files for key in file.keys}
        total = sum(file.size_bytes for file in files)
        storage.write_json(storage.join(uri, "model.safetensors.index.json"), {"metadata": {"total_size": total}, "weight_map": weight_map})
    return sum(file.size_bytes for file in files)


def dense_document(source: ModelSource, dtype: str) -> dict[str, Any]:
    """Return the content of the dense model's config.json, with the dtype of the job."""
    document = json.loads(open_model(source, convert_gguf).fetch("config.json").read_text(encoding="utf-8"))
    document.pop("torch_dtype", None)
    return dict(document) | {"dtype": dtype}


def copy_small_files(source: ModelSource, uri: str) -> None:
    """Copy the tokenizer and the generation configuration of the dense model."""
    dense = open_model(source, convert_gguf)
    for name in SMALL_FILES:
        if name in dense.names and name != "config.json":
            storage.put_file(storage.join(uri, name), dense.fetch(name))


def download_folder(uri: str, folder: Path, *, weights: bool = True) -> None:
    """Copy the files of an export into a local folder, with or without its weights."""
    folder.mkdir()
    for name in storage.list_names(uri):
        if weights or not name.endswith(".safetensors"):
            storage.download(storage.join(uri, name), folder / name)


def reload_difference(cluster: Cluster, uri: str, tokens: NDArray[np.int64], dtype: str, *, shipped_code: bool) -> float:
    """Return the largest difference between the workers' logits and those of the export in a fresh process, which also generates.

    Args:
        cluster: with the pruned weights.
        uri: the export.
        tokens: [T] a sequence to compare on.
        dtype: of the job.
        shipped_code: whether modeling code lies beside the weights.

    Raises:
        RuntimeError: the fresh process fails; or the logits differ by more than `TOLERANCE` allows.
    """
    some = [int(t) for t in tokens[:NUM_COMPARED_TOKENS]]
    here = decode(logits(cluster, some), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        download_folder(uri, scratch / "model")
        logits_file = str(scratch / "logits")
        request = {"folder": str(scratch / "model"), "tokens": some, "logits": logits_file, "shipped_code": shipped_code}
        try:
            run_alone("ray_surgeon.export.reload", request)
        except RuntimeError as error:
            raise RuntimeError(f"the export {uri} cannot be loaded by transformers:\n{error}") from error
        there = storage.read_tensors(logits_file)["logits"]
    difference = float((here - there).abs().max())
    if not difference <= TOLERANCE[dtype] * float(here.abs().max()):
        raise RuntimeError(f"the export {uri} loads, but its logits differ from the workers' by {difference:g}; do not use it")
    return difference

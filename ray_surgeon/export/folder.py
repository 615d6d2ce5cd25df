"""A Hugging Face folder: written by the workers, reloaded in a fresh process, compared.

The fresh process loads it with transformers alone; see `fresh_process`.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.loss import perplexity_of
from ray_surgeon.models.pruned_config import blocks_left
from ray_surgeon.plan.device_resources import available_bytes
from ray_surgeon.runtime import fresh_process
from ray_surgeon.runtime.cluster import Cluster
from ray_surgeon.runtime.collectives import decode
from ray_surgeon.runtime.fresh_process import Reply, Request, run_on_worker
from ray_surgeon.runtime.passes import logits
from ray_surgeon.runtime.weights import num_files, save_weights
from ray_surgeon.spec.sections import ModelSection
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import goes_along, open_model

NUM_COMPARED_TOKENS = 64
SHIPPED = "modeling_pruned.py"
"""The file of code beside weights whose blocks differ."""
_NUM_PROMPT_TOKENS = 8
_NUM_NEW_TOKENS = 6

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.03}
"""dtype -> tolerated error of half of the tokens: the norm of the logits' difference over that of
their deviations from their mean.
"""
_WRITTEN = ("*.index.json", "model*.safetensors", "masks*.safetensors")
"""Names of the files of weights and masks."""


@dataclass(frozen=True)
class Pruned:
    """A model that the workers have, pruned or to be pruned."""

    cluster: Cluster
    layout: ModelLayout  # of the dense model
    model: ModelSection  # the dense model, whose tokenizer and configuration go along
    facts: Mapping[str, Any]  # see `RunReport.model_card_facts`
    # [num_sequences, T] tokens, by which four bits are rounded; exports are compared on the first
    calibration: NDArray[np.int64]
    texts: Mapping[str, NDArray[np.int64]]  # name -> [num_windows, T] tokens to evaluate on

    @property
    def rows_kept(self) -> dict[str, int]:
        """Linear -> rows of which something is left."""
        return {linear["name"]: linear["rows_kept"] for linear in self.facts["last"]["linears"]}

    @property
    def blocks(self) -> list[int]:
        """Numbers of the blocks of which something is left."""
        return blocks_left(self.layout, self.rows_kept)


def write_weights(
    cluster: Cluster, uri: str, blocks: Sequence[int], kind: str = "", left_out: Sequence[str] = ()
) -> int:
    """Have every shard write its files and an index in the place of others; return their bytes.

    Args:
        cluster: with the pruned weights.
        uri: folder.
        blocks: numbers of those that are left.
        kind: of an export. In one that is masked the shapes stay those of the dense model, with the
            masks in files beside; one that is per_block has the names that tensors have here.
        left_out: see `save_weights`.
    """
    # of a try that was interrupted, perhaps with another number of files
    files.remove_files(uri, _WRITTEN)
    numbers = cluster.run_all(num_files, kind == "masked")
    of_weights = _names("model", [n for n, _ in numbers])
    of_masks = _names("masks", [n for _, n in numbers])
    about = (left_out, kind != "per_block", blocks)
    futures = [
        cluster.submit(index, save_weights, uri, names, masks, *about)
        for index, names, masks in zip(cluster.placement.workers, of_weights, of_masks, strict=True)
    ]
    written = [file for of_worker in cluster.get(futures) for file in of_worker]
    by_name = {file.uri.rpartition("/")[2]: file for file in written}
    weights = {name: file for name, file in by_name.items() if name.startswith("model")}
    total = sum(file.size_bytes for file in weights.values())
    write_index(uri, {key: name for name, file in weights.items() for key in file.keys}, total)
    return total


def write_index(uri: str, file_of: Mapping[str, str], num_bytes: int) -> None:
    """Write the index of a folder's tensors, given the file of each, if there are several files."""
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of}
        files.write_json(files.join(uri, "model.safetensors.index.json"), index)


def _names(stem: str, numbers: Sequence[int]) -> list[list[str]]:
    """Return the names of the files of every worker, numbered if there are several."""
    count = sum(numbers)
    places = [f"-{i:05d}-of-{count:05d}" if count > 1 else "" for i in range(1, count + 1)]
    names = iter([f"{stem}{place}.safetensors" for place in places])
    return [list(itertools.islice(names, number)) for number in numbers]


def dense_document(model: ModelSection) -> dict[str, Any]:
    """Return the dense model's config.json, with the job's dtype, not quantised, naming no code."""
    document: dict[str, Any] = files.read_json(str(open_model(model).fetch("config.json")))
    for name in ("torch_dtype", "quantization_config", "auto_map"):
        document.pop(name, None)
    # blocks that guess further tokens are no part of the model that transformers runs, and not read
    if document.get("num_nextn_predict_layers"):
        document["num_nextn_predict_layers"] = 0
    return document | {"dtype": model.dtype}


def copy_small_files(model: ModelSection, uri: str, *, another_type: bool = False) -> None:
    """Copy the tokenizer and the generation configuration of the dense model.

    transformers chooses a tokenizer's class by the type of the model, and some classes build
    another one than the file says. So if the export is of another type than the dense model, the
    tokenizer is written as it is for the dense one.
    """
    dense = open_model(model)
    for name in filter(goes_along, dense.names):
        if name != "config.json":
            files.put_file(files.join(uri, name), dense.fetch(name))
    if not another_type:
        return
    with tempfile.TemporaryDirectory() as scratch:
        AutoTokenizer.from_pretrained(dense.small_files_folder()).save_pretrained(scratch)
        if not Path(scratch, "tokenizer.json").exists():
            return
        settings = f"{scratch}/tokenizer_config.json"
        document = files.read_json(settings) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        files.write_json(settings, document)
        for path in Path(scratch).iterdir():
            files.put_file(files.join(uri, path.name), path)


def shipped_source(config: PretrainedConfig) -> str:
    """Return the source of `SHIPPED` for the family of the dense model."""
    text = (Path(__file__).parent / "shipped" / SHIPPED).read_text(encoding="utf-8")
    return text.replace('DENSE = "llama"', f'DENSE = "{config.model_type}"')


@contextlib.contextmanager
def local_folder(uri: str, *, weights: bool = True) -> Iterator[tuple[Path, Path]]:
    """Yield an export's folder on this machine, and a scratch folder.

    A folder elsewhere is copied, as is one without its weights; the copy is gone afterwards.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if weights and files.is_local(uri):
            yield Path(files.open_filesystem(uri)[1]), scratch
            return
        folder = scratch / "model"
        folder.mkdir()
        for name in files.list_files(uri):
            if weights or not name.endswith((".safetensors", ".gguf")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                files.download(files.join(uri, name), folder / name)
        yield folder, scratch


def run_beside(cluster: Cluster, module: str, request: Request, offline: bool = True) -> Reply:
    """Run a module in a process beside the first worker; see `run_on_worker`."""
    first = cluster.placement.workers[0]
    return cluster.get([cluster.submit(first, run_on_worker, module, request, offline)])[0]


def run_for(uri: str, name: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a module of this folder in a process of its own, whose errors begin with the export."""
    try:
        return fresh_process.run_module(f"{__package__}.{name}", request)
    except RuntimeError as error:
        raise RuntimeError(f"the export {uri} cannot be written or loaded:\n{error}") from error


def run_reload(uri: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Load an export in a process of its own; `request` is the rest of what `answer` takes."""
    with local_folder(uri) as (folder, scratch):
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        most = available_bytes()
        memory = most // 2 if 1.5 * size > most else 2 * most  # all of it fits
        places = {"folder": str(folder), "offload": str(scratch), "max_memory": memory}
        return run_for(uri, "folder", {**places, **request})


def reload_difference(pruned: Pruned, uri: str) -> float:
    """Return the largest difference between the workers' logits and the export's.

    The export runs in a process of its own, which also generates.

    Args:
        pruned: the model.
        uri: the export.

    Raises:
        RuntimeError: the fresh process fails; or the logits differ by more than `agree` allows.
    """
    dtype = pruned.model.dtype
    half = pruned.layout.is_mixture and dtype != "float32"
    some = pruned.calibration[0, :NUM_COMPARED_TOKENS].tolist()
    workers_logits = decode(logits(pruned.cluster, some), torch.device("cpu"))
    with tempfile.NamedTemporaryFile() as file:
        run_reload(uri, {"tokens": some, "logits": file.name, "dtype": dtype, "half": half})
        reloaded_logits = load_file(file.name)["logits"]
    largest = float((workers_logits - reloaded_logits).abs().max())
    if not agree(reloaded_logits, workers_logits, dtype, half=half):
        problem = f"its logits differ from the workers' by {largest:g}; do not use it"
        raise RuntimeError(f"the export {uri} loads, but {problem}")
    return largest


def agree(logits: Tensor, expected: Tensor, dtype: str, *, half: bool) -> bool:
    """Whether logits [..., vocabulary] are the same but for rounding.

    Args:
        logits: of one program.
        expected: of another.
        dtype: of the model.
        half: whether half of the tokens may be off by anything: in a mixture a token may be routed
            otherwise if attention rounds otherwise.
    """
    differences = (logits - expected).norm(dim=-1)
    errors = differences / (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    allowed = TOLERANCE[dtype]
    return float(errors.median()) <= allowed and (half or float(errors.max()) <= 4 * allowed)


def _load(request: Mapping[str, Any]) -> PreTrainedModel:
    """Load a checkpoint as it is; what does not fit stays in files and comes block by block."""
    # exports have no code but ours
    options = {"dtype": "auto", "trust_remote_code": True, "output_loading_info": True}
    options |= {"device_map": "auto", "offload_folder": request["offload"]}
    options["max_memory"] = {"cpu": request["max_memory"]}
    model, info = AutoModelForCausalLM.from_pretrained(request["folder"], **options)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise RuntimeError(f"tensors do not fit the classes: {wrong}")
    loaded: PreTrainedModel = model.eval()
    return loaded


@torch.no_grad()
def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the logits [1, T, vocabulary] float32 of tokens, and generate; see `reload_difference`.

    If there are ``texts``, return the perplexity on every text instead; see `run_module`.

    Raises:
        RuntimeError: a tensor is missing or left over, or the logits with a cache are not the same.
    """
    if "texts" in request:
        return _perplexities(request)
    model = _load(request)
    tokens = torch.tensor([request["tokens"]])
    logits = model(tokens, use_cache=False).logits.float()
    prompt = tokens[:, :_NUM_PROMPT_TOKENS]
    options = dict.fromkeys(("max_new_tokens", "min_new_tokens"), _NUM_NEW_TOKENS)
    options |= {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    generated = model.generate(prompt, **options)
    again = model(generated.sequences, use_cache=False).logits
    again = again[:, prompt.shape[1] - 1 : -1].float()
    cached = torch.stack(generated.logits, dim=1).float()
    if not agree(cached, again, request["dtype"], half=request["half"]):
        largest = float((cached - again).abs().max())
        raise RuntimeError(f"with a cache the logits differ by {largest:g} from those without")
    save_file({"logits": logits.contiguous()}, request["logits"])
    return {}


def _perplexities(request: Mapping[str, Any]) -> dict[str, float]:
    """Return exp of the mean over windows of the mean loss of a token, for every text."""
    torch.set_num_threads(request["num_threads"])
    model = _load(request)
    perplexities = {}
    for name, windows in request["texts"].items():
        losses = []
        for window in torch.tensor(windows):
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
        perplexities[name] = perplexity_of(sum(losses) / len(losses))
    return perplexities

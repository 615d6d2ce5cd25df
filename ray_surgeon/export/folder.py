"""Writes a Hugging Face folder, reloads it in a fresh process, and compares the logits.

The workers write it; the fresh process, see `processes.run_module`, loads it with transformers
alone.
"""

from __future__ import annotations

import contextlib
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
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from ray_surgeon.config.sections import ModelSection
from ray_surgeon.distributed import processes
from ray_surgeon.distributed.cluster import Cluster
from ray_surgeon.distributed.collectives import decode
from ray_surgeon.distributed.memory_plan.device_resources import available_bytes
from ray_surgeon.distributed.passes import logits
from ray_surgeon.distributed.processes import Reply, Request
from ray_surgeon.distributed.weights import (
    num_files,
    parts_of_others,
    save_others,
    save_weights,
)
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.memory.transfers import backend
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.loss import perplexity_of
from ray_surgeon.models.pruned_config import blocks_left
from ray_surgeon.storage import files
from ray_surgeon.storage.sources import (
    PROCESSOR_FILES,
    ModelFiles,
    goes_along,
    is_licence,
    open_model,
)
from ray_surgeon.storage.wrapped import prefixes_of, whole_document

NUM_COMPARED_TOKENS = 64
SHIPPED = "modeling_pruned.py"
"""The file of modeling code that is written beside weights whose blocks differ in width."""
_NUM_PROMPT_TOKENS = 8
_NUM_NEW_TOKENS = 6

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.03}
"""dtype -> tolerated median over tokens of the relative error of the logits.

A token's relative error is the norm of the difference, divided by the norm of the expected logits'
deviations from their mean.
"""
MOST_ROUNDINGS = 2.0
"""Largest rounding error of the workers' logits, relative to that of the export's."""
_OF_THE_SOURCE = (
    # of config.json and generation_config.json
    "_name_or_path",
    "_model_name_or_path",
    "_commit_hash",
    "_from_model_config",
    "_attn_implementation",
    "_attn_implementation_autoset",
    # of tokenizer_config.json
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "vocab_file",
    "is_local",
    "local_files_only",
)
"""Entries of small files on their origin, which are often local paths."""
_CLEANED = ("generation_config.json", "tokenizer_config.json")
"""Small files from which these entries are removed."""
_WRITTEN = ("*.index.json", "model*.safetensors", "masks*.safetensors")
"""Name patterns of the files of weights and masks."""


@dataclass(frozen=True)
class PrunedModel:
    """A model that the workers hold, pruned or to be pruned."""

    cluster: Cluster
    layout: ModelLayout  # of the dense model
    model: ModelSection  # the dense model, whose tokenizer and configuration are copied
    facts: Mapping[str, Any]  # see `RunReport.model_card_facts`
    # [num_sequences, T] calibration tokens; exports are compared on the first sequence
    calibration: NDArray[np.int64]
    # name -> [num_windows, T] tokens to evaluate on
    texts: Mapping[str, NDArray[np.int64]]

    @property
    def rows_kept(self) -> dict[str, int]:
        """Name of each linear -> number of its rows that are not pruned."""
        linears = self.facts["last"]["linears"]
        return {linear["name"]: linear["rows_kept"] for linear in linears}

    @property
    def blocks(self) -> list[int]:
        """Numbers of the blocks that are not pruned whole."""
        return blocks_left(self.layout, self.rows_kept)


def write_weights(
    cluster: Cluster,
    uri: str,
    blocks: Sequence[int],
    kind: str = "",
    left_out: Sequence[str] = (),
    source: ModelFiles | None = None,
) -> int:
    """Have every shard write its files, replace older ones, and write their index.

    Args:
        cluster: cluster with the pruned weights.
        uri: folder.
        blocks: numbers of the blocks to write.
        kind: kind of the export. A masked export keeps the shapes of the dense model and has
            further files with its masks; a per_block export uses the names of tensors in memory.
        left_out: see `save_weights`.
        source: the language model inside of a checkpoint whose other tensors are written, too.

    Returns:
        The size of the files of weights in bytes.
    """
    # an interrupted attempt may have written another number of files
    files.remove_files(uri, _WRITTEN)
    numbers = cluster.run_all(num_files, kind == "masked")
    num_others = 0
    prefixes: Mapping[str, str] = {}
    if source is not None:
        assert source.whole is not None
        num_others = len(parts_of_others(source))
        prefixes = prefixes_of(source.whole.uri_of)
    num_weights = [num_weights for num_weights, _ in numbers]
    *weight_names, names_of_others = _file_names("model", [*num_weights, num_others])
    mask_names = _file_names("masks", [num_masks for _, num_masks in numbers])
    workers = cluster.placement.workers
    futures = []
    for index, names, masks in zip(workers, weight_names, mask_names, strict=True):
        future = cluster.submit(
            index,
            save_weights,
            uri,
            names=names,
            mask_names=masks,
            left_out=left_out,
            stored=kind != "per_block",
            blocks=blocks,
            prefixes=prefixes,
        )
        futures.append(future)
    written = list(cluster.get(futures))
    if source is not None:
        written.append(save_others(source, uri, names_of_others))
    file_of = dict[str, str]()
    total_bytes = 0
    for saved_files in written:
        for saved in saved_files:
            name = saved.uri.rpartition("/")[2]
            if name.startswith("model"):
                file_of.update(dict.fromkeys(saved.keys, name))
                total_bytes += saved.size_bytes
    write_index(uri, file_of, total_bytes)
    return total_bytes


def write_index(uri: str, file_of: Mapping[str, str], num_bytes: int) -> None:
    """Write the index of a folder's tensors if there are several files.

    Args:
        uri: folder.
        file_of: name of each tensor -> name of its file.
        num_bytes: size of all files.
    """
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of}
        files.write_json(files.join(uri, "model.safetensors.index.json"), index)


def _file_names(stem: str, numbers: Sequence[int]) -> list[list[str]]:
    """Return the names of the files of every worker, numbered if there are several.

    Args:
        stem: the beginning of all names.
        numbers: how many files each worker writes.
    """
    total = sum(numbers)
    if total == 1:
        names = [f"{stem}.safetensors"]
    else:
        numbered = range(1, total + 1)
        names = [f"{stem}-{i:05d}-of-{total:05d}.safetensors" for i in numbered]
    names_of_workers = []
    start = 0
    for number in numbers:
        names_of_workers.append(names[start : start + number])
        start += number
    return names_of_workers


def dense_document(model: ModelSection) -> dict[str, Any]:
    """Return the dense model's config.json with the job's dtype.

    The fields on quantisation, on modeling code and on the origin of the file are removed.
    """
    config = open_model(model).fetch("config.json")
    document = cleaned(files.read_json(str(config)))
    for name in ("torch_dtype", "quantization_config", "auto_map"):
        document.pop(name, None)
    # blocks for multi-token prediction are not loaded, and transformers does not run them
    for name in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        if document.get(name):
            document[name] = 0
    document["dtype"] = model.dtype
    return document


def whole_around(source: ModelFiles, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of the whole checkpoint around a pruned language model.

    Args:
        source: the dense language model inside of the checkpoint.
        document: config.json of the pruned one.
    """
    assert source.whole is not None
    whole = cleaned(files.read_json(str(source.whole.fetch("config.json"))))
    whole.pop("auto_map", None)
    return whole_document(whole, document)


def copy_processor_files(source: ModelFiles, uri: str) -> None:
    """Copy the files on how a checkpoint reads images or sound."""
    for name in source.names:
        if name in PROCESSOR_FILES:
            files.put_file(files.join(uri, name), source.fetch(name))


def cleaned(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON file without the entries on its origin."""
    return {name: value for name, value in document.items() if name not in _OF_THE_SOURCE}


def copy_small_files(
    model: ModelSection, uri: str, *, another_type: bool = False
) -> None:
    """Copy the tokenizer and the generation configuration of the dense model.

    transformers chooses a tokenizer's class by the type of the model, and some classes build a
    tokenizer that differs from the file. So if the export's type is not the dense model's, the
    tokenizer is saved as transformers loads it for the dense model.

    Args:
        model: the dense model.
        uri: folder of the export.
        another_type: whether the export's model type differs from the dense model's.
    """
    dense = open_model(model)
    for name in dense.names:
        target = files.join(uri, name)
        if name in _CLEANED:
            files.write_json(target, cleaned(files.read_json(str(dense.fetch(name)))))
        elif goes_along(name) and name != "config.json":
            files.put_file(target, dense.fetch(name))
    if not another_type:
        return
    with tempfile.TemporaryDirectory() as scratch:
        AutoTokenizer.from_pretrained(dense.small_files_folder()).save_pretrained(scratch)
        if not Path(scratch, "tokenizer.json").exists():
            return
        settings = f"{scratch}/tokenizer_config.json"
        document = cleaned(files.read_json(settings))
        document["tokenizer_class"] = "PreTrainedTokenizerFast"
        files.write_json(settings, document)
        for path in Path(scratch).iterdir():
            files.put_file(files.join(uri, path.name), path)


def copy_licences(model: ModelSection, uri: str) -> None:
    """Copy only the texts of the dense model's licence."""
    dense = open_model(model)
    for name in dense.names:
        if is_licence(name):
            files.put_file(files.join(uri, name), dense.fetch(name))


def shipped_source(config: PretrainedConfig) -> str:
    """Return the source of `SHIPPED` for the family of the dense model."""
    text = (Path(__file__).parent / "shipped" / SHIPPED).read_text(encoding="utf-8")
    return text.replace('DENSE = "llama"', f'DENSE = "{config.model_type}"')


@contextlib.contextmanager
def local_folder(uri: str, *, weights: bool = True) -> Iterator[tuple[Path, Path]]:
    """Yield an export's folder on this machine, and a scratch folder.

    A remote folder is copied, as is any folder if its weights are not wanted; the copy is removed
    afterwards.
    """
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
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


def run_on_worker(
    worker: Worker,
    module: str,
    request: Request,
    offline: bool = True,
) -> Reply:
    """Run a module in a process beside a worker; see `run_module`.

    The process sees the worker's GPU alone, or no GPU if the worker computes on a CPU.
    """
    if worker.device.type == "cpu":
        return processes.run_module(module, request, offline, "")
    # the other process cannot use freed memory that torch keeps in its cache
    backend(worker.device).empty_cache()
    return processes.run_module(module, request, offline, worker.gpu)


def run_beside(
    cluster: Cluster, module: str, request: Request, offline: bool = True
) -> Reply:
    """Run a module in a process beside the first worker; see `run_on_worker`."""
    first = cluster.placement.workers[0]
    future = cluster.submit(first, run_on_worker, module, request, offline)
    return cluster.get([future])[0]


def run_for(uri: str, name: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a module of this folder in a fresh process.

    Args:
        uri: the export, named at the beginning of errors.
        name: name of the module.
        request: argument of its `answer`.

    Raises:
        RuntimeError: the process fails.
    """
    try:
        return processes.run_module(f"{__package__}.{name}", request)
    except RuntimeError as error:
        raise RuntimeError(
            f"the export {uri} cannot be written or loaded:\n{error}"
        ) from error


def run_reload(uri: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Load an export in a fresh process; `request` has the other entries that `answer` takes."""
    with local_folder(uri) as (folder, scratch):
        size_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        free_bytes = available_bytes()
        max_memory = 2 * free_bytes  # nothing is offloaded
        if 1.5 * size_bytes > free_bytes:
            max_memory = free_bytes // 2
        places = {
            "folder": str(folder),
            "offload": str(scratch),
            "max_memory": max_memory,
            # the weights grow to twice their size, one after the other
            "has_room_for_float32": 3 * size_bytes < free_bytes,
        }
        return run_for(uri, "folder", {**places, **request})


@dataclass(frozen=True)
class Reload:
    """How the logits of an export, reloaded in a fresh process, differ from the workers'.

    An error is the median over tokens of the relative error; see `TOLERANCE`.
    """

    num_parameters: int  # of the reloaded model
    max_difference: float  # largest difference of any logit
    error: float  # between the workers' logits and the export's
    allowed_error: float
    # errors of the workers' logits, and of the export's, from those of the export in float32; None
    # for a model in float32, and for one that has no room in memory in float32
    workers_rounding: float | None
    export_rounding: float | None

    @property
    def entries(self) -> dict[str, Any]:
        """Entries of the report."""
        entries: dict[str, Any] = {
            "num_parameters": self.num_parameters,
            "reload_max_logit_difference": self.max_difference,
            "reload_error": self.error,
            "reload_allowed_error": self.allowed_error,
        }
        if self.workers_rounding is not None:
            entries["reload_workers_rounding"] = self.workers_rounding
            entries["reload_export_rounding"] = self.export_rounding
        return entries


def reload(pruned: PrunedModel, uri: str) -> Reload:
    """Compare the workers' logits with those of the export in a fresh process.

    The process also generates, and computes the logits in float32, too, if there is room. The
    workers' logits must be as close to these as the export's own, up to a factor of
    `MOST_ROUNDINGS`: then both differ by the rounding of the dtype.

    Args:
        pruned: the model.
        uri: the export.

    Raises:
        RuntimeError: the fresh process fails; or the logits differ by more than rounding.
    """
    dtype = pruned.model.dtype
    half = pruned.layout.is_mixture and dtype != "float32"
    tokens = pruned.calibration[0, :NUM_COMPARED_TOKENS].tolist()
    workers_logits = decode(logits(pruned.cluster, tokens), torch.device("cpu"))
    with tempfile.NamedTemporaryFile() as file:
        request = {"tokens": tokens, "logits": file.name, "dtype": dtype, "half": half}
        reply = run_reload(uri, request)
        reloaded = load_file(file.name)
    export_logits = reloaded["logits"]
    workers_rounding = None
    export_rounding = None
    if "in_float32" in reloaded:
        in_float32 = reloaded["in_float32"]
        workers_rounding = float(relative_errors(workers_logits, in_float32).median())
        export_rounding = float(relative_errors(export_logits, in_float32).median())
    found = Reload(
        num_parameters=reply["num_parameters"],
        max_difference=float((workers_logits - export_logits).abs().max()),
        error=float(relative_errors(export_logits, workers_logits).median()),
        allowed_error=TOLERANCE[dtype],
        workers_rounding=workers_rounding,
        export_rounding=export_rounding,
    )
    if not agree(export_logits, workers_logits, dtype, half=half):
        raise RuntimeError(
            f"the export {uri} loads, but its logits differ from the workers' "
            f"by {found.max_difference:g}; do not use it"
        )
    check_rounding(found, dtype, uri)
    return found


def check_rounding(found: Reload, dtype: str, uri: str) -> None:
    """Refuse an export whose logits differ from the workers' by more than rounding to its dtype.

    Raises:
        RuntimeError: names both errors.
    """
    if found.workers_rounding is None or found.export_rounding is None:
        return
    unit = torch.finfo(getattr(torch, dtype)).eps
    allowed = MOST_ROUNDINGS * max(unit, found.export_rounding)
    if not found.workers_rounding <= allowed:
        raise RuntimeError(
            f"the export {uri} loads, but beside its logits in float32, the workers' have a "
            f"relative error of {found.workers_rounding:.3g}, and its own in {dtype} one of "
            f"{found.export_rounding:.3g}: rounding does not explain that; do not use it"
        )


def relative_errors(logits: Tensor, expected: Tensor) -> Tensor:
    """Return the relative error of every token [...]; see `TOLERANCE`.

    Args:
        logits: [..., vocabulary].
        expected: [..., vocabulary].
    """
    deviations = expected - expected.mean(dim=-1, keepdim=True)
    errors: Tensor = (logits - expected).norm(dim=-1) / deviations.norm(dim=-1)
    return errors


def agree(logits: Tensor, expected: Tensor, dtype: str, *, half: bool) -> bool:
    """Return whether two programs' logits [..., vocabulary] differ by rounding only.

    Args:
        logits: logits of one program.
        expected: logits of another.
        dtype: dtype of the model.
        half: whether half of the tokens may differ by any amount, because rounding in the attention
            of a mixture may change the routing of a token.
    """
    errors = relative_errors(logits, expected)
    allowed = TOLERANCE[dtype]
    is_close = float(errors.median()) <= allowed
    if half:
        return is_close
    return is_close and float(errors.max()) <= 4 * allowed


def _load(request: Mapping[str, Any]) -> PreTrainedModel:
    """Load a checkpoint in its dtype; blocks that do not fit into memory are offloaded to files."""
    model, info = AutoModelForCausalLM.from_pretrained(
        request["folder"],
        dtype="auto",
        trust_remote_code=True,  # exports have no code but ours
        output_loading_info=True,
        device_map="auto",
        offload_folder=request["offload"],
        max_memory={"cpu": request["max_memory"]},
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise RuntimeError(f"tensors do not fit the classes: {wrong}")
    loaded: PreTrainedModel = model.eval()
    return loaded


@torch.no_grad()
def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the logits [1, T, vocabulary] float32 of tokens, and generate; see `reload`.

    Returns:
        The number of the model's parameters; or the perplexity of each text, if the request has
        ``texts``.

    Raises:
        RuntimeError: a tensor is missing or left over, or the logits with a cache differ from those
            without.
    """
    if "texts" in request:
        return _perplexities(request)
    model = _load(request)
    tokens = torch.tensor([request["tokens"]])
    logits = model(tokens, use_cache=False).logits.float()
    prompt = tokens[:, :_NUM_PROMPT_TOKENS]
    generated = model.generate(
        prompt,
        max_new_tokens=_NUM_NEW_TOKENS,
        min_new_tokens=_NUM_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        do_sample=False,
    )
    again = model(generated.sequences, use_cache=False).logits
    again = again[:, prompt.shape[1] - 1 : -1].float()
    cached = torch.stack(generated.logits, dim=1).float()
    if not agree(cached, again, request["dtype"], half=request["half"]):
        largest = float((cached - again).abs().max())
        raise RuntimeError(
            f"with a cache the logits differ by {largest:g} from those without"
        )
    found = {"logits": logits.contiguous()}
    if request["dtype"] != "float32" and request["has_room_for_float32"]:
        found["in_float32"] = model.float()(tokens, use_cache=False).logits.contiguous()
    save_file(found, request["logits"])
    return {"num_parameters": model.num_parameters()}


def _perplexities(request: Mapping[str, Any]) -> dict[str, float]:
    """Return the exponential of the mean loss of a token, averaged over windows, for each text."""
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

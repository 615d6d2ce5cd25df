"""Converts the arguments of prune() to a job spec, and writes models that are in memory.

A model is written to a folder from which workers can read it. The settings of the caller's process
are restored afterwards.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.config.base import absolute, local_path, refusing
from ray_surgeon.config.defaults import with_names
from ray_surgeon.config.job import JobSpec, validation_message
from ray_surgeon.errors import ConfigError
from ray_surgeon.models.families import FAMILIES, family_of
from ray_surgeon.preparation.reading import as_input_error
from ray_surgeon.storage import files


def spec_of(
    model: str | Mapping[str, Any] | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sections: Mapping[str, Any],
    sparsity: float | str | None = None,
) -> JobSpec:
    """Return the job spec for the arguments of `prune`.

    Raises:
        ValueError: an argument is not valid; names the argument, and the remedy.
    """
    document = document_of(model, tokenizer, sections, sparsity)
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        derived = () if "evaluation" in sections else ("evaluation",)
        message = validation_message(error, "what prune() was given", derived)
        raise ValueError(message) from error


def document_of(
    model: str | Mapping[str, Any] | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sections: Mapping[str, Any],
    sparsity: float | str | None = None,
) -> dict[str, Any]:
    """Return the document of the job spec for the arguments of `prune`.

    Raises:
        ValueError: see `spec_of`; fields are not checked yet.
    """
    _check_given(model, tokenizer, sections)
    if isinstance(model, str):
        model = {"source": model}
    if not (isinstance(model, PreTrainedModel) or (model and "source" in model)):
        raise ConfigError(
            field="model",
            found="give a Hub id, a folder, a URI, a model, or a section that gives its source",
            remedy="or give a whole spec",
        )
    document: dict[str, Any] = {"version": 3, "cluster": {}, **sections}
    document["model"] = model
    if isinstance(document["cluster"], Mapping):
        document["cluster"] = {"backend": "local", **document["cluster"]}
    if sparsity is not None:
        pruning = document.get("pruning", {})
        if isinstance(pruning, Mapping):
            document["pruning"] = {**pruning, "target_sparsity": sparsity}
    if isinstance(model, PreTrainedModel):
        document["model"] = {"source": "model"}
        document = with_names(document)
        uri = str(document["output"]["uri"])
        document["model"] = {
            "source": files.join(absolute(uri), "source"),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
    return document


def _check_given(
    model: str | Mapping[str, Any] | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sections: Mapping[str, Any],
) -> None:
    if isinstance(model, PreTrainedModel) == (tokenizer is None):
        raise ValueError(
            "tokenizer: belongs to a model in memory, which needs its tokenizer; that of "
            "a folder, URI or Hub id is read from there"
        )
    if "model" in sections:  # from `recover`, whose first argument has another name
        raise ConfigError(
            field="model",
            found="is the first argument",
            remedy="give the section there",
        )


def towards(teacher: Any, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a job that trains towards a teacher and prunes nothing.

    Args:
        teacher: source of the model, or its section.
        sections: of the job; the section on recovery has no teacher yet.
    """
    if not isinstance(teacher, Mapping):
        teacher = {"source": local_path(teacher)}
    recovery = sections.get("recovery") or {}
    if isinstance(recovery, Mapping):  # anything else is refused later
        recovery = {**recovery, "teacher": teacher}
    return {**sections, "pruning": None, "recovery": recovery}


_MARKER = ".from_memory"
"""A file beside a model that was in memory, with the digest of all other files.

It marks the folder as written by this program.
"""
_OF_USE = {
    "transformers_version",
    "is_local",
    "local_files_only",
    "truncation",
    "padding",
}
"""Entries of JSON files that depend on who wrote them, or on the last text."""


def causal_lm(model: Any) -> PreTrainedModel:
    """Return a model in memory without the wrapper of ``torch.compile``.

    Raises:
        ValueError: it is not a causal LM of transformers, or its family is not supported.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel):
        if model.config.model_type in FAMILIES:
            family_of(model.config)
        if isinstance(model, MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]):
            return model
    raise ConfigError(
        field="model",
        found=f"got a {type(model).__name__}",
        remedy="give a causal LM of transformers",
    )


def a_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Return a tokenizer after checking its type.

    Raises:
        ValueError: it is not a tokenizer of transformers.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer: got a {type(tokenizer).__name__}; give what AutoTokenizer returns"
        )
    return tokenizer


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    run: str,
) -> None:
    """Write a model into the folder of its run, unless the run has begun and has it.

    Raises:
        ValueError: the run has another model, the folder holds something else, or the model cannot
            be written.
    """
    config = vars(model.config).copy()
    with tempfile.TemporaryDirectory() as scratch:
        remedy = "fix that first, free space there or set TMPDIR, or prune a folder"
        kinds = (ValueError, OSError, SafetensorError)
        try:
            with refusing(
                f"model: transformers cannot save it to {scratch}", remedy, kinds
            ):
                model.save_pretrained(scratch)
                tokenizer.save_pretrained(scratch)
        finally:
            vars(model.config).update(config)  # because `save_pretrained` changes it
        written = {}
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                written[path.relative_to(scratch).as_posix()] = path
        with as_input_error(f"output.uri: cannot use {run}"):
            _put(written, source, has_begun=not RunDirectory(run).is_new())


def _put(written: Mapping[str, Path], source: str, *, has_begun: bool) -> None:
    """Write files into a folder of the run, unless it has them; see `save`."""
    digest = _digest_of(written)
    marker = files.join(source, _MARKER)
    names = set(files.list_files(source))
    is_ours = _MARKER in names and (not has_begun or files.read_text(marker) == digest)
    if names and not is_ours:
        raise ConfigError(
            field="output.uri",
            found=f"{source} holds something else, or another model or tokenizer",
            remedy="give output another folder",
        )
    if has_begun and names == {_MARKER, *written}:
        return
    files.remove_folder(source)  # from a try before the run began, or incomplete
    files.write_text(marker, digest)
    for name, path in written.items():
        files.put_file(files.join(source, name), path)


def _digest_of(written: Mapping[str, Path]) -> str:
    """Return a digest of files; entries of JSON files that vary with use are left out."""
    digest = hashlib.blake2b()
    for name, path in written.items():
        digest.update(name.encode())
        if name.endswith(".json"):
            document = json.loads(path.read_text())
            for key in _OF_USE:
                document.pop(key, None)
            digest.update(json.dumps(document, sort_keys=True).encode())
            continue
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the bars of transformers and its warnings, and show them again afterwards.

    They are about conversions and special tokens, on which the user cannot act here. Bars of
    downloads from the Hub stay.
    """
    level = transformers_logging.get_verbosity()
    has_bars = transformers_logging.is_progress_bar_enabled()
    has_hub_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # those of the Hub, too
    if has_hub_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bars:
            transformers_logging.enable_progress_bar()
        if not has_hub_bars:
            disable_progress_bars()


@contextmanager
def own_modes() -> Iterator[None]:
    """Use torch's default modes, and restore the caller's modes afterwards.

    Bars and warnings of transformers are hidden meanwhile; see `quiet_transformers`.

    The number of threads is only restored. The others are the precision of products
    (``torch.set_float32_matmul_precision``), the default device, `no_grad`, `inference_mode` and
    `autocast`.
    """
    backends: Any = torch.backends
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        for products in (backends.mkldnn.matmul, backends.cuda.matmul):
            stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
            products.fp32_precision = "ieee"  # in all threads of the process
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield

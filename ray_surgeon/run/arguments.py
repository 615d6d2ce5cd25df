"""What the arguments of prune() stand for: a job spec, and a model in memory.

The model is written where workers can read it, and its owner's process is left as it was set up.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from ray_surgeon.checkpointing.run_directory import RunDirectory
from ray_surgeon.models.families import family_of
from ray_surgeon.preparation.reading import as_input_error
from ray_surgeon.spec.base import absolute, local_path, refusing
from ray_surgeon.spec.calibration import CalibrationSection
from ray_surgeon.spec.job import JobSpec
from ray_surgeon.spec.parsing import validation_message
from ray_surgeon.spec.texts import TextSection
from ray_surgeon.storage import files

_NOT_SHARED = CalibrationSection.model_fields.keys() - TextSection.model_fields.keys()
_NOT_SHARED |= {"num_sequences", "stride", "seed", "split"}
"""Fields of a calibration text that an evaluation text does not take over."""


def spec_of(
    model: str | Mapping[str, Any] | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sections: Mapping[str, Any],
) -> JobSpec:
    """Return the job spec that the arguments of `prune` stand for.

    Raises:
        ValueError: it is none that can work; names the argument, and the remedy.
    """
    document = document_of(model, tokenizer, sections)
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        derived = () if "evaluation" in sections else ("evaluation",)
        raise ValueError(validation_message(error, "what prune() was given", derived)) from error


def document_of(
    model: str | Mapping[str, Any] | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sections: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the document of that job spec, with what follows from what is there.

    Raises:
        ValueError: see `spec_of`; fields are not checked yet.
    """
    _check_given(model, tokenizer, sections)
    document: dict[str, Any] = {"version": 2, "name": "model", "cluster": {}, "output": {}}
    document |= sections
    if isinstance(model, str):
        model = {"source": model}
    if not isinstance(model, PreTrainedModel):
        if not model or "source" not in model:
            raise ValueError(
                "model: give a Hub id, a folder, a URI, a model, or a section that gives its "
                "source; or give a whole spec"
            )
        document["name"] = sections.get("name", _name_of(str(model["source"])))
    if isinstance(document["cluster"], Mapping):
        document["cluster"] = {"backend": "local", **document["cluster"]}
    if not isinstance(document["output"], Mapping):
        document["output"] = {"uri": document["output"]}
    output = document["output"] = {"uri": f"./runs/{document['name']}", **document["output"]}
    exports = _default_exports(sections)
    if exports is not None:
        output.setdefault("exports", exports)
    if "evaluation" not in sections:
        document.update(_default_evaluation(sections))
    if isinstance(model, PreTrainedModel):
        source = files.join(absolute(str(output["uri"])), "source")
        model = {"source": source, "dtype": str(model.dtype).removeprefix("torch.")}
    return document | {"model": model}


def _check_given(
    model: str | Mapping[str, Any] | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    sections: Mapping[str, Any],
) -> None:
    if isinstance(model, PreTrainedModel) == (tokenizer is None):
        raise ValueError(
            "tokenizer: belongs to a model in memory, which needs its tokenizer; that of a folder, "
            "URI or Hub id is read from there"
        )
    if "model" in sections:  # of `recover`, whose first argument has another name
        raise ValueError("model: is the first argument; give the section there")


def _name_of(source: str) -> str:
    """Return a name of a run that the spec accepts, from the last part of a model's source."""
    last = source.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9.-]", "-", last).strip("-.")[:63] or "model"


def _default_exports(sections: Mapping[str, Any]) -> list[str] | None:
    """Return the exports of a job that names none; None for those of the spec."""
    if "pruning" in sections and sections["pruning"] is None:
        return ["uniform"]
    pruning = _fields(sections.get("pruning"))
    if pruning.get("structure") != "groups":
        return None
    if pruning.get("allocation") == "uniform":
        return ["uniform"]
    return ["per_block"]


def _default_evaluation(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section on evaluation of a job that has none; nothing for that of the spec."""
    calibration = _fields(sections.get("calibration"))
    if calibration.get("source", "auto") in ("auto", "self"):
        return {}
    return {"evaluation": [_test_part(calibration)]}


def towards(teacher: Any, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections of a job that trains towards a teacher and prunes nothing.

    Args:
        teacher: where the model is, or its section.
        sections: of the job; that on recovery has no teacher yet.
    """
    section = teacher if isinstance(teacher, Mapping) else {"source": local_path(teacher)}
    recovery = sections.get("recovery") or {}
    if isinstance(recovery, Mapping):  # what is none is refused later
        recovery = {**recovery, "teacher": section}
    return {**sections, "pruning": None, "recovery": recovery}


def _fields(section: Any) -> Mapping[str, Any]:
    """Return the fields of a section; none of what is refused later because it is no section."""
    return section if isinstance(section, Mapping) else {}


def _test_part(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluation text of a run that names none.

    It is a quarter as many windows of the test part of the calibration text.

    Raises:
        ValueError: the calibration reads that part.
    """
    if calibration.get("split", "train") == "test":
        problem = "evaluation: the calibration reads the test part of its text"
        raise ValueError(f"{problem}; name another text to measure on")
    text = {name: value for name, value in calibration.items() if name not in _NOT_SHARED}
    count = str(calibration.get("num_sequences"))
    # what is no number is refused in its own place
    quarter = max(1, int(count) // 4) if count.isdecimal() else 1
    return text | {"name": "test", "split": "test", "num_sequences": quarter}


_MARKER = ".from_memory"
"""A file beside a model that was in memory, with the digest of all others: the folder is ours."""
_OF_USE = {"transformers_version", "is_local", "local_files_only", "truncation", "padding"}
"""What a configuration or a tokenizer's file says of who wrote it, or of the last text."""


def causal_lm(model: Any) -> PreTrainedModel:
    """Return what was given as a model in memory, without the wrapper of ``torch.compile``.

    Raises:
        ValueError: it is no causal LM of transformers, or of a family that is not supported.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel):
        family_of(model.config)
        if isinstance(model, MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]):
            return model
    raise ValueError(f"model: got a {type(model).__name__}; give a causal LM of transformers")


def a_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Return what was given as a tokenizer.

    Raises:
        ValueError: it is none of transformers'.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        kind = type(tokenizer).__name__
        raise ValueError(f"tokenizer: got a {kind}; give what AutoTokenizer returns")
    return tokenizer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, run: str) -> None:
    """Write a model into the folder of its run, unless the run has begun and has it.

    Raises:
        ValueError: the run has another one, the folder holds something else, or it cannot be
            written.
    """
    config = vars(model.config).copy()
    with tempfile.TemporaryDirectory() as scratch:
        remedy = "fix that first, free space there or set TMPDIR, or prune a folder"
        kinds = (ValueError, OSError, SafetensorError)
        try:
            with refusing(f"model: transformers cannot save it to {scratch}", remedy, kinds):
                model.save_pretrained(scratch)
                tokenizer.save_pretrained(scratch)
        finally:
            vars(model.config).update(config)  # which `save_pretrained` changes
        paths = filter(Path.is_file, sorted(Path(scratch).rglob("*")))
        written = {path.relative_to(scratch).as_posix(): path for path in paths}
        with as_input_error(f"output.uri: cannot use {run}"):
            _put(written, source, has_begun=not RunDirectory(run).is_new())


def _put(written: Mapping[str, Path], source: str, *, has_begun: bool) -> None:
    """Write files into a folder of the run's own, unless it has them; see `save`."""
    digest = _digest_of(written)
    marker = files.join(source, _MARKER)
    names = set(files.list_files(source))
    is_ours = _MARKER in names and (not has_begun or files.read_text(marker) == digest)
    if names and not is_ours:
        problem = f"{source} holds something else, or another model or tokenizer"
        raise ValueError(f"output.uri: {problem}; give output another folder")
    if has_begun and names == {_MARKER, *written}:
        return
    files.remove_folder(source)  # of a try before the run began, or a part
    files.write_text(marker, digest)
    for name, path in written.items():
        files.put_file(files.join(source, name), path)


def _digest_of(written: Mapping[str, Path]) -> str:
    """Return a digest of files: JSON but for what changes with the use of a tokenizer."""
    digest = hashlib.blake2b()
    for name, path in written.items():
        digest.update(name.encode())
        if name.endswith(".json"):
            document = {k: v for k, v in json.loads(path.read_text()).items() if k not in _OF_USE}
            digest.update(json.dumps(document, sort_keys=True).encode())
            continue
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()


@contextmanager
def own_modes() -> Iterator[None]:
    """Leave outside what the caller's process and thread are in, and give it back.

    These are torch's number of threads, the precision of products
    (``torch.set_float32_matmul_precision``), a default device, `no_grad`, `inference_mode` and
    `autocast`.
    """
    backends: Any = torch.backends
    with ExitStack() as stack:
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

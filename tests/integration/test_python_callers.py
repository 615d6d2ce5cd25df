"""Programs that call `prune()` and `curvature()` with threads, modes of torch, and other types of
arguments.
"""

from __future__ import annotations

import copy
import errno
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaForSequenceClassification

import ray_surgeon
from ray_surgeon.distributed.memory_plan.planner import DoesNotFitError
from ray_surgeon.job import run_job
from ray_surgeon.run.arguments import causal_lm
from ray_surgeon.storage import files
from tests.conftest import CONFIGS, SPARSE_CONFIGS, make_once, tiny_model
from tests.integration.runs import Given, in_memory, report_of

TEXT: dict[str, Any] = {"num_sequences": 8, "sequence_length": 32, "max_tokens": 4000}
ELEMENTS = {"structure": "element", "target_sparsity": 0.3, "num_shots": 1}


Perplexity = dict[str, tuple[float, float]]


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use this file as the text, since it is read faster than Python's help."""
    TEXT["source"] = shutil.copy(__file__, tmp_path_factory.mktemp("text") / "text.txt")


def prune(
    given: Sequence[Any], uri: str | Path, **changes: Any
) -> ray_surgeon.PruneResult:
    sections: dict[str, Any] = {
        "calibration": TEXT,
        "pruning": ELEMENTS,
        "output": {"uri": str(uri), "exports": []},
        "progress": False,
    }
    return ray_surgeon.prune(*given, **sections | changes)


@pytest.fixture
def expected(llama: Path, shared_folder: Path) -> Perplexity:
    """Return the perplexities of a run without concurrent runs."""

    def prune_alone(folder: Path) -> None:
        prune(in_memory(llama), folder / "run")

    run = make_once(shared_folder / "pruned_in_memory", prune_alone) / "run"
    return ray_surgeon.PruneResult(str(run), report_of(run)).perplexity


def test_runs_in_threads_are_independent(
    expected: Perplexity, given: Given, tmp_path: Path
) -> None:
    """Runs build models on the meta device, which must not affect other threads."""
    num_threads = torch.get_num_threads()
    is_over = threading.Event()

    def build() -> int:
        count = 0
        while not is_over.is_set():
            count += nn.Linear(2, 2).weight.is_meta
        return count

    def beside(number: int) -> tuple[Perplexity, int]:
        cluster = {"backend": "local", "cpus_per_worker": num_threads + 1}
        result = prune(models[number], tmp_path / str(number), cluster=cluster)
        return result.perplexity, torch.get_num_threads()

    models = [given, copy.deepcopy(given)]
    with ThreadPoolExecutor(3) as threads:
        watching = threads.submit(build)
        try:
            found, threads_left = zip(*threads.map(beside, (0, 1)), strict=True)
        finally:
            is_over.set()
        on_meta = watching.result()
    assert found == (expected, expected)
    assert threads_left == (num_threads, num_threads)
    assert on_meta == 0
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == num_threads


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Set `torch.set_float32_matmul_precision` in the `with` block, and check that it stays."""
    torch.set_float32_matmul_precision(name)
    before = precisions()
    try:
        yield
        assert precisions() == before
        assert torch.get_float32_matmul_precision() == name
    finally:
        torch.set_float32_matmul_precision("highest")


def precisions() -> list[str]:
    backends: Any = torch.backends
    return [backends.mkldnn.matmul.fp32_precision, backends.cuda.matmul.fp32_precision]


MODES: dict[str, Sequence[Callable[[], Any]]] = {
    "inference_mode": [torch.inference_mode],
    "others": [
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: precision("medium"),
    ],
}


@pytest.mark.parametrize("name", MODES)
def test_torch_modes_of_the_caller_do_not_affect_a_run(
    name: str,
    expected: Perplexity,
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = given
    texts = ["one text of some words", "and another one"]
    plain = ray_surgeon.curvature(model, texts, tokenizer)

    def watched(*args: Any) -> None:
        assert precisions() == ["ieee", "ieee"]
        run_job(*args)

    monkeypatch.setattr("ray_surgeon.run.result.run_job", watched)
    with ExitStack() as entered:
        for mode in MODES[name]:
            entered.enter_context(mode())
        found = ray_surgeon.curvature(model, texts, tokenizer)
        result = prune(given, tmp_path / "run")
    for linear, factors in plain.items():
        assert torch.equal(found[linear].A, factors.A)
        assert torch.equal(found[linear].G, factors.G)
    assert result.perplexity == expected


def test_run_resumes_only_with_the_same_model(given: Given, tmp_path: Path) -> None:
    """A change of one weight in the middle of a file is found."""
    model, tokenizer = given
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    for output in (str(tmp_path / "run"), f"memory://{uuid.uuid4().hex}"):
        first = prune(given, output)
        with torch.no_grad():
            weight[0, 0] += 1
        with pytest.raises(ValueError, match="another model or tokenizer"):
            prune(given, output, resume=True)
        with torch.no_grad():
            weight.copy_(before)
        # the tokenizer writes these settings into its file from then on
        tokenizer("some words", truncation=True, max_length=2)
        assert prune(given, output, resume=True).perplexity == first.perplexity


def test_incompletely_saved_model_is_saved_again(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = files.put_file

    def is_full(uri: str, path: Path) -> None:
        if uri.endswith("tokenizer.json"):
            raise OSError(errno.ENOSPC, "no space left")
        put(uri, path)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(files, "put_file", is_full)
        with pytest.raises(ValueError, match=r"output.uri: cannot use .*no space left"):
            prune(given, run)
    prune(given, run)
    shutil.rmtree(run / "source")
    (run / "report.json").unlink()
    prune(given, run, resume=True)
    assert (run / "source/model.safetensors").exists(), (
        "the run starts again and reads the model"
    )
    (run / "source/tokenizer.json").unlink()
    prune(given, run, resume=True)


def test_folder_of_a_refused_run_accepts_another_model(
    given: Given, tmp_path: Path
) -> None:
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    )
    with pytest.raises(ValueError, match="'bloom', which is not supported"):
        prune((bloom, given[1]), tmp_path / "run")
    with pytest.raises(ValueError, match="need"):
        prune(given, tmp_path / "run", calibration=TEXT | {"num_sequences": 10_000})
    with pytest.raises(DoesNotFitError):
        prune(given, tmp_path / "run", memory={"limit_gib": 1e-6})
    with torch.no_grad():
        given[0].model.norm.weight += 1
    assert prune(given, tmp_path / "run").report["shots"]
    with pytest.raises(ValueError, match=r"output.uri: cannot use /proc/x"):
        prune(given, "/proc/x")


def test_models_of_all_families_are_accepted() -> None:
    for model in map(tiny_model, CONFIGS | SPARSE_CONFIGS):
        assert causal_lm(model) is model


def test_arguments_of_wrong_types_are_named(given: Given, tmp_path: Path) -> None:
    model, tokenizer = given
    classifier = LlamaForSequenceClassification(model.config)
    double = copy.deepcopy(model).double()
    for others, message in (
        ((tokenizer, model), "model: got a "),
        ((model.model, tokenizer), "model: got a LlamaModel; give a causal LM"),
        ((classifier, tokenizer), "model: got a LlamaForSequenceClassification"),
        ((Path("s3://bucket/model"), None), "give URIs as text"),
        ((model, "gpt2"), "tokenizer: got a str"),
        ((double, tokenizer), r"model.dtype: .*\(got 'float64'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(others, tmp_path / "run")
    with pytest.raises(ValueError, match="give URIs as text"):
        prune(given, "", output=Path("s3://bucket/run"))
    sequences: Any
    for sequences, message in (
        (tokenizer(["a text", "another"]), "got a BatchEncoding; .* such as input_ids"),
        ([{"text": "a"}], r"sequences\[0\]: got {'text': 'a'}"),
        (
            [[1, 2], [1.7, 2.9]],
            r"sequences\[1\]: got \[1.7, 2.9\] .*; give a list of integers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ray_surgeon.curvature(model, sequences, tokenizer)


def test_paths_compiled_models_numpy_numbers_and_iterators_are_accepted(
    given: Given, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = given
    text = TEXT | {"source": Path(TEXT["source"]), "num_sequences": np.int64(8)}
    output = {"uri": tmp_path / "run", "exports": []}
    result = prune([model_folders["llama"]], "", calibration=text, output=output)
    assert result.uri == str(tmp_path / "run")
    before = model.config.to_dict()
    again = prune(
        (torch.compile(model), tokenizer), tmp_path / "compiled", calibration=text
    )
    assert again.perplexity == result.perplexity
    assert model.config.to_dict() == before
    name = "model.layers.0.mlp.down_proj"
    linears: Any = (one for one in [name])
    assert set(
        ray_surgeon.curvature(torch.compile(model), [[1, 2, 3]], linears=linears)
    ) == {name}

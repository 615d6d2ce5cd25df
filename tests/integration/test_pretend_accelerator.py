"""Runs on a device that is not the CPU give the same results, and mixing devices is an error.

The runs on the device have their own processes; see tests/pretend_accelerator.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ray_surgeon.api import curvature
from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.config.job import parse_spec
from ray_surgeon.distributed import processes
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.distributed.collectives import TensorPayload, decode
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.job import run_job
from ray_surgeon.maths.reconstruction import FeedForward, reconstruct
from ray_surgeon.preparation.inputs import check
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.storage import tensor_files
from tests import zygote as forks
from tests.conftest import (
    CONFIGS,
    HYBRIDS,
    LAYOUTS,
    SPARSE_CONFIGS,
    Zygote,
    make_once,
    tiny_model,
)
from tests.integration import runs
from tests.integration.runs import report_of, tensors_of_shot, tiny_spec, windows

EQUAL = (0.0, 0.0)
"""Relative tolerances of tensors and perplexities; without updates, all weights are the dense
model's or zero.
"""
BY_ORDER_OF_SUMS = (5e-6, 5e-7)
"""For other kernels; 1e-6 and 8e-8 were measured."""
BY_CANCELLATION = (5e-5, 5e-6)
"""For further Kronecker terms, which are differences (8e-6 and 6e-7 were measured), and for biases
near zero (1e-5).
"""
BY_DEPTH = (1e-3, 5e-6)
"""For four blocks, whose errors add up; 2e-4 was measured in small biases."""
BY_ITERATIONS = (1e-2, 5e-4)
"""For conjugate gradients, which stop at a residual of 1e-3 and multiply in bfloat16; 3e-3 and 8e-5
were measured.
"""
BY_TRAINING = (2e-4, 2e-6)
"""For steps of Adam, which enlarges small gradients; 4e-5 was measured in one linear, and 5e-5 in a
bias, on another kind of CPU.
"""
BY_BFLOAT16 = (1e-2, 5e-3)
"""For a bfloat16 model with rounded weights; 3e-3 and 5e-4 were measured."""

HALF_N_M = {**runs.N_M, "pruning__target_sparsity": 0.5}
EXTENDED = {"curvature__kind": "extended_kfac"}
WANDA = {"pruning__method": "wanda"}
WAVES = runs.DISK | {"memory__wave": 2}
HOST = {"memory__weights": "host", "memory__factors": "host", "memory__wave": 2}
SHOTS = {"pruning__num_shots": 2}
ONCE = {"pruning__costs": "obs"}
SOLVED = {
    "solver": "conjugate_gradients",
    "precision": "float32",
    "num_iterations": 200,
    "tolerance": 1e-6,
}
CORRECTED = runs.GROUPS | runs.LORA | {"recovery__learning_rate": 1e-2}
ALL = CORRECTED | {"recovery__rank": "all", "recovery__learning_rate": 1e-3}
FITTED = runs.GROUPS | {
    "pruning__groups": ["ffn"],
    "pruning__reconstruction": {
        "tokens_per_step": 16,
        "num_epochs": 4,
        "learning_rate": 0.02,
    },
    "calibration__held_aside": 0,
}
EXPORTED = {"output__exports": ["masked", "per_block"]}
RECONSTRUCTED = runs.GROUPS | {"pruning__reconstruction": {"tokens_per_step": 16}}
UNIFORM = {"pruning__allocation": "uniform", "output__exports": ["masked", "uniform"]}
METHODS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "greedy": (SHOTS | runs.MASKED, BY_ORDER_OF_SUMS),
    "once-host": (
        ONCE | SHOTS | HOST | {"curvature__fisher": "sampled"},
        BY_ORDER_OF_SUMS,
    ),
    "obd-disk": ({"pruning__costs": "obd"} | SHOTS | WAVES, BY_ORDER_OF_SUMS),
    "single-identity": (
        ONCE | {"pruning__update": "single", "curvature__kind": "identity"},
        BY_ORDER_OF_SUMS,
    ),
    "none": (ONCE | {"pruning__update": "none"}, EQUAL),
    "activations": (
        ONCE | runs.FOUR | {"curvature__kind": "activations"},
        BY_ORDER_OF_SUMS,
    ),
    "three-terms": (EXTENDED | {"curvature__num_kronecker_terms": 3}, BY_CANCELLATION),
    "bfloat16": (ONCE | {"model__dtype": "bfloat16"}, BY_BFLOAT16),
    "element-solved": (runs.ELEMENT | {"pruning__update": SOLVED}, BY_ORDER_OF_SUMS),
    "element-two-terms": (
        runs.ELEMENT | EXTENDED | {"pruning__costs": "obd"},
        BY_ITERATIONS,
    ),
    "n_m": (runs.N_M, BY_ITERATIONS),
    "sparsegpt-n_m": (runs.SPARSEGPT | HALF_N_M, BY_ORDER_OF_SUMS),
    "wanda-host": (WANDA | runs.ELEMENT | HOST, EQUAL),
    "groups-disk": (CORRECTED | WAVES | EXPORTED, BY_TRAINING),
    "reconstructed": (RECONSTRUCTED, BY_CANCELLATION),
    "all-host": (ALL | {"memory__factors": "host"}, BY_TRAINING),
    "all-device": (ALL, BY_TRAINING),
    "groups-uniform": (CORRECTED | UNIFORM, BY_ORDER_OF_SUMS),
    "fitted-replicas": (FITTED | runs.FOUR | HOST, BY_ITERATIONS),
}
OFTEN = {
    "greedy",
    "three-terms",
    "bfloat16",
    "n_m",
    "groups-disk",
    "reconstructed",
    "all-device",
}
EXPERTS = CORRECTED | {
    "pruning__groups": ["ffn", "shared_experts", "expert_channels", "experts"],
    "output__exports": ["per_block"],
}
ALWAYS = ("llama", "opt", "gpt2", "gemma3", "phi3", "qwen2_moe", "glm4_moe")
"""Families whose tiny models with two blocks are always tested."""
MODULE = "tests.integration.test_pretend_accelerator"


# Functions for processes with the device


def run_on(device: str, spec: str) -> None:
    """Run a job with the implementation of attention that both devices support."""
    inputs = check(parse_spec(Path(spec).read_text()))
    cluster = LocalCluster(inputs.layout, inputs.placement, 1, device)
    with sdpa_kernel(SDPBackend.MATH):
        run_job(inputs, cluster, RunDirectory(inputs.spec.output.uri), lambda event: None)


def run_on_sim(spec: str) -> None:
    processes.run_module = reload_here  # type: ignore[assignment]
    LivePage.draw = lambda *args, **kwargs: None  # type: ignore[method-assign]
    run_on("sim", spec)


def reload_here(
    module: str, request: Mapping[str, Any], offline: bool = True
) -> dict[str, Any]:
    """Run a module in this process instead of a fresh one; it computes on the CPU."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        tempfile.TemporaryDirectory() as modules,
    ):
        forks.run_module(
            {
                "module": module,
                "request": request,
                "environment": {"HF_MODULES_CACHE": modules},
            }
        )
    found: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    return found


def run_on_sim_and_forget_to_move(spec: str) -> None:
    def stay(self: Worker, payload: TensorPayload) -> Tensor:
        return decode(payload, torch.device("cpu"))

    Worker.unpack = stay  # type: ignore[method-assign]
    run_on_sim(spec)


def curvature_on(device: str, model: str, path: str) -> None:
    """Write the factors of a model in memory, with sampled labels."""
    loaded = AutoModelForCausalLM.from_pretrained(model).to(device)
    with sdpa_kernel(SDPBackend.MATH):
        found = curvature(loaded, torch.arange(60).view(2, 30), label_seed=0)
    assert {factors.A.device.type for factors in found.values()} == {device}
    parts = {
        f"{name}.{part}": getattr(f, part).cpu()
        for name, f in found.items()
        for part in "AG"
    }
    torch.save(parts, path)


def reconstructed_on(device: str, path: str) -> None:
    """Write the weights of a trained bfloat16 layer."""
    drawn = torch.Generator().manual_seed(0)
    shapes = [(48, 32), (48, 32), (32, 48), (400, 32), (400, 32)]
    *weights, x, y = (torch.randn(*shape, generator=drawn).to(device) for shape in shapes)
    layer = FeedForward(tuple(weights), torch.nn.functional.silu)
    options: Any = {"learning_rate": 0.01, "tokens_per_step": 20, "num_epochs": 4}
    trained = reconstruct(
        layer, x.bfloat16(), 100 * y.bfloat16(), generator=drawn, **options
    )
    assert trained.after < 0.8 * trained.before
    torch.save(
        {str(i): weight.cpu() for i, weight in enumerate(trained.layer.weights)}, path
    )


def mixtures() -> dict[str, str]:
    """Return the operations that accept a tensor on the CPU, x, and one on the device, y."""
    x = torch.eye(4)
    y = torch.eye(4, device="sim")
    attempts: dict[str, Callable[[], object]] = {
        "sum": lambda: y + x,
        "concatenation": lambda: torch.cat([y, x]),
        "written to": lambda: torch.zeros(()).add_(y.sum()),
        "index of the CPU's": lambda: x[torch.tensor([2, 0], device="sim")],
        "generator": lambda: torch.multinomial(y, 1, generator=torch.Generator()),
        "numpy": lambda: y.numpy(),
    }
    found = {}
    for name, attempt in attempts.items():
        with contextlib.suppress(RuntimeError, TypeError):
            attempt()
            found[name] = "was let through"
    y[torch.tensor([2, 0])] = 3.0
    y[0] = torch.tensor(1.0)  # as on a GPU, indices and scalars numbers may be on the CPU
    y[1:] = x[1:]  # this is a copy
    if not torch.equal(y.cpu(), torch.tensor([[1.0, 1, 1, 1], *x[1:].tolist()])):
        found["copies"] = str(y.cpu())
    return found


# Tests


@pytest.fixture(scope="session")
def small_models(
    shared_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Path]:
    """Return the folders of tiny models with two blocks by family."""

    def save_all(folder: Path) -> None:
        for family in ALWAYS:
            save_small_model(family, folder / family)
            tokenizer.save_pretrained(folder / family)

    folder = make_once(shared_folder / "small_models", save_all)
    return {family: folder / family for family in ALWAYS}


def save_small_model(family: str, folder: Path) -> None:
    configs = SPARSE_CONFIGS if family in SPARSE_CONFIGS else CONFIGS
    document = configs[family].to_dict()
    document |= {"n_layer" if family == "gpt2" else "num_hidden_layers": 2}
    if "layer_types" in document:
        document["layer_types"] = document["layer_types"][:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs, family, type(configs[family])(**document))
        tiny_model(family).save_pretrained(folder)


def elsewhere(
    zygote: Zygote, function: Callable[..., object], **arguments: object
) -> Any:
    """Call a function in a process that has the device."""
    return zygote.run_module(
        "tests.pretend_accelerator",
        {"function": f"{MODULE}:{function.__name__}", "arguments": arguments},
    )["returned"]


def spec_in(place: Path, model: Path, **options: Any) -> str:
    texts = [windows(place / "text.txt", 2, name="docs")]
    few = {"calibration__num_sequences": 3, "evaluation": texts}
    return str(tiny_spec(place, model, **{**runs.ONE, **few, **options}))


def assert_same(
    on_cpu: Mapping[str, Tensor], on_sim: Mapping[str, Tensor], tolerance: float
) -> None:
    assert on_cpu.keys() == on_sim.keys()
    for name, expected in on_cpu.items():
        found = on_sim[name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        if expected.dtype.is_floating_point:
            distance = float((found.double() - expected.double()).norm())
            assert distance <= tolerance * float(expected.double().norm()), (
                f"{name}: {distance}"
            )
        else:
            assert torch.equal(found, expected), name


Tolerances = tuple[float, float]


@pytest.fixture
def assert_same_run(
    zygote: Zygote,
    small_models: dict[str, Path],
    model_folders: dict[str, Path],
    tmp_path: Path,
) -> Callable[[str, Mapping[str, Any], Tolerances], None]:
    def on_both(family: str, options: Mapping[str, Any], tolerances: Tolerances) -> None:
        """Run a job on both devices: the same masks, and weights, perplexities and exports within
        tolerances.
        """
        model = small_models.get(family) or model_folders[family]
        run_on("cpu", spec_in(tmp_path / "cpu", model, **options))
        elsewhere(zygote, run_on_sim, spec=spec_in(tmp_path / "sim", model, **options))
        on_cpu, on_sim = (
            report_of(tmp_path / device / "run") for device in ("cpu", "sim")
        )
        for one, other in zip(
            [on_cpu["dense"], *on_cpu["shots"]],
            [on_sim["dense"], *on_sim["shots"]],
            strict=True,
        ):
            assert other["perplexity"]["docs"] == pytest.approx(
                one["perplexity"]["docs"], rel=max(tolerances[1], 1e-7)
            )
        last = len(on_cpu["shots"])
        one, other = (
            tensors_of_shot(tmp_path / device / "run", last) for device in ("cpu", "sim")
        )
        assert_same(one, other, tolerances[0])
        kinds = [export["kind"] for export in on_sim["exports"]]
        assert kinds == options.get("output__exports", [])
        for path in (tmp_path / "sim/run/export").glob("*/model*.safetensors"):
            expected = tmp_path / "cpu/run/export" / path.parent.name / path.name
            one, other = (tensor_files.read(str(file)) for file in (expected, path))
            assert_same(one, other, tolerances[0])

    return on_both


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow)
        for name in METHODS
    ],
)
def test_methods_match_the_cpu(method: str, assert_same_run: Callable[..., None]) -> None:
    assert_same_run("llama", *METHODS[method])


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(ALWAYS) - HYBRIDS))
def test_remaining_families_match_the_cpu(
    family: str, assert_same_run: Callable[..., None]
) -> None:
    """The device has no convolutions, so families with these are left out."""
    options = dict(runs.GROUPS)
    if "attention" not in LAYOUTS[family].kinds:
        options["pruning__groups"] = ["ffn"]
    assert_same_run(family, options, BY_DEPTH)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(SPARSE_CONFIGS) - set(ALWAYS) - HYBRIDS))
def test_remaining_mixtures_match_the_cpu(
    family: str, assert_same_run: Callable[..., None]
) -> None:
    more = ["shared_experts"] if family == "deepseek_v3" else ["experts"]
    options = {"pruning__groups": ["expert_channels", *more]}
    assert_same_run(family, runs.GROUPS | options, BY_DEPTH)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gemma3", "phi3"])
def test_other_families_match_the_cpu(
    family: str, assert_same_run: Callable[..., None]
) -> None:
    assert_same_run(family, CORRECTED | EXPORTED, BY_TRAINING)


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen2_moe", EXPERTS), ("glm4_moe", EXPERTS | WAVES), ("qwen2_moe", runs.MASKED)],
    ids=["groups", "groups-disk", "rows_columns"],
)
def test_experts_match_the_cpu(
    family: str, options: dict[str, Any], assert_same_run: Callable[..., None]
) -> None:
    assert_same_run(family, options, BY_CANCELLATION)


def test_curvature_of_a_model_in_memory_matches_the_cpu(
    zygote: Zygote, small_models: dict[str, Path], tmp_path: Path
) -> None:
    model = str(small_models["llama"])
    curvature_on("cpu", model, str(tmp_path / "cpu"))
    elsewhere(zygote, curvature_on, device="sim", model=model, path=str(tmp_path / "sim"))
    on_cpu, on_sim = (torch.load(tmp_path / device) for device in ("cpu", "sim"))
    assert_same(on_cpu, on_sim, BY_ORDER_OF_SUMS[0])


def test_reconstruction_in_bfloat16_matches_the_cpu(
    zygote: Zygote, tmp_path: Path
) -> None:
    reconstructed_on("cpu", str(tmp_path / "cpu"))
    elsewhere(zygote, reconstructed_on, device="sim", path=str(tmp_path / "sim"))
    on_cpu, on_sim = (torch.load(tmp_path / device) for device in ("cpu", "sim"))
    assert_same(on_cpu, on_sim, BY_BFLOAT16[0])


def test_tensor_left_on_the_cpu_is_an_error(
    zygote: Zygote, small_models: dict[str, Path], tmp_path: Path
) -> None:
    assert elsewhere(zygote, mixtures) == {}
    with pytest.raises(
        RuntimeError, match=r"weight.* is on sim.*|is on cpu, and others are on sim"
    ):
        elsewhere(
            zygote,
            run_on_sim_and_forget_to_move,
            spec=spec_in(tmp_path, small_models["llama"]),
        )
    assert not hasattr(torch, "sim"), "the device is not registered in this process"

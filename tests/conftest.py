from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from filelock import FileLock
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ray_surgeon.distributed import processes
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.storage import files

torch.set_num_threads(1)
for variable in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
    os.environ.pop(variable, None)  # tests must not report to trackers

VOCABULARY = 320

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
ROTARY = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 128}
TEXT |= {"bos_token_id": 0, "eos_token_id": 0}
COMMON = TEXT | {"initializer_range": 0.2}
BASE: dict[str, Any] = ROTARY | COMMON
OPT: dict[str, Any] = SIZES | TEXT | {"ffn_dim": 48, "init_std": 0.2, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_inner": 48, "n_layer": 4, "n_head": 4, "n_positions": 128}
HALF_SLIDING = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA = HALF_SLIDING | {
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    "pad_token_id": 0,
}

LONG_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}

MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}

HYBRID = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
LFM2 = HYBRID | {"pad_token_id": 0, "block_multiple_of": 16, "intermediate_size": 72}

LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
    },
}

config_of = AutoConfig.for_model
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": config_of("llama", **BASE, tie_word_embeddings=True),
    "llama-biases": config_of("llama", **BASE, attention_bias=True, mlp_bias=True),
    "opt": config_of("opt", **OPT, word_embed_proj_dim=32),
    "opt-projections": config_of(
        "opt", **OPT, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "mistral": config_of("mistral", **BASE, sliding_window=8, tie_word_embeddings=False),
    "qwen2": config_of("qwen2", **BASE, tie_word_embeddings=True),
    "qwen3": config_of("qwen3", **BASE, head_dim=8, tie_word_embeddings=True),
    "gemma3": config_of("gemma3_text", **BASE, **GEMMA),
    "phi3": config_of("phi3", **BASE, pad_token_id=0),
    "smollm3": config_of(
        "smollm3",
        **BASE,
        pad_token_id=0,
        no_rope_layer_interval=2,
        tie_word_embeddings=True,
    ),
    "seed_oss": config_of("seed_oss", **BASE, pad_token_id=0, head_dim=8),
    "ministral3": config_of(
        "ministral3", **BASE, pad_token_id=0, head_dim=8, rope_parameters=LONG_ROPE
    ),
    "olmo3": config_of("olmo3", **BASE, pad_token_id=0, sliding_window=8),
    "granite": config_of("granite", **BASE, **MULTIPLIERS, tie_word_embeddings=True),
    "lfm2": config_of("lfm2", **(BASE | LFM2)),
    "qwen3_5": config_of("qwen3_5_text", **BASE, **LINEAR),
    "gpt2": config_of("gpt2", **GPT2, vocab_size=VOCABULARY, initializer_range=0.2),
}
SPARSE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
MIXTURE = BASE | SPARSE
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "num_key_value_heads": 4}
MLA |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
SIGMOID = {"n_shared_experts": 1, "topk_group": 1, "routed_scaling_factor": 1.5}
SIGMOID |= {"first_k_dense_replace": 1}
QWEN2_MOE = {
    "num_experts": 4,
    "shared_expert_intermediate_size": 40,
    "decoder_sparse_step": 2,
}
GPT_OSS = HALF_SLIDING | {"sliding_window": 16, "num_experts_per_tok": 2}
GLM4 = {"head_dim": 8, "n_routed_experts": 4, "n_group": 1, "use_qk_norm": True}
SPARSE_CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": config_of(
        "mixtral", **BASE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "olmoe": config_of("olmoe", **BASE, num_experts=8, num_experts_per_tok=3),
    "qwen2_moe": config_of("qwen2_moe", **MIXTURE, **QWEN2_MOE, norm_topk_prob=False),
    "qwen3_moe": config_of(
        "qwen3_moe", **MIXTURE, num_experts=6, head_dim=8, norm_topk_prob=True
    ),
    "gpt_oss": config_of("gpt_oss", **BASE, **GPT_OSS, num_local_experts=6),
    "glm4_moe": config_of("glm4_moe", **MIXTURE, **SIGMOID, **GLM4),
    "qwen3_5_moe": config_of(
        "qwen3_5_moe_text",
        **(MIXTURE | LINEAR),
        num_experts=6,
        shared_expert_intermediate_size=40,
    ),
    "deepseek_v3": config_of(
        "deepseek_v3", **(MIXTURE | MLA | SIGMOID), n_routed_experts=8, n_group=2
    ),
}
"""Configurations of tiny mixtures of experts by family."""


LAYOUTS = {
    family: ModelLayout.of(config)
    for family, config in (CONFIGS | SPARSE_CONFIGS).items()
}


HYBRIDS = frozenset(family for family, layout in LAYOUTS.items() if layout.mixers)
"""Families with other layers than attention in some blocks."""
RARE = frozenset({"granite", "lfm2", "qwen3_5", "qwen3_5_moe", "seed_oss", "smollm3"})
"""Families with the marker `slow` on the tests that run whole jobs."""


def of_families(families: Iterable[str]) -> list[Any]:
    """Return parameters of a test of whole jobs; those in `RARE` are slow."""
    parameters = []
    for family in families:
        marks = [pytest.mark.slow] if family in RARE else []
        parameters.append(pytest.param(family, marks=marks))
    return parameters


def pytest_configure(config: pytest.Config) -> None:
    """Require no coverage of a part of the tests: of other markers, names, or files."""
    coverage = config.pluginmanager.getplugin("_cov")
    usual = config.getini("addopts")
    is_part = (
        config.option.keyword
        or config.option.markexpr != usual[usual.index("-m") + 1]
        or config.args != config.getini("testpaths")
    )
    if coverage is not None and is_part:
        coverage.options.cov_fail_under = 0


FAST = {"maths", "test_presets.py", "test_spec.py"}
"""Folders and files whose tests are fast, a minute in all; they do no whole runs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast tests."""
    for item in items:
        if FAST.intersection(item.path.relative_to(Path(__file__).parent).parts):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tiny_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = (CONFIGS | SPARSE_CONFIGS)[family]
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.05)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from pydoc_data.topics import topics

    trained = ByteLevelBPETokenizer()
    settings = {
        "vocab_size": VOCABULARY,
        "special_tokens": ["<end>"],
        "show_progress": False,
    }
    trained.train_from_iterator(list(topics.values())[:20], **settings)
    ends = {"eos_token": "<end>", "bos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **ends)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return a folder that all workers of pytest-xdist share."""
    own_folder = tmp_path_factory.getbasetemp()
    root = own_folder if worker_id == "master" else own_folder.parent
    folder = root / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder unless another test or worker has made it.

    A lock lets one process make it at a time, and a complete folder is renamed to its final name.
    The random numbers of the test do not depend on which test comes first.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = Path(f"{folder}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a failed attempt
            with torch.random.fork_rng():
                make(unfinished)
            unfinished.rename(folder)
    return folder


@dataclass(frozen=True)
class ModelFolders(Mapping[str, Path]):
    """The folders of the tiny models by family; each is created on demand, once per session."""

    tokenizer: PreTrainedTokenizerFast
    root: Path

    def __getitem__(self, family: str) -> Path:
        if family not in LAYOUTS:
            raise KeyError(family)

        def save(folder: Path) -> None:
            tiny_model(family).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        return make_once(self.root / family, save)

    def __iter__(self) -> Iterator[str]:
        return iter(LAYOUTS)

    def __len__(self) -> int:
        return len(LAYOUTS)


@pytest.fixture(scope="session")
def model_folders(
    shared_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> ModelFolders:
    return ModelFolders(tokenizer, shared_folder / "models")


class Zygote:
    """A process of tests/zygote.py, which forks for each request."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.zygote"]
        root = Path(__file__).parent.parent
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
        }
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, text=True, **pipes
        )  # type: ignore[call-overload]
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, **asked: object) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert isinstance(answer, dict)
        return answer

    def run_module(
        self,
        module: str,
        request: Mapping[str, Any],
        offline: bool = True,
        gpu: str | None = None,
    ) -> dict[str, Any]:
        """Run a module like `processes.run_module`, but in a fork."""
        with tempfile.TemporaryDirectory() as modules:
            environment = {"HF_MODULES_CACHE": modules}
            answer = self.ask(module=module, request=request, environment=environment)
        lines = answer["text"].strip().splitlines()
        if answer["code"]:
            raise RuntimeError("\n".join(lines[-5:]))
        found = json.loads(lines[-1])
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.process.kill()  # a regular exit takes seconds
    zygote.process.wait()


@pytest.fixture
def forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes that reload and time exports. Importing everything in a fresh process
    takes longer than a tiny run.
    """
    zygote = request.getfixturevalue("zygote")
    monkeypatch.setattr(processes, "run_module", zygote.run_module)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_SURGEON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Yield the address of a moto server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server: str) -> Iterator[None]:
    from s3fs import S3FileSystem

    reset = urllib.request.Request(f"{s3_server}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3_server)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()
        files.open_filesystem("s3://bucket/x")[0].mkdir("bucket")
        yield
    S3FileSystem.clear_instance_cache()

"""Exports that are really smaller: same logits as the masked model, in classes that do not know
this project.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config

from ray_surgeon.export import folder as export_folder
from ray_surgeon.export.folder import Pruned, dense_document, reload_difference, write_weights
from ray_surgeon.export.kinds import shipped_source
from ray_surgeon.export.reload import agree
from ray_surgeon.export.shipped import modeling_decilm
from ray_surgeon.models.build import cache_argument
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import BlockWidths, per_block_document, plain_kv_heads
from ray_surgeon.pipeline import main
from ray_surgeon.runtime import fresh_process
from ray_surgeon.runtime.fresh_process import run_module
from ray_surgeon.spec.sections import DECI_MULTIPLE, ModelSection
from tests.conftest import CONFIGS, LAYOUTS, SPARSE_CONFIGS
from tests.integration.runs import loaded, report_of, run, tiny_spec
from tests.serve.models import of_pieces

GROUPS: dict[str, Any] = {
    "pruning__structure": "groups",
    "pruning__width_multiple": 8,
    "pruning__target_sparsity": 0.4,
}
TOKENS = torch.arange(30)[None] + 7

LOAD = """
import sys
sys.modules["ray_surgeon"] = None
import torch
from transformers import AutoModelForCausalLM
trusts = sys.argv[2] == "yes"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trusts).eval()
tokens = torch.arange(30)[None] + 7
torch.save(model(tokens).logits.detach(), sys.argv[3])
answer = model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
print(type(model).__name__, len(answer[0]))
"""


def logits_elsewhere(folder: Path, trust: str, scratch: Path) -> tuple[torch.Tensor, str]:
    """Load a checkpoint in a process that cannot import this project."""
    out = scratch / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), trust, str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    return torch.load(out), done.stdout.strip()


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("model*.safetensors"))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_uniform_export_of_every_family(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {
        **GROUPS,
        "pruning__allocation": "uniform",
        "output__exports": ["uniform"],
        "pruning__target_sparsity": 0.3,
    }
    assert run(tmp_path, model_folders[family], **options, cluster__num_shards=2) == 0
    uniform = tmp_path / "run/export/uniform"
    (entry,) = report_of(tmp_path / "run")["exports"]
    assert entry["reload_max_logit_difference"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(uniform)
    assert type(model).__module__.startswith("transformers.models.")
    assert entry["size_bytes"] == pytest.approx(
        4 * sum(p.numel() for p in model.parameters()), rel=0.2
    )
    assert size_of(uniform) < size_of(model_folders[family])
    config = json.loads((uniform / "config.json").read_text())
    width = entry["widths"][0]
    assert width[0] % 8 == 0
    if not CONFIGS[family].model_type.startswith(("opt", "gpt2")):
        assert config["num_key_value_heads"] == width[1]
    if CONFIGS[family].tie_word_embeddings:
        with safe_open(uniform / "model-00002-of-00002.safetensors", "pt") as file:
            assert not any("lm_head" in key for key in set(file.keys()))


def test_heads_that_do_not_divide_become_a_mistral(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of 5 KV heads 3 stay; their 6 query heads do not divide the hidden size of 40."""
    from transformers import LlamaConfig

    heads = {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 8}
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), **heads})
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folders["llama"] / name).read_bytes())
    assert plain_kv_heads(ModelLayout.of(config)) == (1, 2, 3, 4, 5)
    options = {
        **GROUPS,
        "pruning__allocation": "uniform",
        "pruning__groups": ["attention"],
        "pruning__target_sparsity": 0.2,
    }
    assert run(tmp_path, folder, **options, output__exports=["masked", "uniform"]) == 0
    document = json.loads((tmp_path / "run/export/uniform/config.json").read_text())
    assert document["num_key_value_heads"] == 3
    assert (document["model_type"], document["architectures"], document["sliding_window"]) == (
        "mistral",
        ["MistralForCausalLM"],
        None,
    )
    found, said = logits_elsewhere(tmp_path / "run/export/uniform", "no", tmp_path)
    assert said.startswith("MistralForCausalLM")
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/masked")
    torch.testing.assert_close(found, masked(TOKENS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_mixtures_hold_heads_that_do_not_divide_the_hidden_size(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """As those of GLM-4.5-Air, 96 for 4096, do not before anything is pruned."""
    heads = {"hidden_size": 40, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}
    config = type(SPARSE_CONFIGS[family])(**{**SPARSE_CONFIGS[family].to_dict(), **heads})
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folders["llama"] / name).read_bytes())
    options = {
        **GROUPS,
        "pruning__allocation": "uniform",
        "pruning__groups": ["attention"],
        "pruning__target_sparsity": 0.02,
    }
    assert run(tmp_path, folder, **options, output__exports=["masked", "uniform"]) == 0
    document = json.loads((tmp_path / "run/export/uniform/config.json").read_text())
    assert (document["num_attention_heads"], document["num_key_value_heads"]) == (6, 2)
    found, said = logits_elsewhere(tmp_path / "run/export/uniform", "no", tmp_path)
    assert said.startswith(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/masked")
    torch.testing.assert_close(found, masked(TOKENS).logits, atol=1e-4, rtol=0)


def test_phi3_holds_heads_that_its_rotary_factors_allow() -> None:
    """It counts factors by the hidden size over the heads, and refuses to load with others."""
    plain = CONFIGS["phi3"].to_dict()
    factors = [1.0] * (CONFIGS["phi3"].hidden_size // CONFIGS["phi3"].num_attention_heads // 2)
    scaling = {"type": "longrope", "long_factor": factors, "short_factor": factors}
    config = Phi3Config(
        **{k: v for k, v in plain.items() if k != "rope_parameters"}, rope_scaling=scaling
    )
    assert plain_kv_heads(ModelLayout.of(CONFIGS["phi3"])) == tuple(
        range(1, config.num_key_value_heads + 1)
    )
    assert plain_kv_heads(ModelLayout.of(config)) == (config.num_key_value_heads,)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "uniform"), ("llama", "per_block"), ("mistral", "per_block"), ("mistral", "deci")],
)
def test_an_export_of_another_type_has_the_same_tokens(
    family: str, kind: str, tmp_path: Path
) -> None:
    """transformers builds Llama's tokenizer anew from its pieces, and takes Mistral's as the file
    has it.
    """
    heads = {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 8,
        "vocab_size": 900,
    }
    config = CONFIGS[family].__class__(
        **{**CONFIGS[family].to_dict(), **heads, "sliding_window": None, "intermediate_size": 512}
    )
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    of_pieces().save_pretrained(folder)
    document = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(document | {"tokenizer_class": "LlamaTokenizer", "chat_template": "hello"})
    )
    options = {
        **GROUPS,
        "pruning__groups": ["attention"],
        "pruning__target_sparsity": 0.02,
        "pruning__num_shots": 1,
    }
    options |= {"pruning__allocation": "uniform"} if kind == "uniform" else {}
    options |= (
        {
            "pruning__groups": ["ffn"],
            "pruning__width_multiple": 256,
            "pruning__target_sparsity": 0.4,
        }
        if kind == "deci"
        else {}
    )
    assert run(tmp_path, folder, **options, output__exports=[kind]) == 0
    export = tmp_path / "run/export" / kind
    changed = json.loads((export / "config.json").read_text())
    assert changed["model_type"] != config.model_type
    assert not (kind == "uniform" and changed["transformers_version"].startswith("4")), (
        "it would doubt the tokenizer of such a Mistral"
    )
    before = AutoTokenizer.from_pretrained(folder)
    after = AutoTokenizer.from_pretrained(export)
    assert after.chat_template == before.chat_template == "hello"
    for text in (
        "hello world",
        " lead",
        "</s>hello",
        "<s>[INST] for the value[/INST] x</s><s>[INST]  a  b\n  c",
    ):
        assert after(text)["input_ids"] == before(text)["input_ids"], text
        assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])


def test_blocks_that_guess_further_tokens_are_not_promised(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(model_folders["glm4_moe"], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert dense_document(ModelSection(source=str(model)))["num_nextn_predict_layers"] == 0


def test_memory_of_a_narrow_model_is_not_that_of_the_dense_one(tmp_path: Path) -> None:
    """Classes whose blocks differ build the dense model first."""
    config = CONFIGS["llama"].__class__(
        **{
            **CONFIGS["llama"].to_dict(),
            "hidden_size": 256,
            "intermediate_size": 16384,
            "head_dim": 32,
        }
    )
    dense = config.to_dict() | {"dtype": "float32"}
    layout = ModelLayout.of(config)
    widths = [BlockWidths(512, layout.heads.num_kv)] * layout.num_blocks
    document = per_block_document(layout, dense, widths)
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "modeling_pruned.py").write_text(shipped_source("modeling_pruned.py", config))
    options = {"prompt_length": 8, "num_new_tokens": 2, "num_repeats": 1, "num_threads": 1}
    request = {"uri": str(tmp_path), "dense": dense, "options": options}
    of_dense, of_pruned = (
        run_module("ray_surgeon.export.speed", request | {"only": only})
        for only in ("dense", "pruned")
    )
    less = of_dense["peak_rss_bytes"] - of_pruned["peak_rss_bytes"]
    assert less > 0.8 * 4 * 3 * 256 * (16384 - 512) * layout.num_blocks


@pytest.mark.parametrize("remove_blocks", [False, True])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_per_block_export_of_every_family(
    family: str, remove_blocks: bool, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    target = 0.8 if remove_blocks else 0.4
    options = {**GROUPS, "pruning__remove_blocks": remove_blocks, "output__exports": ["per_block"]}
    options["pruning__target_sparsity"] = target
    assert run(tmp_path, model_folders[family], **options, cluster__num_shards=2) == 0
    per_block = tmp_path / "run/export/per_block"
    (entry,) = report_of(tmp_path / "run")["exports"]
    widths = entry["widths"]
    assert entry["reload_max_logit_difference"] < 1e-4
    assert len({tuple(width) for width in widths}) > 1
    assert all(channels % 8 == 0 for channels, _ in widths)
    assert (min(kv for _, kv in widths) == 0 or min(c for c, _ in widths) == 0) == remove_blocks
    assert size_of(per_block) < size_of(model_folders[family])
    assert (
        json.loads((per_block / "config.json").read_text())["model_type"]
        == f"pruned_{CONFIGS[family].model_type}"
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_first_block_without_attention_counts_the_tokens_of_the_cache(
    family: str, tmp_path: Path
) -> None:
    """Where new tokens stand is asked of the cache's first layer."""
    layout = LAYOUTS[family]
    (tmp_path / "pruned.py").write_text(shipped_source("modeling_pruned.py", layout.config))
    spec = importlib.util.spec_from_file_location(f"pruned_{family}", tmp_path / "pruned.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    widths = [BlockWidths(48, 0), *[BlockWidths(48, layout.heads.num_kv)] * 3]
    document = per_block_document(layout, layout.config.to_dict(), widths)
    model = module.PrunedForCausalLM(module.PrunedConfig(**document)).eval()
    name = cache_argument(model)
    with torch.no_grad():
        first = model(TOKENS[:, :9], use_cache=True)
        then = model(TOKENS[:, 9:], use_cache=True, **{name: first[name]}).logits
        torch.testing.assert_close(
            then, model(TOKENS, use_cache=False).logits[:, 9:], atol=1e-4, rtol=1e-4
        )
        assert first[name].get_seq_length() == TOKENS.shape[1]


@pytest.mark.fresh
@pytest.mark.parametrize(("allocation", "kind"), [("uniform", "uniform"), ("global", "per_block")])
def test_exports_do_not_need_this_project(
    allocation: str, kind: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {**GROUPS, "pruning__allocation": allocation, "output__exports": ["masked", kind]}
    assert run(tmp_path, model_folders["llama"], **options) == 0
    found, said = logits_elsewhere(
        tmp_path / "run/export" / kind, "no" if kind == "uniform" else "yes", tmp_path
    )
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/masked")
    torch.testing.assert_close(found, masked(TOKENS).logits, atol=1e-4, rtol=0)
    assert said == {"uniform": "LlamaForCausalLM 35", "per_block": "PrunedForCausalLM 35"}[kind]


def test_the_multiple_of_widths_is_that_of_the_code_that_goes_with_the_export() -> None:
    assert modeling_decilm.MULTIPLE == DECI_MULTIPLE


def deci_model(folder: Path, tokenizer_from: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            **CONFIGS["llama"].to_dict(),
            "intermediate_size": 768,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    return folder


@pytest.mark.parametrize("remove_blocks", [False, True])
def test_deci_export(remove_blocks: bool, model_folders: dict[str, Path], tmp_path: Path) -> None:
    model = deci_model(tmp_path / "model", model_folders["llama"])
    target = 0.75 if remove_blocks else 0.5
    options = {
        **GROUPS,
        "pruning__groups": ["ffn"],
        "pruning__width_multiple": 256,
        "pruning__remove_blocks": remove_blocks,
    }
    options |= {"pruning__target_sparsity": target, "output__exports": ["masked", "deci"]}
    assert run(tmp_path, model, **options, cluster__num_shards=2) == 0
    folder = tmp_path / "run/export/deci"
    found, said = logits_elsewhere(folder, "yes", tmp_path)
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/masked")
    torch.testing.assert_close(found, masked(TOKENS).logits, atol=1e-4, rtol=0)
    assert said == "DeciLMForCausalLM 35"
    document = json.loads((folder / "config.json").read_text())
    widths = [c for c, _ in report_of(tmp_path / "run")["exports"][1]["widths"]]
    assert (document["model_type"], document["architectures"]) == (
        "nemotron-nas",
        ["DeciLMForCausalLM"],
    )
    names = {
        key for path in folder.glob("*.safetensors") for key in set(safe_open(path, "pt").keys())
    }
    for number, (block, width) in enumerate(zip(document["block_configs"], widths, strict=True)):
        assert block["attention"] == {
            "n_heads_in_group": 2,
            "no_op": False,
            "replace_with_linear": False,
        }
        multiplier = block["ffn"]["ffn_mult"]
        assert (0 if multiplier is None else -(-int(2 * multiplier * 32 / 3) // 256) * 256) == width
        assert block["ffn"]["no_op"] == (width == 0)
        assert (f"model.layers.{number}.post_attention_layernorm.weight" in names) == (width > 0)
    assert (min(widths) == 0) == remove_blocks


REFUSED = [
    ("llama", {"output__exports": ["uniform"]}, "needs pruning.structure groups"),
    (
        "llama",
        {**GROUPS, "output__exports": ["uniform"]},
        "uniform needs pruning.allocation uniform",
    ),
    ("llama", {**GROUPS, "output__exports": ["deci"]}, "set pruning.groups to [ffn]"),
    (
        "llama",
        {
            **GROUPS,
            "pruning__groups": ["ffn"],
            "pruning__width_multiple": 256,
            "output__exports": ["deci"],
        },
        "that lose none keep all",
    ),
    ("llama", {**GROUPS, "output__exports": ["masked", "masked"]}, "names one twice"),
    ("llama", {**GROUPS, "output__speed": {}}, "has no smaller model to measure"),
    (
        "opt",
        {
            **GROUPS,
            "pruning__groups": ["ffn"],
            "pruning__width_multiple": 256,
            "output__exports": ["deci"],
        },
        "not opt",
    ),
    (
        "mistral",
        {
            **GROUPS,
            "pruning__groups": ["ffn"],
            "pruning__width_multiple": 256,
            "output__exports": ["deci"],
        },
        "sliding window",
    ),
    (
        "llama",
        {**GROUPS, "pruning__allocation": "uniform", "pruning__remove_blocks": True},
        "pruning.remove_blocks",
    ),
    ("llama", {"pruning__remove_blocks": True}, "pruning.remove_blocks"),
    ("gpt2", {**GROUPS, "pruning__allocation": "uniform"}, "at most 0.3525"),
    ("llama", {**GROUPS, "pruning__groups": ["attention"]}, "at most"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_exports_that_cannot_be_are_refused_before_anything_starts(
    family: str,
    changes: dict[str, Any],
    message: str,
    model_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(tiny_spec(tmp_path, model_folders[family], **changes))]) == 2
    assert message in capsys.readouterr().err


def test_speed_is_measured_beside_the_dense_model(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = {"prompt_length": 16, "num_new_tokens": 3, "num_repeats": 2}
    options = {
        **GROUPS,
        "pruning__allocation": "uniform",
        "output__exports": ["uniform"],
        "output__speed": speed,
    }
    assert run(tmp_path, model_folders["llama"], **options) == 0
    entry = report_of(tmp_path / "run")["exports"][0]
    found = entry["speed"]
    assert found["pruned"]["weights_bytes"] == pytest.approx(entry["size_bytes"], rel=0.1)
    assert found["dense"]["weights_bytes"] > found["pruned"]["weights_bytes"]
    for model in ("dense", "pruned"):
        assert found[model]["peak_rss_bytes"] > found[model]["weights_bytes"]
        assert found[model]["peak_gpu_bytes"] == 0
        for step in ("prefill", "decode"):
            spread = found[model][f"{step}_tokens_per_s"]
            assert 0 < spread["lowest"] <= spread["median"] <= spread["highest"]
    said = capsys.readouterr().out
    size = 4 * sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(model_folders["llama"]).parameters()
    )
    assert re.search(rf"weights, MB +{size / 1e6:.3f} -> +{entry['size_bytes'] / 1e6:.3f} ", said)
    assert "prefill, tokens per second" in said
    assert f'load it: AutoModelForCausalLM.from_pretrained("{tmp_path}/run/export/uniform")' in said
    card = (tmp_path / "run/export/uniform/README.md").read_text()
    assert "| prefill of 16 tokens |" in card
    assert "| peak memory of a process, MB |" in card
    assert "memory of a process, MB" in said
    assert "from_pretrained(folder)" in card
    _, front, _ = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"


def test_a_wrong_export_is_not_announced(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the widths of two blocks exchanged, the fresh process says that tensors do not fit."""
    from ray_surgeon.models.pruned_config import block_widths as right

    exchanged = "ray_surgeon.models.pruned_config.block_widths"
    monkeypatch.setattr(exchanged, lambda *arguments: right(*arguments)[::-1])
    assert run(tmp_path, model_folders["llama"], **GROUPS, output__exports=["per_block"]) == 1
    assert not (tmp_path / "run/export/per_block/README.md").exists()
    assert LAYOUTS["llama"].heads.num_kv == 2


def test_an_export_has_no_files_of_a_try_with_other_shards(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "export/.writing-abc").mkdir(parents=True)
    (tmp_path / "export/my.gguf").touch()
    for num_shards in (2, 1):
        write_weights(loaded(model_folders["llama"], num_shards), str(tmp_path / "export"))
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "model.safetensors",
        "my.gguf",
    ]


def test_a_configuration_does_not_name_code_that_is_not_there(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Models of the Hub may, beside a class of transformers."""
    model = Path(shutil.copytree(model_folders["phi3"], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}})
    )
    found = dense_document(ModelSection(source=str(model)))
    assert found == {name: value for name, value in config.items() if name != "torch_dtype"} | {
        "dtype": "float32"
    }


@pytest.mark.parametrize(
    ("dtype", "of_all", "of_one", "passes"),
    [
        ("bfloat16", 0.05, 0.4, True),  # as SmolLM2 has it
        ("bfloat16", 0.25, 0.25, False),
        ("bfloat16", 0.05, 0.8, False),
        ("float32", 1e-4, 3e-3, True),
        ("float32", 1e-4, 1e-2, False),
    ],
)
def test_logits_may_differ_by_rounding(
    dtype: str, of_all: float, of_one: float, passes: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, noise = (torch.randn(1, 16, 500, generator=generator) for _ in range(2))
    noise[0, 3] *= of_one / of_all
    assert agree(10 + 3 * (logits + of_all * noise), 10 + 3 * logits, dtype, half=False) is passes


@pytest.mark.parametrize(
    ("dtype", "has_experts", "passes"),
    [("bfloat16", True, True), ("bfloat16", False, False), ("float32", True, False)],
)
def test_a_token_of_a_mixture_may_go_to_other_experts_where_numbers_are_narrow(
    dtype: str, has_experts: bool, passes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = torch.randn(1, 9, 7)
    there = here.clone()
    there[0, :4] += 10.0
    monkeypatch.setattr(export_folder, "logits", lambda cluster, tokens: None)
    monkeypatch.setattr(export_folder, "decode", lambda payload, device: here)
    monkeypatch.setattr(
        fresh_process,
        "run_module",
        lambda module, request: save_file({"logits": there}, request["logits"]),
    )
    no_cluster: Any = None
    layout: Any = SimpleNamespace(is_mixture=has_experts)
    model = ModelSection(source="x", dtype=dtype)
    pruned = Pruned(no_cluster, layout, model, {}, TOKENS[0].numpy())
    compare = partial(reload_difference, pruned, str(tmp_path))
    if passes:
        assert compare() == pytest.approx(10.0)
        there[0, 4] += 10.0
    with pytest.raises(RuntimeError, match="differ from the workers' by 10"):
        compare()

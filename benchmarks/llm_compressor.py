"""Program for llm-compressor's environment, which rounds the requested folder by GPTQ.

See `benchmarks.quantised`.
"""

import json
import sys
from typing import Any

import numpy as np
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    """Round all linears to 4 bits with llm-compressor's defaults (activation ordering)."""
    request: dict[str, Any] = json.load(sys.stdin)
    windows = np.load(request["tokens"])
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype="float32")
    weights = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=request["group_size"],
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        dataset=Dataset.from_dict(
            {"input_ids": windows, "attention_mask": np.ones_like(windows)}
        ),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(request["target"], save_compressed=True)


if __name__ == "__main__":
    main()

"""Upcycles SmolLM2-135M to a small mixture of experts with trained weights.

No package index has such a model, and pruning experts has to be measured on one.

``python -m benchmarks.upcycled FOLDER`` writes a Mixtral with 8 experts per block and 2 per token,
and prints its perplexities and the entropy of its routing. It takes less than 15 minutes on two
cores.

Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055): every expert is a copy of the
feed-forward layer. Copies hardly differ after a few hundred steps: removing one changed the loss
by 5e-4 nats of either sign. Therefore each expert starts without the outputs of a random quarter of
its channels, and the others are scaled up (Drop-Upcycling, Nakamura et al. 2025, arXiv 2502.19261).
The routers start at cluster centres of their inputs, so that similar tokens go to the same experts.
Low-rank changes of all linears of the experts, and the routers, are then trained on three kinds of
text with bfloat16 products and the family's load-balancing loss. Finally the changes are added to
the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ray_surgeon.config.job import parse_spec
from ray_surgeon.config.texts import SourceSection
from ray_surgeon.data.texts import read_windows
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.models.families import FAMILIES
from ray_surgeon.models.loss import Predicted, next_token_loss
from ray_surgeon.models.low_rank import LowRank
from ray_surgeon.storage.sources import open_model

TEXTS = ("python-docs", "python-docstrings", "package-descriptions")
DROPPED = 0.25
LENGTH = 256
BATCH = 4
RANK = 16
RATE = 1e-3
NUM_WINDOWS = 6
NUM_THREADS = 2


def upcycled(dense: PreTrainedModel, num_experts: int) -> PreTrainedModel:
    """Return a Mixtral whose outputs are close to those of a dense Llama.

    Its experts are `torch.nn.Linear` modules, whose gradients are faster on a CPU.
    """
    config = dense.config
    assert isinstance(config, LlamaConfig)
    same = (
        *(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        ),
        *(
            "hidden_act",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_parameters",
            "tie_word_embeddings",
        ),
        *("bos_token_id", "eos_token_id", "head_dim"),
    )
    fields = {name: getattr(config, name) for name in same}
    sparse = MixtralConfig(
        **fields,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        sliding_window=None,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(sparse, dtype=torch.float32)
    for block in model.model.layers:
        FAMILIES["mixtral"].sparse.split(block)
    state = dense.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = re.sub(r"experts\.\d+\.", "", name)
            if source in state:  # all but routers
                parameter.copy_(state[source])
        generator = torch.Generator().manual_seed(0)
        for block in model.model.layers:
            for expert in block.mlp.experts:
                down = expert.get_parameter("down_proj.weight")
                down *= (torch.rand(down.shape[1], generator=generator) >= DROPPED) / (
                    1 - DROPPED
                )
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the checkpoint with the parameter names of Mixtral."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        FAMILIES["mixtral"].stored_name(name): p.detach()
        for name, p in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["MixtralForCausalLM"]
    model.config.save_pretrained(folder)


def adding(
    part: LowRank,
) -> Callable[[torch.nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a forward hook that adds B A x to the output of a linear."""

    def hook(
        module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        (x,) = inputs
        return output + x @ part.A.T.to(x.dtype) @ part.B.T.to(x.dtype)

    return hook


def windows(
    tokenizer: Any, source: str, split: str, count: int, length: int
) -> NDArray[np.int64]:
    """Return [count, length] tokens of a text."""
    section = SourceSection(source=source, split=split, bos=False)
    return read_windows(section, count, length, tokenizer, source).tokens


@torch.no_grad()
def start_routers(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokens: NDArray[np.int64],
    rounds: int = 10,
) -> None:
    """Set each router's rows to cluster centres of the inputs of its layer.

    The inputs are those of the dense model's feed-forward layers for the sequences [n, T]. Their
    directions from the mean are clustered by spherical k-means. Rows are orthogonal to the mean,
    which all tokens share, and are scaled so that each logit has a variance of 1.
    """
    seen: list[Tensor] = []

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, 1))

    hooks = [block.mlp.register_forward_pre_hook(hook) for block in dense.model.layers]
    dense.model(input_ids=torch.from_numpy(tokens), use_cache=False)
    for handle in hooks:
        handle.remove()
    for block, x in zip(model.model.layers, seen, strict=True):
        mean = x.mean(dim=0)
        directions = torch.nn.functional.normalize(x - mean, dim=1)
        rows: Tensor = block.mlp.gate.weight
        centres = directions[
            torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[
                : len(rows)
            ]
        ]
        for _ in range(rounds):
            nearest = (directions @ centres.T).argmax(dim=1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, directions)
            centres = torch.nn.functional.normalize(sums, dim=1)
        centres -= torch.outer(centres @ mean, mean) / mean.square().sum()
        rows.copy_(centres / (x @ centres.T).std(dim=0)[:, None])


def in_tiles(expert: torch.nn.Module, rows: int = 64) -> None:
    """Pad the inputs of an expert with zeros to a multiple of `rows` tokens.

    oneDNN compiles bfloat16 products for every new shape.
    """
    forward = expert.forward

    def padded(x: Tensor) -> Tensor:
        output: Tensor = forward(torch.nn.functional.pad(x, (0, 0, 0, -len(x) % rows)))
        return output[: len(x)]

    expert.__dict__["forward"] = padded


def train(model: PreTrainedModel, tokens: NDArray[np.int64], say: float = 30.0) -> None:
    """Train the routers and low-rank changes of the experts' linears, and absorb the changes.

    Args:
        model: the mixture.
        tokens: [n, T] training sequences, `BATCH` per step.
        say: seconds between progress messages.
    """
    model.requires_grad_(False)
    parts = dict[str, LowRank]()
    wide = dict[str, Tensor]()
    hooks = contextlib.ExitStack()
    trained = list[Tensor]()
    experts = [expert for block in model.model.layers for expert in block.mlp.experts]
    for expert in experts:
        in_tiles(expert)
    for name, module in model.model.layers.named_modules():
        if ".experts." in name and isinstance(module, torch.nn.Linear):
            mask = StructuredMask.full(module.out_features, module.in_features)
            parts[name] = LowRank(module, mask, RANK, len(parts), torch.device("cpu"))
            hooks.callback(module.register_forward_hook(adding(parts[name])).remove)
            trained += [parts[name].A, parts[name].B]
        if name.endswith("mlp.gate"):
            trained.append(module.get_parameter("weight").requires_grad_())
        elif isinstance(module, torch.nn.Linear):  # bfloat16 products read half the bytes
            wide[name] = module.weight.data
            module.weight.data = module.weight.data.bfloat16()
    head = model.get_output_embeddings().weight.bfloat16()
    coefficient = model.config.router_aux_loss_coef
    sizes = (model.config.num_local_experts, model.config.num_experts_per_tok)

    def backward(part: Tensor) -> float:
        """Accumulate the gradients of a part of a batch, and return its share of the loss."""
        with torch.autocast("cpu", torch.bfloat16):
            found = model.model(
                input_ids=part, use_cache=False, output_router_logits=True
            )
            balance = load_balancing_loss_func(found.router_logits, *sizes)
        hidden = found.last_hidden_state
        num_predicted = BATCH * (part.shape[1] - 1)
        states = hidden.detach().bfloat16()
        nll, gradient = next_token_loss(states, head, Predicted(part), with_gradient=True)
        assert gradient is not None
        torch.autograd.backward(
            [hidden, coefficient / NUM_THREADS * balance],
            [gradient.to(hidden) / num_predicted, None],
        )
        return float(nll.sum()) / num_predicted

    # small operations are faster on one thread
    pool = ThreadPoolExecutor(
        NUM_THREADS, initializer=torch.set_num_threads, initargs=(1,)
    )
    optimizer = torch.optim.Adam(trained, lr=RATE, betas=(0.9, 0.95), fused=True)
    num_steps = len(tokens) // BATCH
    said = time.monotonic()
    for step in range(num_steps):
        rate = min(1.0, (step + 1) / 10) * (
            0.5 + 0.5 * math.cos(math.pi * step / num_steps)
        )
        optimizer.param_groups[0]["lr"] = RATE * rate
        batch = torch.from_numpy(tokens[step * BATCH : (step + 1) * BATCH])
        losses = list(pool.map(backward, torch.split(batch, BATCH // NUM_THREADS)))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if time.monotonic() - said > say:
            said = time.monotonic()
            sys.stderr.write(f"step {step + 1} of {num_steps}, loss {sum(losses):.3f}\n")
    pool.shutdown()
    hooks.close()
    for expert in experts:
        del expert.__dict__["forward"]
    absorb(model, wide, parts)


@torch.no_grad()
def absorb(
    model: PreTrainedModel, wide: dict[str, Tensor], parts: dict[str, LowRank]
) -> None:
    """Restore the float32 weights of the linears, plus the trained low-rank changes."""
    for name, weight in wide.items():
        module = model.model.layers.get_submodule(name)
        module.weight.data = weight
        if name in parts:
            module.weight.data = weight + parts[name].product()


@torch.no_grad()
def measured(
    model: PreTrainedModel, tokens: NDArray[np.int64]
) -> tuple[float, list[float]]:
    """Return the perplexity on windows [n, T] and the routing entropy of each block, in bits."""
    model.config.output_router_logits = False
    nll = 0.0
    shares = list[Tensor]()
    for window in torch.from_numpy(tokens):
        found = model(
            input_ids=window[None],
            labels=window[None],
            use_cache=False,
            output_router_logits=True,
        )
        logits = found.logits[0, :-1]
        nll += float(
            torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum")
        )
        chosen = [
            torch.bincount(r.topk(2, dim=-1).indices.flatten(), minlength=r.shape[-1])
            for r in found.router_logits
        ]
        shares.append(torch.stack(chosen))
    share = torch.stack(shares).sum(dim=0).double()
    share /= share.sum(dim=1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-12).log2()).sum(dim=1)
    return math.exp(nll / (len(tokens) * (tokens.shape[1] - 1))), entropy.tolist()


def main(argv: list[str] | None = None) -> int:
    """Write the model, and print its perplexities and routing entropies."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--experts", type=int, default=8, help="experts per block")
    parser.add_argument(
        "--steps",
        type=int,
        default=150,
        help=f"training steps of {BATCH} sequences of {LENGTH} tokens",
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(NUM_THREADS)
    start = time.monotonic()
    folder = open_model(
        parse_spec(Path("pipelines/quickstart.yaml").read_text()).model
    ).small_files_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = upcycled(dense, arguments.experts).train()
    count = -(-arguments.steps * BATCH // len(TEXTS))
    parts = [windows(tokenizer, text, "train", count, LENGTH) for text in TEXTS]
    mixed = np.stack(parts, axis=1).reshape(-1, LENGTH)[: arguments.steps * BATCH]
    start_routers(model, dense, mixed[:32])
    train(model, mixed)
    model.eval()
    record: dict[str, Any] = {
        "seconds_of_training": time.monotonic() - start,
        "texts": {},
    }
    for text in TEXTS:
        tokens = windows(tokenizer, text, "test", NUM_WINDOWS, 512)
        perplexity, entropy = measured(model, tokens)
        with torch.no_grad():
            nll = [
                float(dense(input_ids=w[None], labels=w[None]).loss)
                for w in torch.from_numpy(tokens)
            ]
        record["texts"][text] = {
            "perplexity": perplexity,
            "perplexity of SmolLM2": math.exp(sum(nll) / len(nll)),
            "entropy, bits": [min(entropy), sum(entropy) / len(entropy), max(entropy)],
        }
    model.config.output_router_logits = False
    save(model, arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    record["seconds"] = time.monotonic() - start
    (arguments.folder / "upcycled.json").write_text(json.dumps(record, indent=2) + "\n")
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

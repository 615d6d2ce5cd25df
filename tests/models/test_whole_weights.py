"""Training all weights of blocks, against Adam on the whole model in float64."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_surgeon.maths.masks import ElementMask, StructuredMask
from ray_surgeon.memory.stores import Stores
from ray_surgeon.models.build import BlockRange
from ray_surgeon.models.checkpoint import reader_of
from ray_surgeon.models.loss import Predicted
from ray_surgeon.models.low_rank import CLIP
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.models.whole_weights import WholeWeights, block_parameters
from tests.conftest import LAYOUTS, tiny_model
from tests.models.test_shard import NUM_PREDICTED, TOKENS, reader, shards


def shard_with(
    family: str, stores: Stores | None = None, dtype: torch.dtype = torch.float32
) -> ModelShard:
    blocks = BlockRange(0, 4, 4)
    shard = ModelShard(LAYOUTS[family], blocks, dtype, torch.device("cpu"), stores)
    shard.load(reader(family))
    return shard


def training(shard: ModelShard, **masks: Any) -> WholeWeights:
    return WholeWeights(shard, masks, list(block_parameters(shard)))


def backward(shard: ModelShard) -> None:
    runner = BlockRunner(shard)
    for i, sequence in enumerate(TOKENS):
        (hidden,) = runner.forward(i, sequence[None])
        _, gradient, _ = runner.loss(hidden, Predicted(sequence[None]))
        runner.backward(i, [gradient])


def steps(
    trained: WholeWeights, shard: ModelShard, count: int, rate: float = 0.01
) -> Tensor:
    for _ in range(count):
        backward(shard)
        for name in block_parameters(shard):
            trained.gradients(name, NUM_PREDICTED)
        trained.step(rate)
    return flat(shard)


def flat(shard: ModelShard) -> Tensor:
    return torch.cat([p.detach().flatten() for p in block_parameters(shard).values()])


def root_mean_square(values: Tensor) -> float:
    return float(values[values != 0].square().mean().sqrt())


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


STEPS = ((1, 0.01), (1, 0.02), (5, 0.01))
"""Times the loss, and the rate, of three steps; gradients of the last are clipped."""


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-biases"])
def test_steps_match_adam_on_the_whole_model(family: str, activations: Any) -> None:
    shard = shard_with(family, Stores(activations=activations))
    trained = training(shard)
    dense = tiny_model(family).double()
    blocks = {
        n: p
        for n, p in dense.named_parameters()
        if LAYOUTS[family].block_of(n) is not None
    }
    assert blocks.keys() == block_parameters(shard).keys()
    before = {name: parameter.detach().clone() for name, parameter in blocks.items()}
    sizes = {}
    for name, start in before.items():
        sizes[name] = root_mean_square(start) if start.any() else 0.0
        if name.endswith("bias"):  # those of norms are zero
            weight = before[f"{name.removesuffix('bias')}weight"]
            sizes[name] = max(sizes[name], root_mean_square(weight))
    optimizer = torch.optim.Adam([{"params": [p]} for p in blocks.values()])
    norms: dict[str, list[float]] = {name: [] for name in blocks}
    without = 0
    for times, rate in STEPS:
        backward(shard)
        for name in blocks:
            trained.gradients(name, NUM_PREDICTED / times)  # type: ignore[arg-type]
        trained.step(rate)
        optimizer.zero_grad()
        (times * dense(TOKENS, labels=TOKENS).loss).backward()
        for group, (name, parameter) in zip(
            optimizer.param_groups, blocks.items(), strict=True
        ):
            group["lr"] = rate * sizes[name]
            assert parameter.grad is not None
            norm = float(parameter.grad.norm())
            most = CLIP * statistics.fmean(norms[name]) if norms[name] else norm
            parameter.grad *= min(1.0, most / norm)
            norms[name].append(min(norm, most))
        optimizer.step()
    for name, parameter in blocks.items():
        assert parameter.grad is not None
        clear = parameter.grad.abs() > 1e-12
        without += int((~clear).sum())
        change = block_parameters(shard)[name].detach().double() - before[name]
        exact = parameter.detach() - before[name]
        assert distance(change[clear], exact[clear]) < 3e-3, name
    # attention does not depend on biases of keys, whose gradients are rounding alone
    assert without == 4 * 32 * (family == "gpt2")
    ends = set(LAYOUTS[family].parameters) - blocks.keys() - set(LAYOUTS[family].tied)
    assert all(torch.equal(shard.tensor(name), reader(family)(name)) for name in ends)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "glm4_moe"])
def test_gradients_of_a_mixture_match_the_whole_model(family: str) -> None:
    """For routers, sinks, norms and every expert."""
    shard = shard_with(family)
    trained = training(shard)
    dense = tiny_model(family).double()
    dense.config._experts_implementation = "eager"  # others have no products of float64
    dense(TOKENS, labels=TOKENS).loss.backward()
    gradients = copy.deepcopy(dense)
    for own, parameter in zip(gradients.parameters(), dense.parameters(), strict=True):
        own.data = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        )
    read = reader_of(LAYOUTS[family], gradients)
    backward(shard)
    routers = [
        name
        for name in block_parameters(shard)
        if "router" in name or "mlp.gate." in name
    ]
    assert routers
    largest = max(float(parameter.data.norm()) for parameter in gradients.parameters())
    for name in block_parameters(shard):
        (gradient,) = trained.gradients(name, NUM_PREDICTED)
        error = float((gradient.double() - read(name)).norm())
        assert error < 1e-5 * largest, name
        if name in routers:
            assert error < 1e-3 * float(read(name).norm())


def test_router_rows_of_removed_experts_do_not_change() -> None:
    shard = shard_with("olmoe")
    kept = torch.ones(8, dtype=torch.bool)
    kept[[2, 5]] = False
    shard.mixtures[1].kept = kept
    router = "model.layers.1.mlp.gate.weight"
    before = shard.tensor(router).clone()
    steps(training(shard), shard, 2)
    moved = (shard.tensor(router) != before).all(dim=1)
    assert torch.equal(moved, kept)


@pytest.mark.parametrize("kind", ["rows", "elements"])
@pytest.mark.parametrize("family", ["llama-biases", "gpt2"])
def test_pruned_weights_stay_zero_and_all_others_change(family: str, kind: str) -> None:
    shard = shard_with(family)
    masks: dict[str, Any] = {}
    for name, shape in shard.layout.shapes.items():
        R = shape.num_rows
        C = shape.num_columns
        if kind == "rows":
            mask = StructuredMask(torch.arange(R) % 3 > 0, torch.arange(C) % 4 > 0)
            mask.columns[-1] = True
            kept = torch.outer(mask.rows, mask.columns)
        else:
            kept = torch.rand(R, C) < 0.5
            kept[:, -1] = True
        masks[name] = mask if kind == "rows" else ElementMask(kept)
        shard.set_weight(name, shard.weight(name) * kept)
    before = {name: shard.weight(name) for name in masks}
    trained = training(shard, **masks)
    steps(trained, shard, 2)
    arrived = trained.absorb()
    for name in masks:
        change = shard.weight(name) - before[name]
        kept = before[name] != 0
        assert not change[~kept].any()
        # inputs that pruned rows make are zero, and their columns have no gradient
        least = 0.4 if kind == "rows" else 0.9
        assert float((change[kept] != 0).float().mean()) > least
        assert shard.weight(name)[kept].any()
    assert arrived.keys() == block_parameters(shard).keys()


def test_masters_accumulate_steps_below_bfloat16_resolution() -> None:
    (shard,) = shards("llama", [0, 4], dtype=torch.bfloat16)
    trained = training(shard)
    name, parameter = next(
        item
        for item in block_parameters(shard).items()
        if item[0].endswith("up_proj.weight")
    )
    start = parameter.detach().clone()
    size = root_mean_square(start.float())

    def step() -> None:
        for own in block_parameters(shard).values():
            own.grad = torch.ones_like(own)
        trained.step(1e-4)

    step()
    assert float((parameter != start).float().mean()) < 0.2, (
        "most entries are as they were"
    )
    for _ in range(59):
        step()
    moved = (start.float() - parameter.detach().float()).mean()
    assert float(moved) == pytest.approx(60 * 1e-4 * size, rel=0.05)
    arrived, wanted = trained.absorb()[name]
    assert arrived / wanted == pytest.approx(1, abs=0.1)
    assert all(
        own.grad is None and not own.requires_grad for own in shard.model.parameters()
    )


def test_share_absorbed_in_bfloat16_is_reported() -> None:
    (shard,) = shards("llama", [0, 4], dtype=torch.bfloat16)
    trained = training(shard)
    steps(trained, shard, 1, rate=1e-4)
    before = {
        name: reader("llama")(name).bfloat16().double()
        for name in block_parameters(shard)
    }
    masters = {name: trained.state()[name].double() for name in before}
    arrived = trained.absorb()
    for name, start in before.items():
        wanted = masters[name] - start
        change = block_parameters(shard)[name].detach().double() - start
        expected = [float((change * wanted).sum()), float(wanted.square().sum())]
        assert arrived[name] == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert sum(a for a, _ in arrived.values()) < 0.5 * sum(w for _, w in arrived.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", ["device", "host"])
def test_restored_state_is_complete(factors: Any, dtype: torch.dtype) -> None:
    """Bit for bit, moments and mean norms included; also by another object."""
    stores = Stores(factors=factors, activations="recompute")
    shard = shard_with("llama", stores, dtype)
    trained = training(shard)
    steps(trained, shard, 2)
    state = {name: tensor.clone() for name, tensor in trained.state().items()}
    expected = steps(trained, shard, 2)
    end = {name: tensor.clone() for name, tensor in trained.state().items()}
    for _ in range(2):
        trained.load_state(state)
        assert torch.equal(steps(trained, shard, 2), expected)
        steps(trained, shard, 1)
    other = shard_with("llama", stores, dtype)
    again = training(other)
    again.load_state(state)
    assert torch.equal(steps(again, other, 2), expected)
    assert all(torch.equal(tensor, end[name]) for name, tensor in again.state().items())
    assert {name.rpartition(" ")[2] for name in end} >= {
        "norms",
        "exp_avg",
        "exp_avg_sq",
        "step",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_back_to_the_best_weights_resets_moments(dtype: torch.dtype) -> None:
    shard = shard_with("llama", dtype=dtype)
    trained = training(shard)
    start = flat(shard)
    first = trained.best()
    one = steps(trained, shard, 2)
    best = trained.best()
    steps(trained, shard, 2)
    trained.back_to(best)
    assert torch.equal(flat(shard), one)
    after = steps(trained, shard, 1)
    fresh = shard_with("llama", dtype=dtype)
    for name, parameter in block_parameters(fresh).items():
        parameter.data.copy_(best[name])
    follows = training(fresh)
    follows._sizes.update(trained._sizes)
    follows._start_optimizers()
    assert torch.equal(steps(follows, fresh, 1), after), "as a training that begins there"
    trained.back_to(first)
    assert torch.equal(flat(shard), start)
    assert (
        trained.best()["model.layers.0.input_layernorm.weight"]
        is first["model.layers.0.input_layernorm.weight"]
    ), "no second copy of the same weights"
    assert torch.equal(steps(trained, shard, 2), one), "the copy was not written to"
    trained.remove()
    assert torch.equal(flat(shard), start)
    assert not any("layernorm" in name for name in shard.saved(changed_only=True))
    assert all(
        own.grad is None and not own.requires_grad for own in shard.model.parameters()
    )


def test_all_absorbed_weights_are_saved() -> None:
    shard = shard_with("gpt_oss")
    plain = shard.saved(changed_only=True)
    trained = training(shard)
    steps(trained, shard, 1)
    trained.absorb()
    saved = shard.saved(changed_only=True)
    assert saved[: len(plain)] == plain
    assert set(saved) == set(block_parameters(shard))
    assert any(name.endswith("sinks") for name in saved)


def test_zero_weights_are_trained() -> None:
    """Biases learn at the rate of their weights, norms as if around one, and weights as if they had
    the usual size.
    """
    shard = shard_with("gpt2")
    prefix = "transformer.h.0."
    weight = shard.tensor(f"{prefix}attn.c_attn.weight")
    size = root_mean_square(weight)
    names = (
        "attn.c_attn.bias",
        "mlp.c_fc.weight",
        "mlp.c_fc.bias",
        "ln_1.weight",
        "ln_1.bias",
    )
    parameters = [block_parameters(shard)[prefix + name] for name in names]
    for parameter in parameters:
        parameter.data.zero_()
    trained = training(shard)
    for own in block_parameters(shard).values():
        own.grad = torch.ones_like(own)
    trained.step(0.01)
    # a weight that is zero has no size, nor has its bias by it
    expected = [size, 48**-0.5, 1.0, 1.0, 1.0]
    found = [-float(parameter.detach().mean()) / 0.01 for parameter in parameters]
    assert found == pytest.approx(expected, rel=1e-4)


def test_step_updates_only_owned_weights_and_clears_all_gradients() -> None:
    shard = shard_with("llama")
    own, other = list(block_parameters(shard))[:2]
    trained = WholeWeights(shard, {}, [own])
    before = {name: shard.tensor(name).clone() for name in (own, other)}
    backward(shard)
    for name in (own, other):
        (gradient,) = trained.gradients(name, 2)
        assert gradient.any()
    trained.step(0.01)
    assert not torch.equal(shard.tensor(own), before[own])
    assert torch.equal(shard.tensor(other), before[other])
    assert not trained.gradients(other, 2)[0].any()
    assert isinstance(block_parameters(shard)[own], nn.Parameter)

"""Code paths of devices other than the CPU: results, launches and syncs on the pretend accelerator.

Functions whose first argument is ``device`` run in a process that has that device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ray_surgeon.maths import products
from ray_surgeon.maths.experts import LayerMean, mean_factor
from ray_surgeon.maths.kronecker import PackedFactors, balance_
from ray_surgeon.maths.products import PackedSymmetric, with_ones
from tests.conftest import Zygote

SYNCS = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}
NO_LAUNCHES = {
    "empty",
    "new_empty",
    "empty_strided",
    "empty_like",
    "_unsafe_view",
    "detach",
}


class Counts(TorchDispatchMode):
    """Counts launches and host waits by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = Counter[str]()
        self.syncs = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_view = any(
            r.alias_info and not r.alias_info.is_write for r in func._schema.returns
        )
        masks = (
            [x for x in args[1] if x is not None]
            if name in {"index", "index_put_"}
            else []
        )
        moves = (
            name == "_to_copy" and "device" in kwargs and not kwargs.get("non_blocking")
        )
        moves |= name == "copy_" and args[0].device != args[1].device
        if name in SYNCS or moves or any(mask.dtype == torch.bool for mask in masks):
            self.syncs[name] += 1
        elif not is_view and name not in NO_LAUNCHES:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def elsewhere(zygote: Zygote) -> Callable[..., Any]:
    def call(function: Callable[..., object], **arguments: object) -> Any:
        """Call a function in a process that has the device."""
        where = f"{__name__}:{function.__name__}"
        asked = {"function": where, "arguments": {"device": "sim"} | arguments}
        return zygote.run_module("tests.pretend_accelerator", asked)["returned"]

    return call


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest entry."""
    found = found.cpu().double()
    return float((found - expected).abs().max() / expected.abs().max())


def summed(x: Tensor) -> PackedSymmetric:
    total = PackedSymmetric.zeros(x.shape[1], x.device, x.dtype)
    total.add(x)
    return total


def second_moments(
    device: str, sizes: list[int], dtype: str, adds_wide: bool
) -> list[Any]:
    """Return the errors against float64 and the launches of sums in both layouts.

    The sums are with and without a bias, and with and without weights.
    """
    products.adds_wide = adds_wide
    cases = [
        (n, bias, weighs)
        for n in sizes
        for bias in (False, True)
        for weighs in (False, True)
    ]
    found = []
    for n, has_bias, has_weights in cases:
        x = torch.randn(24, n - has_bias).to(getattr(torch, dtype))
        weights = torch.randn(24) if has_weights else torch.ones(24)
        exact = (torch.cat([x, x.new_ones(24, 1)], dim=1) if has_bias else x).double()
        expected = exact.T @ (exact * weights.double()[:, None])
        sums = torch.promote_types(x.dtype, torch.float32)
        total = PackedSymmetric.zeros(n, torch.device(device), sums)
        there = x.to(device)
        if has_bias:
            with Counts() as of_ones:
                there = with_ones(there)
            assert there.stride(0) % products.ALIGNMENT == 0
            assert of_ones.launches.total() == 2
            assert not of_ones.syncs
        for part in (slice(0, 10), slice(10, 24)):
            of_part = weights[part].to(device) if has_weights else None
            with Counts() as counts:
                total.add(there[part], of_part)
        assert not counts.syncs
        whole = total.dense().cpu()
        assert torch.equal(whole, whole.T)
        assert torch.equal(total.diagonal().cpu(), whole.diagonal())
        # of the host: in the layout of the device
        in_memory = PackedSymmetric(n, total.flat.cpu())
        assert torch.equal(in_memory.dense(torch.device(device)).cpu(), whole)
        found.append((distance(whole, expected), counts.launches))
        found.append((distance(in_memory.dense(), expected), counts.launches))
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_second_moments_take_one_launch_per_panel(elsewhere: Any, dtype: str) -> None:
    """For sizes below, at and above the height of a panel."""
    sizes = [7, 1024, 2049]
    found = elsewhere(second_moments, sizes=sizes, dtype=dtype, adds_wide=True)
    assert max(error for error, _ in found) < (1e-12 if dtype == "float64" else 2e-6)
    is_narrow = dtype in ("bfloat16", "float16")
    expected = []
    for num_panels in (1, 1, 2):
        plain = {"addmm" if is_narrow else "addmm_": num_panels}
        weighted = {"mul": 1, "addmm_": num_panels} | (
            {"_to_copy": 1} if is_narrow else {}
        )
        expected += 2 * [plain, plain, weighted, weighted]
    assert [launches for _, launches in found] == expected


def test_second_moments_with_older_torch(elsewhere: Any) -> None:
    """torch before 2.10 cannot add products of narrow dtypes to a float32 sum."""
    found = elsewhere(second_moments, sizes=[2049], dtype="bfloat16", adds_wide=False)
    assert max(error for error, _ in found) < 2e-6
    assert found[0][1] == {"mm": 2, "add_": 2}


def test_number_of_entries_identifies_the_layout() -> None:
    """The CPU's layout has fewer entries, or both layouts are the same. On other devices all panels
    but the last have 1,024 rows.
    """
    for n in [*range(3200), 4096, 4097, 11008, 14337, 28672]:
        low, tall = (
            products.panel_layout(n, is_tall=is_tall) for is_tall in (False, True)
        )
        low_size, tall_size = (
            PackedSymmetric.size(n, device) for device in ("cpu", "cuda")
        )
        assert low_size <= tall_size
        assert (low_size == tall_size) == (low == tall)
        if n > 1024:
            assert min(stop - start for start, stop, *_ in tall) >= 768
            assert tall_size <= n * (n + 2064) / 2
        assert all(
            place % 8 == stride % 8 == start % 8 == 0 for start, _, place, stride in tall
        )


def parts(device: str) -> dict[str, Any]:
    """Restrict and balance factors, with some or all rows and columns alive."""
    where = torch.device(device)
    errors = []
    syncs = []
    for dead in ([], [0, 3, 1030]):
        a, g = (torch.randn(50, n, dtype=torch.float64) for n in (1100, 40))
        factors = PackedFactors(summed(a.to(where)), summed(g.to(where)), 50)
        masks = torch.ones(40, dtype=torch.bool), torch.ones(1100, dtype=torch.bool)
        masks[1][dead] = False
        there = [mask.to(where) for mask in masks]
        with Counts() as counts:
            found = factors.restricted(*there)
        syncs.append(counts.syncs)
        A = (a.T @ a)[masks[1]][:, masks[1]]
        G = g.T @ g
        errors += [distance(found.A, A), distance(found.G, G)]
        with Counts() as counts:
            balance_(found.A, found.G)
        assert not counts.syncs
        ratio = float(G.norm() / A.norm()) ** 0.5
        errors += [distance(found.A, A * ratio), distance(found.G, G / ratio)]
    zero = torch.zeros(2, 2, device=where)
    kept = torch.eye(3, device=where) * 5
    balance_(zero, kept)
    return {
        "errors": errors,
        "syncs": syncs,
        "zero": zero.tolist(),
        "kept": kept[0].tolist(),
    }


def test_restricting_factors_syncs_once_and_balancing_never(elsewhere: Any) -> None:
    found = elsewhere(parts)
    assert max(found["errors"]) < 1e-12
    assert found["syncs"] == [{"_to_copy": 1}] * 2
    assert found["zero"] == [[0.0, 0.0]] * 2
    assert found["kept"] == [5.0, 0.0, 0.0]


def layer(device: str, sizes: list[int], num_experts: int) -> dict[str, Any]:
    """Return the mean of a layer's experts, with C inputs and R outputs, and their factors."""
    C, R = sizes
    where = torch.device(device)
    numbers = [i % 4 for i in range(num_experts)]
    inputs, gradients = (
        [torch.randn(n, size, dtype=torch.float64) for n in numbers] for size in (C, R)
    )
    inputs[1][:, :2] = 0  # channels of one that are pruned

    def own(device: torch.device) -> list[PackedFactors]:
        return [
            PackedFactors(summed(a.to(device)), summed(g.to(device)), number)
            for a, g, number in zip(inputs, gradients, numbers, strict=True)
        ]

    def mean(factors: list[PackedFactors], has_bias: bool) -> LayerMean:
        of_A, of_G = (
            [(getattr(f, side), f.num_tokens) for f in factors] for side in "AG"
        )
        by_channel = mean_factor(of_A, has_basis=False, has_bias=has_bias)
        return LayerMean(by_channel, mean_factor(of_G, has_basis=True), sum(numbers) / 2)

    errors = []
    there = own(where)
    for has_bias in (False, True):
        expected = mean(own(torch.device("cpu")), has_bias)
        with Counts() as of_mean:
            found = mean(there, has_bias)
        for side in "AG":
            found_side = getattr(found, side).dense()
            errors.append(distance(found_side, getattr(expected, side).dense()))
    launches = of_mean.launches.total()
    return {"errors": errors, "launches": launches, "syncs": of_mean.syncs.total()}


def test_experts_of_a_layer_are_processed_together(elsewhere: Any) -> None:
    """128 experts take as many launches as 8, and no syncs."""
    few, many = (elsewhere(layer, sizes=[24, 16], num_experts=n) for n in (8, 128))
    wide = elsewhere(layer, sizes=[12, 2056], num_experts=4)
    assert max(few["errors"] + many["errors"] + wide["errors"]) < 1e-12
    assert few["launches"] == many["launches"] <= 23
    assert [found["syncs"] for found in (few, many, wide)] == [0] * 3

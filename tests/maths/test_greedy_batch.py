"""Greedy paths as computed on a GPU, against the dense solution and the path on the CPU.

Also counts launches and syncs.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ray_surgeon.maths.curvature import Linear
from ray_surgeon.maths.downdated import Downdated
from ray_surgeon.maths.greedy import Limits
from ray_surgeon.maths.greedy_batch import GreedyBatch
from ray_surgeon.maths.group_batch import batched_group_costs, costs_of_groups
from ray_surgeon.maths.kronecker import PackedFactors
from ray_surgeon.maths.masks import StructuredMask
from ray_surgeon.maths.products import PackedSymmetric
from ray_surgeon.maths.structured import find_candidates
from tests.conftest import Zygote
from tests.maths.dense import draw, flags, linear, silence, spd, too_indefinite
from tests.maths.test_greedy import curvature_of, marginals_by_brute_force

R = 6
C = 7
MODULE = "tests.maths.test_greedy_batch"


def batch_of(
    problems: Sequence[tuple[Tensor, Tensor, Tensor]], *, rows: bool, columns: bool
) -> Downdated:
    parts = [
        Downdated.of_linear(curvature_of(*p), rows=rows, columns=columns)
        for p in problems
    ]
    tall = torch.cat([part.tall for part in parts])
    wide = (
        torch.cat([part.wide for part in parts if part.wide is not None])
        if rows
        else None
    )
    num_rows, num_columns = problems[0][0].shape
    return Downdated(tall, wide, num_rows, num_columns if columns else 0, 1)


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"), [(R, 0), (0, C), (R - 1, C - 1), (R, C)], ids=str
)
def test_batched_paths_match_brute_force(
    rows: int, columns: int, per_parameter: bool
) -> None:
    """Each linear's path ends at its own limits; the last linear removes nothing."""
    problems = [(draw(R, C, seed=i), spd(C, 2 * i), spd(R, 2 * i + 1)) for i in range(5)]
    sides = range(rows), range(columns)
    dense = [
        marginals_by_brute_force(W, torch.kron(G, A), *sides, per_parameter=per_parameter)
        for W, A, G in problems
    ]
    cut = float(dense[1][0].sort().values[3]) * (1 + 1e-9)  # more than rounding makes
    limits = [
        Limits(),
        Limits(cut),
        Limits(-1.0, needed=4),
        Limits(least=2),
        Limits(-1.0, needed=9, most=-0.5),
    ]
    expected = [marginal.clone() for marginal, _ in dense]
    expected[1][expected[1] > cut] = torch.inf
    for i, number in ((2, 4), (3, rows + columns - 2), (4, 0)):
        expected[i][dense[i][1][number:]] = torch.inf
    state = batch_of(problems, rows=bool(rows), columns=bool(columns))
    allowed = [flags(n, list(used)) for n, used in zip((R, C), sides, strict=True)]
    may_prune = torch.cat([side for side in allowed if side.any()])
    limits = [limit._replace(per_parameter=per_parameter) for limit in limits]
    marginal = GreedyBatch(state, may_prune.expand(5, -1), limits, list("abcde")).follow()
    used = torch.cat([torch.full_like(side, bool(side.any())) for side in allowed])
    torch.testing.assert_close(
        marginal, torch.stack(expected)[:, used], rtol=1e-7, atol=0
    )


def consumers(num_rows: int, num_columns: int, width: int, number: int) -> list[Any]:
    """Return linears, their masks from earlier shots, and the columns of their groups.

    Some linears have dead rows, inputs that are always zero, or too little damping.
    """
    columns = torch.arange((num_columns - 1) // width * width).view(-1, width)
    linears = []
    masks = []
    for i in range(number):
        A = spd(num_columns, 3 * i + 1)
        G = spd(num_rows, 3 * i + 2)
        mask = StructuredMask.full(num_rows, num_columns)
        for group in range(i % 4):
            mask.columns[columns[2 * group + i % 3]] = False
        if i == 1:
            silence(A, *columns[:2].flatten().tolist())
        elif i == 2:
            silence(G, 1)
        elif i == 3:
            A = too_indefinite(A)
        W = draw(num_rows, num_columns, seed=i) * mask.columns
        linears.append(linear(W, A, G, has_bias=True))
        masks.append(mask)
    return [linears, masks, columns]


LIMITS = {
    "single": [Limits(None, least=2)],
    "ends": [Limits(least=2), Limits()],
    "needed": [Limits(-1.0, 4), Limits(-1.0, 7), Limits(-1.0, 0)],
    "limits": [Limits(0.5, 3, 0.6, 1), Limits(2.0, 9, 1.0), Limits(0.1, 20, 4.0)],
}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 6])
def test_batched_group_costs_equal_those_computed_one_by_one(
    width: int, number: int, limits: str
) -> None:
    """tests/maths/test_groups.py compares the latter with the dense solution."""
    linears, masks, columns = consumers(5, 31, width, number)
    of_each = [LIMITS[limits][i % len(LIMITS[limits])] for i in range(number)]
    expected = costs_of_groups(linears, masks, columns, of_each)
    together = batched_group_costs(linears, masks, columns, of_each)
    for (basis, costs), (own_basis, own_costs) in zip(expected, together, strict=True):
        torch.testing.assert_close(own_costs, costs, rtol=1e-9, atol=0)
        assert torch.equal(own_basis.part.rows, basis.part.rows)
        assert torch.equal(own_basis.part.columns, basis.part.columns)
        assert own_basis.damping == basis.damping
        assert own_basis.raised_damping == basis.raised_damping
    if number > 3:
        assert together[3][0].damping.a == 0.1


def test_block_made_indefinite_by_rounding_is_repaired() -> None:
    """Two columns are nearly equal, in one set or in two that are removed together."""
    for width in (1, 2):
        A = torch.eye(512)
        A[0, 1] = A[1, 0] = 1 - 6e-8
        W = torch.ones(3, 512)
        W[:, :2] = 1e-3
        state = Downdated(torch.cat([W, W / 2, A])[None], None, 3, 512 // width, width)
        may_prune = torch.ones(1, 512 // width, dtype=torch.bool)
        marginal = GreedyBatch(
            state, may_prune, [Limits(-1.0, needed=4)], ["x"]
        ).follow()[0]
        assert marginal[: 2 // width].isfinite().all()
        assert int(marginal.isfinite().sum()) == 4


@pytest.mark.parametrize("limit", [None, math.inf])
@pytest.mark.parametrize("bad", [math.nan, 1e200])
def test_nan_and_infinite_costs_are_an_error(bad: float, limit: float | None) -> None:
    linears, masks, columns = consumers(5, 31, 1, 2)
    linears[1].W[0, 5] = bad
    linears[1] = replace(linears[1], name="y")
    with pytest.raises(FloatingPointError, match="y groups: "):
        batched_group_costs(linears, masks, columns, [Limits(limit)] * 2)


def test_zero_factor_is_an_error() -> None:
    linears, masks, columns = consumers(5, 31, 1, 2)
    linears[1] = replace(linears[1], factors=nothing_in_A(linears[1]), name="y")
    with pytest.raises(FloatingPointError, match="y A: the curvature factor is zero"):
        batched_group_costs(linears, masks, columns, [Limits(least=1)] * 2)


def nothing_in_A(of: Linear) -> PackedFactors:
    A = of.factors.A
    return replace(of.factors, A=PackedSymmetric(A.n, torch.zeros_like(A.flat)))


# On a device that is not the CPU

VIEWS = {"unsafe_view", "detach", "alias", "lift_fresh", "reshape_alias"}
ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "resize",
}
WAITS = {"local_scalar_dense", "nonzero", "equal", "masked_select", "bincount"}


class Counts(TorchDispatchMode):
    """Counts launches and syncs of tensors on the device, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = Counter[str]()
        self.syncs = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").strip("_")
        everything = [*torch.utils._pytree.tree_leaves((args, kwargs)), result]
        tensors = [x for x in everything if isinstance(x, Tensor)]
        is_view = any(
            r.alias_info and not r.alias_info.is_write for r in func._schema.returns
        )
        if "sim" not in {tensor.device.type for tensor in tensors}:
            return result
        if not is_view and name not in VIEWS | ALLOCATIONS:
            self.launches[name] += 1
        is_copy = "copy" in name and len({tensor.device.type for tensor in tensors}) > 1
        indices = args[1] if name in ("index", "index_put") else []
        by_mask = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        if name in WAITS or is_copy or by_mask:
            self.syncs[name] += 1
        return result


def to_sim(of: Linear) -> Linear:
    """Return a linear on the device, in float32."""
    sums = (getattr(of.factors, side) for side in "AG")
    A, G = (PackedSymmetric(own.n, own.flat.float().to("sim")) for own in sums)
    return replace(
        of, W=of.W.float().to("sim"), factors=PackedFactors(A, G, of.factors.num_tokens)
    )


def steps_and_counts(follow: Callable[[], object]) -> tuple[int, int, int]:
    """Return the number of steps of a path, launches, and syncs."""
    with Counts() as counts:
        follow()
    return counts.launches["topk"], counts.launches.total(), counts.syncs.total()


def counts_of_paths() -> dict[str, list[int]]:
    """Return steps, launches and syncs of paths on the device that remove 20 %."""
    counts = {}
    for name, sides in (("columns", (0, 96)), ("rows and columns", (256, 96))):
        for number in (1, 128) if name == "columns" else (1,):
            problems = [
                (draw(256, 96, seed=i), spd(96, i), spd(256, 1)) for i in range(number)
            ]
            state = batch_of(problems, rows=bool(sides[0]), columns=True)
            wide = None if state.wide is None else state.wide.float().to("sim")
            tall = state.tall.float().to("sim")
            state = Downdated(tall, wide, 256, 96, 1)
            size = sum(sides)
            needed = (
                [size // 5 + i % 7 - 3 for i in range(number)]
                if number > 1
                else [size // 5]
            )
            limits = [Limits(-1.0, n, per_parameter=bool(sides[0])) for n in needed]
            may_prune = torch.ones(number, size, dtype=torch.bool)
            paths = GreedyBatch(state, may_prune, limits, ["x"] * number)
            counts[f"{name}, {number}"] = list(steps_and_counts(paths.follow))
    linears, masks, columns = consumers(16, 64, 1, 3)
    for number in (1, 128):
        batch = [to_sim(linears[i % 3]) for i in range(number)]
        more = [masks[i % 3] for i in range(number)], columns, [Limits(-1.0, 12)] * number
        counts[f"groups, {number}"] = list(
            steps_and_counts(functools.partial(costs_of_groups, batch, *more))
        )
    return counts


def elsewhere(
    zygote: Zygote, function: Callable[..., object], **arguments: object
) -> Any:
    """Call a function of this module in a process that has the device."""
    asked = {"function": f"{MODULE}:{function.__name__}", "arguments": arguments}
    return zygote.run_module("tests.pretend_accelerator", asked)["returned"]


def test_a_step_has_few_launches_and_one_sync(zygote: Zygote) -> None:
    """A batch has hardly more launches and syncs than one linear."""
    counts = elsewhere(zygote, counts_of_paths)
    for name in ("columns, 1", "columns, 128", "rows and columns, 1"):
        steps, launches, syncs = counts[name]
        assert launches <= 40 * steps, name
        assert syncs <= steps, name
    for name in ("columns", "groups"):
        assert counts[f"{name}, 128"][1] <= 3 * counts[f"{name}, 1"][1], name
        assert counts[f"{name}, 128"][2] <= 3 * counts[f"{name}, 1"][2], name


def differences() -> dict[str, float]:
    """Return the largest relative difference between the costs on the device and on the CPU."""
    found = dict[str, float]()
    linears, masks, _ = consumers(20, 31, 1, 4)
    for structure in ("rows", "columns", "rows_columns"):
        for of, mask in zip(linears[:3], masks, strict=False):
            options = structure, "obs", Limits(-1.0, needed=9, per_parameter=True)
            wide = find_candidates(of, mask, *options)
            narrow = find_candidates(to_sim(of), mask, *options)
            of_sides = (
                _difference(getattr(wide, x), getattr(narrow, x))
                for x in ("rows", "columns")
            )
            found[f"{structure} {len(found)}"] = max(of_sides)
    for width in (1, 2):
        linears, masks, columns = consumers(20, 31, width, 4)
        limits = [Limits(-1.0, needed=n) for n in (3, 5, 0, 2)]
        on_cpu = costs_of_groups(linears, masks, columns, limits)
        on_sim = costs_of_groups(list(map(to_sim, linears)), masks, columns, limits)
        pairs = zip(on_cpu, on_sim, strict=True)
        found[f"groups of {width}"] = max(_difference(a, b) for (_, a), (_, b) in pairs)
    return found


def _difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest relative difference; infinity if other structures are pruned."""
    found = found.cpu().double()
    is_finite = expected.isfinite()
    if not torch.equal(is_finite, found.isfinite()):
        return math.inf
    distance = (found - expected)[is_finite].abs() / expected[is_finite].clamp(min=1e-30)
    return float(distance.max()) if len(distance) else 0.0


def test_device_costs_agree_with_the_cpu(zygote: Zygote) -> None:
    """The CPU computes in float64, the device in float32."""
    for name, difference in elsewhere(zygote, differences).items():
        assert difference < 1e-4, name

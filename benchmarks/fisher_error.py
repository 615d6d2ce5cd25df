"""Error of Kronecker approximations of the Fisher of real linears.

``python -m benchmarks.fisher_error SPEC --linear NAME``.

Compares the dense Fisher of a block of weights (some rows and columns of one linear), over the
calibration tokens of a job spec, with its approximations: identity, activations, KFAC, and sums of
several terms, like Figure 5 of the paper. Runs in one process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

import matplotlib.figure
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ray_surgeon.config.job import parse_spec
from ray_surgeon.distributed.cluster import LocalCluster
from ray_surgeon.distributed.placement import place
from ray_surgeon.distributed.weights import ModelRecipe, load
from ray_surgeon.experimental.extended_kfac.terms import (
    Term,
    power_iteration,
    quadratic_forms,
)
from ray_surgeon.models.hooks import watch_pairs
from ray_surgeon.models.loss import Predicted
from ray_surgeon.preparation.inputs import Inputs, check
from ray_surgeon.report.display import new_console
from ray_surgeon.report.plots import save
from ray_surgeon.storage import files


def token_pairs(
    inputs: Inputs, linears: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return inputs a [N, C] and output gradients g [N, R] of linears for all tokens.

    Raises:
        ValueError: the model has no such linear.
    """
    cluster = LocalCluster(
        inputs.layout, place(inputs.layout, 1, 1), torch.get_num_threads()
    )
    cluster.run_all(load, ModelRecipe(inputs.model), False, cluster.stores)
    ((_, worker),) = cluster.workers.items()
    shard = worker.shard
    if unknown := [name for name in linears if name not in shard.linears]:
        raise ValueError(
            f"--linear: the model has no linear {', '.join(unknown)}; it has for example "
            f"{', '.join(list(shard.linears)[:7])}"
        )
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linears}
    for name, store in seen.items():
        watch_pairs(shard.linears[name], _storing(store))
    assert inputs.spec.curvature is not None
    seed = inputs.spec.curvature.label_seed(0, len(inputs.calibration))
    for number, tokens in enumerate(torch.from_numpy(inputs.calibration)):
        (hidden,) = worker.runner.forward(number, tokens[None])
        generator = None if seed is None else torch.Generator().manual_seed(seed + number)
        _, gradient, _ = worker.runner.loss(
            hidden, Predicted(tokens[None], generator=generator)
        )
        worker.runner.backward(number, [gradient])
    return {
        name: (torch.cat([a for a, _ in store]), torch.cat([g for _, g in store]))
        for name, store in seen.items()
    }


def _storing(store: list[tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], None]:
    return lambda a, g: store.append((a, g))


def terms_of_samples(
    a: Tensor, g: Tensor, first: Sequence[Term], num_terms: int, num_passes: int
) -> list[Term]:
    """Find Kronecker terms of the Fisher from tokens in memory.

    The power method is the same as that of the passes over a text.

    Args:
        a: [N, C].
        g: [N, R].
        first: known terms, e.g. KFAC's.
        num_terms: number of terms, including the known ones.
        num_passes: passes for each new term, alternating between A and G, beginning with A for G =
            I.

    Returns:
        The known terms and the new ones.
    """
    terms = list(first)
    num_tokens = len(a)
    while len(terms) < num_terms:
        G_known = [G for G, _ in terms]
        A_known = [A for _, A in terms]
        unit_G = torch.eye(g.shape[1], dtype=g.dtype, device=g.device) / g.shape[1] ** 0.5
        sigma = 0.0
        unit_A = unit_G
        for number in range(num_passes):
            if number % 2 == 0:
                moment = a.T @ (a * quadratic_forms(g, unit_G)[:, None]) / num_tokens
                unit_A, sigma = power_iteration(
                    moment, list(zip(A_known, G_known, strict=True)), unit_G
                )
            else:
                moment = g.T @ (g * quadratic_forms(a, unit_A)[:, None]) / num_tokens
                unit_G, sigma = power_iteration(
                    moment, list(zip(G_known, A_known, strict=True)), unit_A
                )
        terms.append((unit_G * sigma**0.5, unit_A * sigma**0.5))
    return terms


def block_errors(
    a: Tensor,
    g: Tensor,
    rows: Tensor,
    columns: Tensor,
    max_terms: int,
    num_iterations: int,
) -> dict[str, list[float]]:
    """Return relative Frobenius errors on a block of the Fisher, in float64.

    Args:
        a: [N, C].
        g: [N, R].
        rows: indices.
        columns: indices.
        max_terms: maximum number of Kronecker terms.
        num_iterations: power iterations for each term.

    Returns:
        ``identity`` and ``activations``: one number each, with the best scale for the block;
        ``after KFAC`` (the first term is KFAC's) and ``from the start`` (every term is the best for
        the residual): numbers for 1, 2, ... terms.
    """
    a = a.double()
    g = g.double()
    samples = (g[:, rows, None] * a[:, None, columns]).flatten(1)
    dense = samples.T @ samples / len(a)
    kfac = g.T @ g / len(a), a.T @ a / len(a)

    def inside(terms: Sequence[Term]) -> Tensor:
        return torch.stack(
            [
                torch.kron(
                    G[rows][:, rows].contiguous(), A[columns][:, columns].contiguous()
                )
                for G, A in terms
            ]
        ).sum(dim=0)

    def error(approximation: Tensor) -> float:
        return float(torch.linalg.norm(dense - approximation) / torch.linalg.norm(dense))

    def fitted(approximation: Tensor) -> list[float]:
        return [
            error(
                approximation
                * torch.sum(approximation * dense)
                / torch.sum(approximation.square())
            )
        ]

    after, start = (
        terms_of_samples(a, g, first, max_terms, num_iterations) for first in ([kfac], [])
    )
    one = torch.eye(g.shape[1], dtype=a.dtype)
    return {
        "identity": fitted(inside([(one, torch.eye(a.shape[1], dtype=a.dtype))])),
        "activations": fitted(inside([(one, kfac[1])])),
        "after KFAC": [error(inside(after[:n])) for n in range(1, max_terms + 1)],
        "from the start": [error(inside(start[:n])) for n in range(1, max_terms + 1)],
    }


def errors_table(errors: dict[str, dict[str, list[float]]]) -> Table:
    """Return one line for every linear and approximation."""
    num_terms = max(len(values) for ways in errors.values() for values in ways.values())
    table = Table(title="relative error of a dense block of the Fisher")
    for column in (
        "linear",
        "approximation",
        *(f"{n} term{'s' if n > 1 else ''}" for n in range(1, num_terms + 1)),
    ):
        table.add_column(
            column, justify="left" if column in ("linear", "approximation") else "right"
        )
    for linear, ways in errors.items():
        for way, values in ways.items():
            table.add_row(linear, way, *(f"{value:.4f}" for value in values))
    return table


def error_figure(
    errors: Mapping[str, Mapping[str, Sequence[float]]],
) -> matplotlib.figure.Figure:
    """Plot the errors against the number of Kronecker terms.

    The argument maps linear -> approximation -> errors with 1, 2, ... terms.
    """
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for number, (linear, ways) in enumerate(errors.items()):
        for style, (way, values) in zip(("o-", "s:"), ways.items(), strict=False):
            axes.plot(
                range(1, len(values) + 1),
                values,
                style,
                color=f"C{number}",
                label=f"{linear}, {way}",
            )
    axes.set_xlabel("Kronecker terms")
    axes.set_ylabel("relative error of a dense block of the Fisher")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fisher_error",
        description="Errors of approximations of the Fisher.",
    )
    parser.add_argument(
        "spec", help="job spec with the model, calibration and curvature.fisher"
    )
    parser.add_argument(
        "--linear",
        action="append",
        required=True,
        help="name of a linear, e.g. model.layers.0.mlp.down_proj; repeatable",
    )
    parser.add_argument(
        "--rows", type=int, default=24, help="rows of the block, evenly spaced"
    )
    parser.add_argument(
        "--columns", type=int, default=24, help="columns of the block, evenly spaced"
    )
    parser.add_argument(
        "--max-terms", type=int, default=6, help="maximum number of Kronecker terms"
    )
    parser.add_argument(
        "--iterations", type=int, default=10, help="power iterations for each term"
    )
    parser.add_argument(
        "--plot",
        default="fisher-error.png",
        metavar="FILE",
        help="plot; the numbers go to a .json file of the same name",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.field=value",
        help="override a field of the spec",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 2 for bad input."""
    arguments = _arguments(argv)
    errors_console = Console(stderr=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            spec = parse_spec(
                files.read_text(arguments.spec),
                [*arguments.set, f"output.uri={scratch}/run"],
            )
            inputs = check(spec, dry_run=True)
        pairs = token_pairs(inputs, arguments.linear)
        errors = {}
        for name, (a, g) in pairs.items():
            rows = torch.linspace(
                0, g.shape[1] - 1, min(arguments.rows, g.shape[1])
            ).long()
            columns = torch.linspace(
                0, a.shape[1] - 1, min(arguments.columns, a.shape[1])
            ).long()
            errors[name] = block_errors(
                a, g, rows, columns, arguments.max_terms, arguments.iterations
            )
        curves = {
            name: {way: ways[way] for way in ("after KFAC", "from the start")}
            for name, ways in errors.items()
        }
        save(error_figure(curves), arguments.plot)
        files.write_text(
            arguments.plot.rpartition(".")[0] + ".json", json.dumps(errors, indent=2)
        )
    except (OSError, ValueError, ValidationError) as error:
        errors_console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    console = new_console()
    console.print(errors_table(errors))
    console.print(f"plot: {arguments.plot}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

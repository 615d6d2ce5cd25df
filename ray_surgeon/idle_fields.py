"""Fields of a job spec that something else in it makes idle. An option that would be ignored is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel

if TYPE_CHECKING:
    from ray_surgeon.spec import JobSpec


def idle_fields(spec: JobSpec) -> Iterator[str]:
    """Yield every field that is set to something else than its default and that the rest of the spec makes idle."""
    curvature, pruning, updates = spec.curvature, spec.pruning, spec.updates
    by_element = pruning.structure in ("element", "n_m")
    full = updates.correlations == "full"
    if spec.cluster.backend == "local":
        yield from _changed(spec.cluster, "cluster", "backend local", "ping_timeout_s", "retries")
    if pruning.method != "llm_surgeon":
        why = f"pruning.method {pruning.method}"
        yield from _changed(pruning, "pruning", why, "groups", "allocation", "width_multiple", "remove_blocks")
        yield from _changed(pruning, "pruning", why, "costs", "group_costs", "selection", "rank_by")
        yield from _changed(curvature, "curvature", why, "kind", "fisher", "seed", "num_kronecker_terms", "num_power_passes", "first_term")
        yield from _changed(updates, "updates", why, *type(updates).model_fields)
        if pruning.method == "wanda":
            yield from _changed(curvature, "curvature", why, "damping", "max_damping")
        return
    if pruning.structure != "groups":
        yield from _changed(pruning, "pruning", f"structure {pruning.structure}", "groups", "allocation", "width_multiple", "remove_blocks")
    else:
        yield from _changed(pruning, "pruning", "structure groups", "selection", "costs")
        yield from _changed(updates, "updates", "structure groups", "joint", "correlations")
        yield from _changed(curvature, "curvature", "structure groups", "num_kronecker_terms")
        if pruning.allocation == "uniform":
            yield from _changed(pruning, "pruning", "allocation uniform", "rank_by", "remove_blocks")
    if by_element:
        yield from _changed(updates, "updates", f"structure {pruning.structure}", "joint")
        yield from _changed(pruning, "pruning", f"structure {pruning.structure}", "selection", "rank_by")
    if pruning.structure != "n_m":
        yield from _changed(pruning, "pruning", f"structure {pruning.structure}", "n_m", "group_costs")
    if not by_element or not full:
        why = f"structure {pruning.structure}, correlations {updates.correlations}"
        yield from _changed(updates, "updates", why, "solver", "precision", "num_iterations", "tolerance", "max_correlate")
    elif updates.solver == "chunks":
        yield from _changed(updates, "updates", "solver chunks", "precision", "num_iterations", "tolerance", "first_order_step")
    else:
        yield from _changed(updates, "updates", "solver conjugate_gradients", "max_correlate")
    if not full:
        yield from _changed(updates, "updates", f"correlations {updates.correlations}", "joint", "first_order_step")
    if pruning.structure in ("rows", "columns"):
        yield from _changed(updates, "updates", f"structure {pruning.structure}", "joint")
    if pruning.costs == "obd":
        yield from _changed(pruning, "pruning", "costs obd", "group_costs")
        if pruning.selection == "greedy":
            yield "pruning.selection (costs obd)"
    if curvature.kind != "kfac":
        why = f"curvature.kind {curvature.kind}"
        yield from _changed(curvature, "curvature", why, "fisher", "num_kronecker_terms", "first_term")
        yield from _changed(updates, "updates", why, "first_order_step")
    if curvature.fisher == "empirical":
        yield from _changed(curvature, "curvature", "fisher empirical", "seed")
    if not curvature.takes_power_passes:
        yield from _changed(curvature, "curvature", "one term, KFAC's", "num_power_passes")


def _changed(section: BaseModel, path: str, why: str, *names: str) -> Iterator[str]:
    for name in names:
        if getattr(section, name) != type(section).model_fields[name].default:
            yield f"{path}.{name} ({why})"

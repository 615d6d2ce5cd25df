"""Checked inputs are run: on Ray, or with all workers in this process."""

from __future__ import annotations

from collections.abc import Callable

from ray_surgeon.report.directory import RunDirectory
from ray_surgeon.report.display import Display
from ray_surgeon.run.caller import own_modes
from ray_surgeon.run.inputs import Inputs
from ray_surgeon.run.loop import run_shots
from ray_surgeon.run.result import PruneResult
from ray_surgeon.runtime.local import LocalCluster
from ray_surgeon.spec.cluster import RaySection


def ended_before(inputs: Inputs, say: Callable[[str], None]) -> PruneResult | None:
    """Return the run of these very inputs if it has ended, with its exports.

    Nothing is to be done then.
    """
    directory = RunDirectory(inputs.spec.output.uri)
    report = directory.report_if_finished(inputs.spec.model_dump(mode="json"))
    if report is None:
        return None
    say("this run has ended before, and its exports are there; nothing is done again")
    return PruneResult(directory.uri, report)


@own_modes()
def run(inputs: Inputs, display: Display, *, disconnects: bool = False) -> PruneResult:
    """Run checked inputs on Ray, or with all workers in this process.

    Args:
        inputs: checked.
        display: shows events.
        disconnects: whether to disconnect this process from Ray afterwards even if it was connected
            before.
    """
    section = inputs.spec.cluster
    directory = RunDirectory(inputs.spec.output.uri)
    if isinstance(section, RaySection):
        from ray_surgeon.run import driver  # Ray is imported only if it is used

        if not driver.is_connected():
            display.note(f"running on {driver.connect_to_ray(inputs)}")
            disconnects = True
        try:
            driver.run_on_ray(inputs, display)
        finally:
            if disconnects:
                driver.disconnect()
    else:
        cluster = LocalCluster(
            inputs.layout, inputs.placement, section.cpus_per_worker, section.device
        )
        try:
            run_shots(inputs, cluster, directory, display)
        finally:
            cluster.close()
    return PruneResult(directory.uri, directory.report())

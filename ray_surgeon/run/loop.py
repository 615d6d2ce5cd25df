"""A run is a list of stages, shot by shot. This page knows workers and stages, and no feature."""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable

from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.plan.device_resources import device_of, look_around, shared
from ray_surgeon.plan.plan import DoesNotFitError, Plan
from ray_surgeon.report.directory import RunDirectory, TakenOverError
from ray_surgeon.report.events import Event, Moment, Steps
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.report.record import RunReport
from ray_surgeon.run.inputs import Inputs
from ray_surgeon.run.stages import Stages
from ray_surgeon.runtime.cluster import Cluster, WorkerFailureError
from ray_surgeon.runtime.usage import versions
from ray_surgeon.runtime.worker import clean_up
from ray_surgeon.stages.stage import RunState, Stage

_PAUSE_S = 5.0
"""Between two looks at memory that is to become free."""
_PATIENCE_S = 60.0
"""How long memory is waited for after a loss: workers that are about to end still hold it."""

Listener = Callable[[Event | Moment], None]
"""Is called with the event of every step, and with moments inside of long ones."""


def run_shots(inputs: Inputs, workers: Cluster, directory: RunDirectory, listen: Listener) -> None:
    """Prune the model shot by shot; every shot is committed.

    A run continues after the last commit. What workers have on their disks is removed at
    the end, and after errors of the work.

    Args:
        inputs: checked.
        workers: without weights.
        directory: a run directory that was checked for these inputs.
        listen: see `Listener`.

    Raises:
        DoesNotFitError: the workers' memory is too small, whatever is kept where; nothing has
            started then.
        TakenOverError: another try of this run has begun meanwhile.
        FloatingPointError: a loss, factor or cost is not usable; committed shots stay.
        CollapseError: perplexity is above the limit of the spec; committed shots stay.
    """
    try:
        _run_stages(_begun(inputs, workers, directory, listen), inputs.stages)
    except BaseException as error:
        reported = _last_words(directory, error)
        if isinstance(reported, Exception) and not isinstance(reported, WorkerFailureError):
            with contextlib.suppress(Exception):
                workers.clean_up()
        if reported is error:
            raise
        raise reported from error
    workers.run_all(clean_up)


def _run_stages(run: RunState, stages: Stages) -> None:
    for stage in stages.before_shots:
        _perform(stage, run, run.num_done if stage.name == "load" else 0)
    for shot in range(run.num_done + 1, run.num_shots + 1):
        run.begin_shot(shot)
        for stage in _left(stages.of_a_shot, run):
            _perform(stage, run, shot)
        run.cluster.leave_if_told()
    run.directory.write_report(run.report.as_record())  # without exports of an earlier try
    for stage in stages.after_shots:
        _perform(stage, run, run.num_shots)
    run.kept(LivePage).draw(run.report.as_record(), final=True)
    # last: a run whose report is whole has ended
    run.directory.write_report(run.report.as_record())


def _left(of_a_shot: tuple[Stage, ...], run: RunState) -> tuple[Stage, ...]:
    """Return the stages of a shot from the one on that has committed a part of it."""
    names = [stage.name for stage in of_a_shot]
    return of_a_shot[names.index(run.part.record["stage"]) if run.part else 0 :]


def _perform(stage: Stage, run: RunState, shot: int) -> None:
    if stage.of_dense_model and run.resumes:
        return
    with run.steps(stage.name, shot) as facts:
        stage.run(run, facts)
    stage.ended(run)


def _begun(inputs: Inputs, workers: Cluster, directory: RunDirectory, listen: Listener) -> RunState:
    """Plan, take the run directory, and return a run that knows what earlier tries have done."""
    spec = inputs.spec
    name = hashlib.sha256(directory.uri.encode()).hexdigest()[:16]  # the same for every try
    scratch = ScratchNames(spec.memory.scratch, name, uuid.uuid4().hex)
    plan = _plan(inputs, workers, scratch, _PATIENCE_S if directory.retries() else 0.0)
    workers.stores = plan.stores
    directory.start(inputs.spec_yaml, inputs.fingerprints)
    layout = inputs.layout
    settings = spec.model_dump(mode="json")
    report = RunReport(settings, inputs.fingerprints, versions(), layout.num_parameters)
    report.shots = [directory.read_shot(i).record for i in directory.committed_indices()]
    report.retries = directory.retries()
    report.plan = plan.as_record()
    num_done = len(report.shots)
    part = directory.read_part(num_done + 1)
    if num_done:
        report.dense = report.shots[-1]["dense"]
        directory.remove_part(num_done)  # of a try that was interrupted
    elif part is not None:
        report.dense = part.record["dense"]
    num_shots = spec.schedule.shots
    steps = Steps(workers, directory, num_shots, listen)
    workers.progress.listener = lambda: listen(steps.moment())
    with steps("plan") as facts:
        peaks = plan.peaks().values()
        facts |= plan.places | {"peak_gib": max(map(max, peaks)) / 2**30}
    texts = (inputs.calibration, inputs.text, inputs.texts)
    job = (layout, inputs.model, *texts, inputs.stages.all, num_shots, num_done, part)
    run = RunState(workers, directory, report, steps, *job)
    for thing in (scratch, inputs.method, LivePage(directory)):
        run.keep(thing)
    return run


def _last_words(directory: RunDirectory, error: BaseException) -> BaseException:
    """Write the events of a run that failed, and return the error to tell.

    Nothing is written if another try has the folder.
    """
    # whatever a store's client raises now, the first error is the one to tell
    with contextlib.suppress(Exception):
        try:
            directory.check_attempt()
            directory.write_events()
        except TakenOverError as taken:
            if isinstance(error, Exception):  # what failed may be what the other try has taken away
                return taken
    return error


def _plan(inputs: Inputs, workers: Cluster, scratch: ScratchNames, patience_s: float) -> Plan:
    """Return how the job runs in the memory that there is.

    If it does not fit, more is waited for so long.
    """
    until_s = time.monotonic() + patience_s
    while True:
        machines = workers.run_all(look_around, *scratch)
        room = shared(machines)
        try:
            section = inputs.spec.cluster
            device = device_of(machines, section.cpus_per_worker, section.device_speed)
            return inputs.plan(room, device)
        except DoesNotFitError:
            if time.monotonic() >= until_s:
                raise
        time.sleep(_PAUSE_S)

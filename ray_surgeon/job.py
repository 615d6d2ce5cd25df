"""A job, from top to bottom.

`run_job` plans and takes the run directory; `run_steps` measures the dense model, prunes it shot by
shot, and writes the exports. Each step is measured and emits an event when it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from ray_surgeon.checkpointing import RunDirectory, TakenOverError
from ray_surgeon.distributed.cluster import Cluster, WorkerFailureError
from ray_surgeon.distributed.memory_plan.device_resources import (
    device_of,
    look_around,
    shared,
)
from ray_surgeon.distributed.memory_plan.planner import DoesNotFitError, Plan
from ray_surgeon.distributed.processes import versions
from ray_surgeon.distributed.worker import clean_up
from ray_surgeon.evaluation.answers import Answers, measure_acceptance
from ray_surgeon.evaluation.texts import measure_dense_model
from ray_surgeon.export.exports import LoadSize
from ray_surgeon.memory.stores import ScratchNames
from ray_surgeon.preparation.inputs import Inputs
from ray_surgeon.preparation.stages import ExportStep, Stages
from ray_surgeon.pruning.coupled_groups import Groups
from ray_surgeon.pruning.method import Choice, Method, Ranking
from ray_surgeon.pruning.methods import apply_choice
from ray_surgeon.report.events import Event, PlannedStep, ProgressReport, Steps
from ray_surgeon.report.html_report import LivePage
from ray_surgeon.report.record import RunReport
from ray_surgeon.run_state import RunState, Text, load_model

_PAUSE_S = 5.0
"""Between two looks at memory that is to become free."""
_PATIENCE_S = 60.0
"""How long memory is waited for after a loss: workers that are about to end still hold it."""

Listener = Callable[[Event | ProgressReport], None]
"""Is called with the event of every step, and with progress reports inside of long ones."""


def run_job(
    inputs: Inputs, workers: Cluster, directory: RunDirectory, listen: Listener
) -> None:
    """Prune a model shot by shot; every shot is committed.

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
        run = _begin(inputs, workers, directory, listen)
        run_steps(run, inputs.stages, inputs.method)
    except BaseException as error:
        reported = _last_words(directory, error)
        if isinstance(reported, Exception) and not isinstance(
            reported, WorkerFailureError
        ):
            with contextlib.suppress(Exception):
                workers.clean_up()
        if reported is error:
            raise
        raise reported from error
    workers.run_all(clean_up)


def run_steps(run: RunState, stages: Stages, method: Method) -> None:
    """Measure the dense model, prune it in all shots that are left, and write the exports."""
    run.steps.announce(steps_to_come(run, stages))
    if stages.teacher is None:
        _load(run, method)
    elif not run.resumes:
        with run.steps("teacher"):
            stages.teacher.load(run)
    answers = measure_dense(run, stages)
    if stages.teacher is not None:
        _load(run, method)

    for shot in range(run.num_done + 1, run.num_shots + 1):
        run.begin_shot(shot)
        # else an earlier try has come as far as the recovery of this shot
        if run.part is None:
            method = prune_once(run, stages, method)
            if answers is not None and stages.recovery is not None:
                with run.steps("answers", shot) as facts:
                    measure_acceptance(run, answers, facts)
        finish_shot(run, stages, answers)
        run.cluster.leave_if_told()

    # without exports of an earlier try
    run.directory.write_report(run.report.as_record())
    write_exports(run, stages.exports)
    run.page.draw(run.report.as_record(), final=True)
    # last: a run whose report is whole has ended
    run.directory.write_report(run.report.as_record())


def steps_to_come(run: RunState, stages: Stages) -> list[PlannedStep]:
    """Return the steps of a run that has not begun or resumes, in the order of `run_steps`."""
    steps = stages.steps_before(run.num_done, resumes=run.resumes)
    in_recovery = run.part is not None
    for shot in range(run.num_done + 1, run.num_shots + 1):
        steps += stages.steps_of_shot(shot, in_recovery=in_recovery)
        in_recovery = False
    steps += [(export.name, run.num_shots) for export in stages.exports]
    return steps


def _load(run: RunState, method: Method) -> None:
    """Load the dense model, or the last commit of a run that resumes."""
    with run.steps("load", run.num_done) as facts:
        load_model(run, facts, by_element=method.by_element)
        if run.resumes:
            method.after_resuming(run.cluster)


def measure_dense(run: RunState, stages: Stages) -> Answers | None:
    """Let the dense model write its texts and answers, and measure it.

    A run that goes on reads the texts and answers that an earlier try has written.

    Returns:
        The dense model's answers to prompts, if the job compares any.
    """
    answers = None
    if stages.self_text is not None:
        with run.steps("sampling") as facts:
            stages.self_text.fill_in(run, facts)
    if stages.dense_answers is not None:
        with run.steps("answers") as facts:
            answers = stages.dense_answers.collect(run, facts)
    if run.resumes:
        return answers
    further: Mapping[str, Text] = {}
    if stages.recovery is not None:
        further = stages.recovery.texts_to_remember(run.text)
    with run.steps("evaluation") as facts:
        measure_dense_model(run, further, facts)
    if stages.tasks is not None:
        with run.steps("tasks"):
            stages.tasks.measure_dense_model(run)
    return answers


def prune_once(run: RunState, stages: Stages, method: Method) -> Method:
    """Prune in the present shot: curvature, costs, the one global threshold, and the update.

    Returns:
        The method, which knows the layers that are gone.
    """
    shot = run.shot
    cluster = run.cluster
    if stages.depth is not None:
        assert isinstance(method, Groups)
        with run.steps("depth", shot) as facts:
            method = stages.depth.remove_layers(run, method, facts)
    if stages.curvature is None:  # nothing is ranked, or block after block
        with run.steps("update", shot) as facts:
            apply_choice(run, method, None, Choice(None, {}), facts)
    else:
        # the damping that is chosen is the shot's alone
        with run.steps("curvature", shot) as facts:
            ranking = stages.curvature.collect(run, method, facts)
        assert isinstance(ranking, Ranking)
        with run.steps("costs", shot) as facts:
            scores = ranking.score(cluster, shot)
            facts["damping_raised"] = len(scores.raised_damping)
        with run.steps("threshold", shot) as facts:
            choice = ranking.choose(cluster, scores, shot)
            run.record.update({"threshold": choice.threshold, **choice.record})
            facts.update(choice.facts)
        with run.steps("update", shot) as facts:
            apply_choice(run, ranking, scores, choice, facts)
    if stages.reconstruction is not None:
        # the update has trained each layer, while its factors were there
        with run.steps("reconstruction", shot) as facts:
            stages.reconstruction.report(run, facts)
    return method


def finish_shot(run: RunState, stages: Stages, answers: Answers | None) -> None:
    """Train the pruned model, measure it, and commit the shot.

    Raises:
        CollapseError: a perplexity is above the limit of the spec.
    """
    shot = run.shot
    if stages.recovery is not None:
        with run.steps("recovery", shot) as facts:
            stages.recovery.train(run, facts)
    with run.steps("evaluation", shot) as facts:
        stages.evaluation.measure(run, facts)
    stages.evaluation.check_limit(run)
    if stages.answers is not None:
        assert answers is not None
        with run.steps("answers", shot) as facts:
            stages.answers.compare(run, answers, facts)
    with run.steps("commit", shot) as facts:
        stages.commit.write(run, facts)
    run.directory.write_events()  # with the commit's own


def write_exports(run: RunState, exports: Sequence[ExportStep]) -> None:
    """Write every export, and load the weights of the smaller sizes of a family for theirs."""
    for step in exports:
        with run.steps(step.name, run.num_shots) as facts:
            if isinstance(step, LoadSize):
                step.load(run, facts)
            else:
                step.write(run, facts)


def _begin(
    inputs: Inputs, workers: Cluster, directory: RunDirectory, listen: Listener
) -> RunState:
    """Plan, take the run directory, and return a run that knows what earlier tries have done."""
    spec = inputs.spec
    # the same for every try
    name = hashlib.sha256(directory.uri.encode()).hexdigest()[:16]
    scratch = ScratchNames(spec.memory.scratch, name, uuid.uuid4().hex)
    plan = _plan(inputs, workers, scratch, _PATIENCE_S if directory.retries() else 0.0)
    workers.stores = plan.stores
    directory.start(inputs.spec_yaml, inputs.fingerprints)
    layout = inputs.layout
    settings = spec.model_dump(mode="json")
    report = RunReport(settings, inputs.fingerprints, versions(), layout.num_parameters)
    report.shots = [directory.read_shot(i).record for i in directory.committed_indices()]
    report.retries = directory.retries()
    report.left_whole = layout.left_whole
    report.source_bytes = inputs.source_bytes
    report.proof = inputs.proof
    report.plan = plan.as_record()
    report.ended_steps.extend(directory.ended_steps())
    num_done = len(report.shots)
    part = directory.read_part(num_done + 1)
    if num_done:
        report.dense = report.shots[-1]["dense"]
        directory.remove_part(num_done)  # of a try that was interrupted
    elif part is not None:
        report.dense = part.record["dense"]
    num_shots = spec.schedule.shots
    steps = Steps(workers, directory, num_shots, listen, report.ended_steps)
    workers.progress.listener = lambda: listen(steps.progress_report())
    with steps("plan") as facts:
        peaks = plan.peaks().values()
        facts.update(plan.places)
        facts["peak_gib"] = max(map(max, peaks)) / 2**30
    return RunState(
        cluster=workers,
        directory=directory,
        report=report,
        steps=steps,
        layout=layout,
        model=inputs.model,
        calibration=inputs.calibration,
        text=inputs.text,
        texts=inputs.texts,
        scratch=scratch,
        page=LivePage(directory),
        num_shots=num_shots,
        num_done=num_done,
        part=part,
    )


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
            # the failure may be due to the other try, which has taken the run over
            if isinstance(error, Exception):
                return taken
    return error


def _plan(
    inputs: Inputs, workers: Cluster, scratch: ScratchNames, patience_s: float
) -> Plan:
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

"""Loads the teacher of a training beside a worker's own model."""

from __future__ import annotations

from dataclasses import replace

import torch

from ray_surgeon.distributed.dense_states import STREAM, forget_states
from ray_surgeon.distributed.weights import ModelRecipe, new_scratch, reader_of
from ray_surgeon.distributed.worker import Worker
from ray_surgeon.distributed.worker_state import Teacher
from ray_surgeon.memory.stores import Place
from ray_surgeon.memory.weights import ReadAhead
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard


def load_teacher(worker: Worker, recipe: ModelRecipe, place: Place) -> None:
    """Load the worker's blocks of the teacher beside the worker's own weights.

    Args:
        worker: has loaded its own weights.
        recipe: where the teacher's weights are.
        place: where the teacher's idle weights are kept.
    """
    scratch = new_scratch(worker, recipe.scratch, suffix="-teacher")
    layout, blocks = recipe.part(worker)
    shard = ModelShard(
        layout=layout,
        blocks=blocks,
        dtype=getattr(torch, recipe.model.dtype),
        device=worker.device,
        stores=replace(worker.shard.stores, weights=place),
        scratch=scratch,
    )
    read, stays = reader_of(worker, recipe)
    if not stays:
        read = ReadAhead(read, list(shard.wanted), layout.parameters)
    shard.load(read, stays=stays)
    worker.state.teacher = Teacher(shard, BlockRunner(shard), scratch)


def drop_teacher(worker: Worker) -> None:
    """Free the teacher and the states that it gave."""
    teacher = worker.state.teacher
    assert teacher is not None
    worker.state.teacher = None
    teacher.scratch.close()
    forget_states(worker, STREAM)

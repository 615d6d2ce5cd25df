"""The model to train towards, beside the worker's own."""

from __future__ import annotations

from dataclasses import replace

import torch

from ray_surgeon.memory.stores import Place, Scratch
from ray_surgeon.memory.weights import ReadAhead
from ray_surgeon.models.runner import BlockRunner
from ray_surgeon.models.shard import ModelShard
from ray_surgeon.runtime.dense_states import STREAM, forget_states
from ray_surgeon.runtime.weights import ModelRecipe, reader_of
from ray_surgeon.runtime.worker import Worker
from ray_surgeon.runtime.worker_state import Teacher


def load_teacher(worker: Worker, recipe: ModelRecipe, place: Place) -> None:
    """Load the blocks of the model to train towards, beside those of the worker.

    Args:
        worker: with its own weights.
        recipe: of that model.
        place: where its idle weights are.
    """
    index = worker.index
    scratch = Scratch(*recipe.scratch, f"{index.shard}-{index.replica}-teacher")
    layout, blocks = recipe.part(worker)
    dtype = getattr(torch, recipe.model.dtype)
    stores = replace(worker.shard.stores, weights=place)
    shard = ModelShard(layout, blocks, dtype, worker.device, stores, scratch)
    read, stays = reader_of(worker, recipe)
    if not stays:
        read = ReadAhead(read, list(shard.wanted), layout.parameters)
    shard.load(read, stays=stays)
    worker.state.teacher = Teacher(shard, BlockRunner(shard), scratch)


def drop_teacher(worker: Worker) -> None:
    """Free the second model, and its states."""
    teacher = worker.state.teacher
    assert teacher is not None
    worker.state.teacher = None
    teacher.scratch.close()
    forget_states(worker, STREAM)

"""Seconds of a request as a budget: a sum over blocks, by their widths.

The seconds are read from a table that was measured in the serving engine; see
examples/engine_table.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from ray_surgeon.config.base import REASON, refusing
from ray_surgeon.config.schedule import SpeedSection, TimedTarget
from ray_surgeon.errors import ConfigError
from ray_surgeon.models.budgets import Budget
from ray_surgeon.models.layers import LAYER_KINDS, layers_of
from ray_surgeon.models.layout import ModelLayout
from ray_surgeon.storage import files

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Pair = tuple[_Seconds, _Seconds]
_SecondsByNumber = Annotated[dict[NonNegativeInt, _Pair], Field(min_length=1)]


class _Table(BaseModel):
    """The entries of a table that are used; others are ignored.

    Seconds are pairs: for the prompts, and for the new tokens.
    """

    model_config = ConfigDict(hide_input_in_errors=True)
    request: SpeedSection
    num_blocks: PositiveInt
    channels: _SecondsByNumber  # number of channels of a block -> its seconds
    kv_heads: _SecondsByNumber  # number of KV heads of a block -> its seconds
    rest: _Pair  # seconds outside the blocks


def budget_in(uri: str, layout: ModelLayout, target: TimedTarget) -> Budget:
    """Return a budget from a table, linear between the widths that were measured.

    Raises:
        ValueError: the file is not a table, or is a table of another model.
    """
    table = _read(uri)
    own = (layout.num_blocks, layout.num_channels, layout.heads.num_kv)
    found = (table.num_blocks, max(table.channels), max(table.kv_heads))
    if own != found:
        raise ConfigError(
            field="pruning.target",
            found=(
                f"the table {uri} is of a model with {found} blocks, feed-forward "
                f"channels and KV heads, but this one has {own}"
            ),
            remedy="give one that examples/engine_table.py wrote for this model",
        )
    request = table.request
    num_tokens = 1
    if target.of_decode:
        num_tokens = request.batch_size * request.num_new_tokens

    def needs_of(parts: tuple[float, float]) -> float:
        of_prompts, of_new_tokens = parts
        seconds = of_new_tokens if target.of_decode else of_prompts + of_new_tokens
        return seconds / num_tokens

    ffn = _of_each_number({n: needs_of(parts) for n, parts in table.channels.items()})
    heads = _of_each_number({n: needs_of(parts) for n, parts in table.kv_heads.items()})
    by_left = {
        "ffn": ffn,
        # relative to all heads, whose seconds are included in those of the channels
        "attention": tuple(seconds - heads[-1] for seconds in heads),
    }
    parts_of_layers = {
        "blocks": ffn[-1],
        "ffn_layers": ffn[-1] - ffn[0],
        "attention_layers": by_left["attention"][-1] - by_left["attention"][0],
    }
    layers = layers_of(layout, LAYER_KINDS)
    return Budget(
        unit="seconds a new token" if target.of_decode else "latency_s",
        fixed=needs_of(table.rest),
        by_left=by_left,
        num_consumers=dict.fromkeys(by_left, layout.num_blocks),
        of_layers={layer.key: parts_of_layers[layer.kind] for layer in layers},
    )


def _read(uri: str) -> _Table:
    message = f"pruning.target: the table {uri} cannot be used: {REASON}"
    remedy = "give one that examples/engine_table.py wrote for this model"
    with refusing(message, remedy, (OSError, ValueError)):
        return _Table.model_validate(files.read_json(uri))


def _of_each_number(measured: Mapping[int, float]) -> tuple[float, ...]:
    """Return the seconds with 0, 1, ... groups left.

    Values are linear between measured numbers and extrapolated below the lowest from the lowest
    two. They never decrease, and none is above that of all groups.
    """
    numbers = sorted(measured)
    seconds = np.array([measured[number] for number in numbers])
    rising = np.maximum.accumulate(np.minimum(seconds, seconds[-1])).tolist()
    if numbers[0] and len(numbers) > 1:
        slope = (rising[1] - rising[0]) / (numbers[1] - numbers[0])
        rising.insert(0, max(0.0, rising[0] - slope * numbers[0]))
        numbers.insert(0, 0)
    interpolated = np.interp(range(numbers[-1] + 1), numbers, rising)
    return tuple(float(value) for value in interpolated)

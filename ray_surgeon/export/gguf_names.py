"""llama.cpp's names of the parameters of a model; it stacks those of a mixture's experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import gguf

from ray_surgeon.errors import ConfigError
from ray_surgeon.models.checkpoint import Shape, parameters_in
from ray_surgeon.models.families import LlamaCpp
from ray_surgeon.models.layout import ModelLayout


@dataclass(frozen=True)
class GGUFTensor:
    """The parameters that one tensor of llama.cpp is made of."""

    names: list[str]  # of parameters, as in memory here
    is_stack: bool  # whether they are stacked along a further, first dimension

    def shape(self, of_one: Shape) -> Shape:
        """Return the tensor's shape, given a parameter's."""
        if self.is_stack:
            return (len(self.names), *of_one)
        return of_one


class Names:
    """llama.cpp's names of a model's parameters."""

    def __init__(self, layout: ModelLayout, architecture: LlamaCpp) -> None:
        """Look up the names of an architecture."""
        self._family = layout.family
        self._architecture = architecture.name
        number = gguf.MODEL_ARCH[architecture.name.upper().replace("-", "_")]
        self._names = gguf.get_tensor_name_map(number, layout.num_blocks)

    def places(self, names: Iterable[str]) -> dict[str, GGUFTensor]:
        """Return llama.cpp's name of each tensor -> the parameters it is made of.

        Args:
            names: names of the parameters.

        Raises:
            ValueError: llama.cpp has no place for a parameter.
        """
        parts = defaultdict[str, list[tuple[int | None, str]]](list)
        for name in names:
            whole, number = self._family.sparse.together(name)
            parts[self._place(whole)].append((number, name))
        places = {}
        for place, numbered in parts.items():
            first_number, _ = numbered[0]
            in_order = [name for _, name in sorted(numbered)]
            places[place] = GGUFTensor(in_order, is_stack=first_number is not None)
        return places

    def stored(self, shapes: Mapping[str, Shape]) -> dict[str, tuple[GGUFTensor, Shape]]:
        """Return llama.cpp's name of each tensor -> its parameters in a checkpoint, and its shape.

        Args:
            shapes: name of each tensor in the checkpoint -> its shape.

        Raises:
            ValueError: llama.cpp has no place for a parameter.
        """
        shape_of = dict[str, Shape]()
        for key, shape in shapes.items():
            shape_of.update(parameters_in(self._family, key, shape))
        stored = {}
        for name, place in self.places(shape_of).items():
            stored[name] = (place, place.shape(shape_of[place.names[0]]))
        return stored

    def _place(self, name: str) -> str:
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(
                field="output.exports",
                found=f"gguf: llama.cpp's {self._architecture} has no place for {name}",
                remedy="export uniform or per_block",
            )
        if found.endswith((".weight", ".bias")):
            return found
        return f"{found}.weight"

"""Where llama.cpp has the parameters of a model: its names, and those of a mixture stacked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import gguf

from ray_surgeon.models.checkpoint import Shape, parameters_in
from ray_surgeon.models.families import LlamaCpp
from ray_surgeon.models.layout import ModelLayout


@dataclass(frozen=True)
class Place:
    """What a tensor of llama.cpp is made of."""

    names: list[str]  # of parameters, as they are called in memory here
    is_stack: bool  # whether it has several along a dimension of its own

    def shape(self, of_one: Shape) -> Shape:
        """Return the tensor's shape, given a parameter's."""
        return (len(self.names), *of_one) if self.is_stack else of_one


class Names:
    """llama.cpp's names of a model's parameters."""

    def __init__(self, layout: ModelLayout, architecture: LlamaCpp) -> None:
        """Take the names of an architecture."""
        self._family = layout.family
        self._architecture = architecture.name
        number = gguf.MODEL_ARCH[architecture.name.upper().replace("-", "_")]
        self._names = gguf.get_tensor_name_map(number, layout.num_blocks)

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """Return llama.cpp's name of a tensor -> which of the parameters it has.

        Raises:
            ValueError: there is no place for one.
        """
        parts = defaultdict[str, list[tuple[int | None, str]]](list)
        for name in names:
            whole, number = self._family.sparse.together(name)
            parts[self._place(whole)].append((number, name))
        return {
            place: Place([name for _, name in sorted(found)], found[0][0] is not None)
            for place, found in parts.items()
        }

    def stored(self, shapes: Mapping[str, Shape]) -> dict[str, tuple[Place, Shape]]:
        """Return the same of the parameters of a checkpoint, and the shapes of the tensors.

        Args:
            shapes: of the checkpoint's own tensors.
        """
        own = dict(one for item in shapes.items() for one in parameters_in(self._family, *item))
        places = self.places(own)
        return {name: (place, place.shape(own[place.names[0]])) for name, place in places.items()}

    def _place(self, name: str) -> str:
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            problem = f"llama.cpp's {self._architecture} has no place for {name}"
            raise ValueError(f"output.exports: gguf: {problem}; export uniform or per_block")
        return found if found.endswith((".weight", ".bias")) else f"{found}.weight"

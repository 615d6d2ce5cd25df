"""Errors for the user of a job spec."""

from __future__ import annotations


class ConfigError(ValueError):
    """A field of a job spec that cannot be used, or that conflicts with others or with the model.

    Args:
        field: path of the field, such as ``pruning.groups``. A section names its own fields without
            the section, which is added when the spec is parsed.
        found: the problem, with the value that was found.
        remedy: advice for the user.
    """

    def __init__(self, field: str, found: str, remedy: str) -> None:
        super().__init__(f"{field}: {found}; {remedy}")
        self.field = field
        self.found = found
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str, str]]:
        """Return the arguments again, so that the error reaches a driver from its workers."""
        return type(self), (self.field, self.found, self.remedy)

"""The language model in a checkpoint that also reads images or sound.

The configuration of such a checkpoint has a ``text_config``, and the names of the language model's
tensors have prefixes of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_PREFIXES: tuple[Mapping[str, str], ...] = (
    {"model.language_model.": "model.", "lm_head.": "lm_head."},
    {"language_model.": ""},
    {"model.text_model.": "model.", "lm_head.": "lm_head."},
    {"model.": "model.", "lm_head.": "lm_head."},
)
"""Each: prefix in the checkpoint -> prefix in a checkpoint of the language model alone.

A checkpoint follows the first of these whose first prefix it has.
"""
_OF_THE_WHOLE = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
"""Fields of the configuration that hold for the language model, too."""


def is_wrapped(document: Any) -> bool:
    """Return whether config.json is that of a checkpoint with a language model inside."""
    if not isinstance(document, Mapping):
        return False
    text = document.get("text_config")
    return isinstance(text, Mapping) and isinstance(text.get("model_type"), str)


def language_model_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the language model alone.

    Args:
        document: config.json of the whole checkpoint.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = dict(document["text_config"])
    # both classes may have defaults, and the whole model ties its weights by its own
    if document.get("model_type") in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[document["model_type"]]
        text["tie_word_embeddings"] = getattr(config_class, "tie_word_embeddings", False)
    for name in _OF_THE_WHOLE:
        if document.get(name) is not None:
            text[name] = document[name]
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text["model_type"])
    if isinstance(architecture, str):
        text["architectures"] = [architecture]
    return text


def prefixes_of(keys: Iterable[str]) -> Mapping[str, str]:
    """Return the prefixes in a checkpoint with these keys -> those of its language model alone."""
    keys = tuple(keys)
    for prefixes in _PREFIXES:
        first = next(iter(prefixes))
        if any(key.startswith(first) for key in keys):
            return prefixes
    return {}


def key_in_whole(name: str, prefixes: Mapping[str, str]) -> str:
    """Return the key in the whole checkpoint of a tensor of the language model."""
    for prefix, replacement in prefixes.items():
        if name.startswith(replacement):
            return prefix + name.removeprefix(replacement)
    return name


def whole_document(
    document: Mapping[str, Any], language_model: Mapping[str, Any]
) -> dict[str, Any]:
    """Return config.json of a whole checkpoint with another language model inside.

    Args:
        document: config.json of the whole checkpoint.
        language_model: config.json of the language model.
    """
    text = dict(language_model)
    text.pop("architectures", None)
    whole = {**document, "text_config": text, "dtype": language_model["dtype"]}
    whole.pop("torch_dtype", None)
    return whole


def language_model_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the names of the language model's tensors by their keys in the whole checkpoint."""
    keys = tuple(keys)
    prefixes = prefixes_of(keys)
    names = {}
    for key in keys:
        for prefix, replacement in prefixes.items():
            if key.startswith(prefix):
                names[key] = replacement + key.removeprefix(prefix)
    return names

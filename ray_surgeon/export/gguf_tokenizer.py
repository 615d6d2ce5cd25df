"""The tokenizer in a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer

from ray_surgeon.export.folder import local_folder
from ray_surgeon.models.llama_cpp import tokenizer_names
from ray_surgeon.storage.texts import first_token


def add_tokenizer(writer: GGUFWriter, uri: str, vocab_size: int) -> None:
    """Write tokens, merges, special tokens and the chat template of an export.

    Args:
        writer: of the file.
        uri: folder of the export.
        vocab_size: rows of the embedding.

    Raises:
        ValueError: see `tokenizer_names`.
    """
    with local_folder(uri, weights=False) as (folder, _):
        # for some families it is not what the file says
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model, cut = tokenizer_names(document)
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(cut)
        tokens = tokens_of(document, vocab_size, has_pieces=model == "llama")
        writer.add_token_list([token.encode() for token, _ in tokens])
        writer.add_token_types([kind for _, kind in tokens])
        if model == "llama":
            writer.add_add_space_prefix(_has_space_prefix(document))
            # they are numbered in the order of their merges
            writer.add_token_scores([-float(number) for number in range(len(tokens))])
        special = gguf.SpecialVocab(folder, load_merges=model == "gpt2", n_vocab=vocab_size)
        special.add_special_token |= _added_tokens(folder)
        special.add_to_gguf(writer, quiet=True)


def _added_tokens(folder: Path) -> dict[str, bool]:
    """Return whether a tokenizer puts its first and its last special token around a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain, whole = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (False, True))
    return {
        "bos": first_token(tokenizer) is not None,
        "eos": len(whole) > len(plain) and whole[-1] == tokenizer.eos_token_id,
    }


def _has_space_prefix(document: Mapping[str, Any]) -> bool:
    """Whether a tokenizer puts a space in front of a text."""
    steps = filter(None, [document.get("normalizer"), document.get("pre_tokenizer")])
    return any(
        part["type"] == "Prepend" or part.get("prepend_scheme", "never") != "never"
        for step in steps
        for part in step.get("normalizers", step.get("pretokenizers", [step]))
    )


def tokens_of(
    document: Mapping[str, Any], vocab_size: int, *, has_pieces: bool
) -> list[tuple[str, TokenType]]:
    """Return every token by its number; numbers that no token has are embeddings that nothing uses.

    Of a tokenizer of pieces, llama.cpp takes U+2581 for a space, but not in tokens that were added
    and are not special.
    """
    by_number = {}
    for token, number in document["model"]["vocab"].items():
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", token)
        by_number[number] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in document.get("added_tokens", []):
        token = added["content"]
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if token == document["model"].get("unk_token"):
            kind = TokenType.UNKNOWN
        if has_pieces and not added["special"]:
            token = token.replace("\u2581", " ")
        by_number[added["id"]] = token, kind
    return [by_number.get(n, (f"[PAD{n}]", TokenType.UNUSED)) for n in range(vocab_size)]

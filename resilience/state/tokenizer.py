"""Which files make up a tokenizer, found from the object that the training loop has.

    Hugging Face (transformers, tokenizers)   what `save_pretrained` writes: `tokenizer.json`, `tokenizer_config.json`,
                                              …; `special_tokens_map.json` and vocabulary files where it left them out
    SentencePiece                             `tokenizer.model`
    GPT-2 BPE                                 `vocab.json`, `merges.txt`
    BERT                                      `vocab.txt`
    Tiktoken                                  `tokenizer.json` (the ranks, as Megatron reads them) and
                                              `tokenizer_config.json` (the pattern and the special tokens)
    a path                                    see `tokenizer_path.py`

None of these libraries is imported: an object is known by what it can do. A wrapper that holds one of them under
`tokenizer` or `_tokenizer` (Megatron's do) is looked into; one that only knows its files' paths is read from there.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilience.errors import ResilienceError, UnsupportedStateError
from resilience.state.tokenizer_path import files_at, files_below

__all__ = ["TokenizerFile", "tokenizer_files"]

_MAX_FILES = 1000
_MAX_BYTES = 1 << 30
_MAX_NAME_BYTES = 255
_MAX_WRAPPERS = 4
_HOLDERS = ("tokenizer", "_tokenizer")
_PATHS = ("tokenizer_model", "tokenizer_file", "vocab_file", "vocab_path", "merges_file", "merge_file", "merges_path")


@dataclass(frozen=True)
class TokenizerFile:
    """One file, by its name below `tokenizer/`; a name with `/` lies in a folder there."""

    name: str
    content: bytes


def tokenizer_files(tokenizer: Any) -> tuple[TokenizerFile, ...]:
    """All files of a tokenizer (an object, or the path of a file or a folder), by name.

    UnsupportedStateError for an object of no kind that is known, one whose own code fails, and one that gives files of
    impossible names or sizes; StoreError for a path that cannot be read. Changes nothing; what an object can only write
    to a folder goes to a temporary one.
    """
    what = f"tokenizer {os.fspath(tokenizer)}" if _is_path(tokenizer) else f"tokenizer {_type_name(tokenizer)}"
    try:
        found = _found(tokenizer, _MAX_WRAPPERS)
    except ResilienceError:
        raise
    except Exception as error:
        raise UnsupportedStateError(
            f"{what} failed to tell its files ({type(error).__name__}: {str(error)[:300]}).",
            advice="Give the path of its files instead, or set save_tokenizer_assets=False.",
        ) from error
    if not found:
        raise UnsupportedStateError(
            f"{what} is none that is known: it has no save_pretrained, is of no kind of tokenizers, sentencepiece or "
            f"tiktoken, and names no vocabulary file.",
            advice="Give one of these, or the path of its files, or set save_tokenizer_assets=False.",
        )
    return _checked(found, what)


def _found(tokenizer: Any, wrappers: int) -> dict[str, bytes]:
    for kind in _KINDS:
        if kind.matches(tokenizer):
            return kind.files(tokenizer)
    for name in _HOLDERS if wrappers else ():
        held = getattr(tokenizer, name, None)
        if held is not None and held is not tokenizer and (found := _found(held, wrappers - 1)):
            return found
    return _files_it_names(tokenizer)


def _checked(found: Mapping[str, bytes], what: str) -> tuple[TokenizerFile, ...]:
    wrong = next((name for name in found if not _is_inner(name)), None)
    if wrong is not None:
        raise UnsupportedStateError(f"{what} has a file {wrong[:80]!r}, which is no name below a folder.")
    nbytes = sum(map(len, found.values()))
    if len(found) > _MAX_FILES or nbytes > _MAX_BYTES:
        raise UnsupportedStateError(
            f"{what} has {len(found)} files of {nbytes} bytes; expected are at most {_MAX_FILES} of {_MAX_BYTES}.",
            advice="Is it the folder of a tokenizer? Else set save_tokenizer_assets=False.",
        )
    return tuple(TokenizerFile(name, found[name]) for name in sorted(found))


def _is_inner(name: str) -> bool:
    """A relative path that stays below, of names that every disk takes."""
    return all(
        part not in ("", ".", "..")
        and "\\" not in part
        and part.isprintable()
        and len(part.encode(errors="replace")) <= _MAX_NAME_BYTES
        for part in name.split("/")
    )


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def _pretrained(tokenizer: Any) -> dict[str, bytes]:
    """What `save_pretrained` writes; transformers 5 leaves the special tokens' map and the vocabulary files out."""
    found = _written_by(tokenizer.save_pretrained)
    special = getattr(tokenizer, "special_tokens_map", None)
    if isinstance(special, Mapping) and special:
        text = json.dumps(special, indent=2, ensure_ascii=False, default=str)
        found.setdefault("special_tokens_map.json", text.encode())
    return _vocabulary(getattr(tokenizer, "backend_tokenizer", None)) | found


def _fast(tokenizer: Any) -> dict[str, bytes]:
    """A `tokenizers.Tokenizer`, or one of the library's ready-made ones, which hold it."""
    return {**_vocabulary(getattr(tokenizer, "_tokenizer", tokenizer)), "tokenizer.json": tokenizer.to_str().encode()}


def _vocabulary(fast: Any) -> dict[str, bytes]:
    """`vocab.json` and `merges.txt` of a BPE, `vocab.txt` of WordPiece; other models lie in `tokenizer.json` alone."""
    save = getattr(getattr(fast, "model", None), "save", None)
    written = _written_by(save) if callable(save) else {}
    return {name: content for name, content in written.items() if name in ("vocab.json", "merges.txt", "vocab.txt")}


def _written_by(save: Callable[[str], Any]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="resilience-tokenizer-") as folder:
        save(folder)
        return files_below(Path(folder), _MAX_FILES, _MAX_BYTES)


# -- The others -------------------------------------------------------------------------------------------------------


def _sentencepiece(tokenizer: Any) -> dict[str, bytes]:
    return {"tokenizer.model": bytes(tokenizer.serialized_model_proto())}


def _tiktoken(tokenizer: Any) -> dict[str, bytes]:
    ranks = sorted((tokenizer.encode_single_token(token), token) for token in tokenizer.token_byte_values())
    listed = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode(errors="replace"),
        }
        for rank, token in ranks
    ]
    special = {token: tokenizer.encode_single_token(token) for token in sorted(tokenizer.special_tokens_set)}
    config = {"name": tokenizer.name, "pattern": tokenizer._pat_str, "special_tokens": special}
    return {
        "tokenizer.json": json.dumps(listed).encode(),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "TikTokenTokenizer", **config}, indent=2).encode(),
    }


def _gpt2(tokenizer: Any) -> dict[str, bytes]:
    pairs = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    vocabulary = json.dumps(dict(tokenizer.encoder), ensure_ascii=False)
    return {"vocab.json": vocabulary.encode(), "merges.txt": _lines(lines)}


def _bert(tokenizer: Any) -> dict[str, bytes]:
    """One token a line, whose number is the line's: a number without a token could not be told."""
    tokens = sorted(tokenizer.vocab, key=tokenizer.vocab.__getitem__)
    if [tokenizer.vocab[token] for token in tokens] != list(range(len(tokens))):
        raise UnsupportedStateError("The tokens of a BERT vocabulary are not numbered from 0 on without a gap.")
    return {"vocab.txt": _lines(tokens)}


def _lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _files_it_names(tokenizer: Any) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in _PATHS:
        path = getattr(tokenizer, name, None)
        if _is_path(path) and path:
            found |= files_at(Path(path), _MAX_FILES, _MAX_BYTES)
    return found


# -- Which is which ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """How an object of this kind is known, and what its files are."""

    matches: Callable[[Any], bool]
    files: Callable[[Any], dict[str, bytes]]


def _has(*methods: str) -> Callable[[Any], bool]:
    return lambda tokenizer: all(callable(getattr(tokenizer, name, None)) for name in methods)


def _holds(mapping: str, *others: str) -> Callable[[Any], bool]:
    def matches(tokenizer: Any) -> bool:
        return isinstance(getattr(tokenizer, mapping, None), Mapping) and all(_attributes(tokenizer, others))

    return matches


def _attributes(tokenizer: Any, names: tuple[str, ...]) -> Iterator[bool]:
    return (getattr(tokenizer, name, None) is not None for name in names)


def _is_path(given: Any) -> bool:
    return isinstance(given, (str, os.PathLike))


def _type_name(tokenizer: Any) -> str:
    kind = type(tokenizer)
    return f"{kind.__module__}.{kind.__qualname__}"


_KINDS = (
    _Kind(_is_path, lambda path: files_at(Path(path), _MAX_FILES, _MAX_BYTES)),
    _Kind(_has("save_pretrained"), _pretrained),
    _Kind(_has("to_str", "get_vocab"), _fast),
    _Kind(_has("serialized_model_proto"), _sentencepiece),
    _Kind(_has("token_byte_values", "encode_single_token"), _tiktoken),
    _Kind(_holds("encoder", "bpe_ranks"), _gpt2),
    _Kind(_holds("vocab", "wordpiece_tokenizer"), _bert),
)

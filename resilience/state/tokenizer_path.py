"""Which files of a tokenizer lie at a path, and what they are called in a checkpoint.

A folder gives what is a tokenizer's by its name: beside it may lie the weights of a whole model. A file goes by what it
holds, under the name that its readers look for: Megatron's options name files of any name (`gpt2-vocab.json`).
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator
from pathlib import Path

from resilience.errors import ResilienceError, StoreError, UnsupportedStateError

__all__ = ["files_at", "files_below"]

#: By the name in lower case, relative to the folder.
_OF_A_TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "chat_template*",
    "additional_chat_templates/*",
    "tokenization_*.py",
)
_MERGES_HEAD = b"#version"


def files_at(path: Path, max_files: int, max_bytes: int) -> dict[str, bytes]:
    """Name in the checkpoint → content, of a tokenizer's folder or file.

    UnsupportedStateError if a folder has no such file, or more than is a tokenizer's; StoreError for what is not there
    or cannot be read.
    """
    try:
        if not path.is_dir():
            return _named_file(path, max_bytes)
        names = [name for name in _names_below(path) if _is_of_a_tokenizer(name)]
        if not names:
            raise UnsupportedStateError(
                f"The folder {path} holds no file of a tokenizer ({', '.join(_OF_A_TOKENIZER[:7])}, …).",
                advice="Name the folder that has them, or the file itself.",
            )
        return _read(path, names, max_files, max_bytes)
    except ResilienceError:
        raise
    except OSError as error:
        raise StoreError(
            f"The tokenizer at {path} cannot be read: {error.strerror or error}.",
            advice="Give the path of a file or a folder; names on a hub are not looked up.",
        ) from error


def files_below(folder: Path, max_files: int, max_bytes: int) -> dict[str, bytes]:
    """Every regular file in and below a folder, by its relative name."""
    return _read(folder, list(_names_below(folder)), max_files, max_bytes)


def _names_below(folder: Path) -> Iterator[str]:
    """Links to folders are not followed: they may lead anywhere. A link to a file is that file."""
    for inner, folders, names in os.walk(folder):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        for name in sorted(names):
            if (Path(inner) / name).is_file():
                yield (Path(inner) / name).relative_to(folder).as_posix()


def _is_of_a_tokenizer(name: str) -> bool:
    depth = name.count("/")
    return any(depth == each.count("/") and fnmatch.fnmatchcase(name.lower(), each) for each in _OF_A_TOKENIZER)


def _read(folder: Path, names: list[str], max_files: int, max_bytes: int) -> dict[str, bytes]:
    """All of them, or UnsupportedStateError before the first byte that is too much."""
    nbytes = sum((folder / name).stat().st_size for name in names)
    if len(names) > max_files or nbytes > max_bytes:
        raise UnsupportedStateError(
            f"{folder} has {len(names)} files of {nbytes} bytes where a tokenizer's are expected, which are at most "
            f"{max_files} of {max_bytes}.",
            advice="Name the folder of the tokenizer alone.",
        )
    return {name: (folder / name).read_bytes() for name in names}


def _named_file(path: Path, max_bytes: int) -> dict[str, bytes]:
    """One file under the name that it has to have; of a GPT-2 vocabulary the merges that lie beside it too."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UnsupportedStateError(f"The tokenizer at {path} is neither a file nor a folder.")
    content = _read(path.parent, [path.name], 1, max_bytes)[path.name]
    name = _canonical(path.name, content)
    found = {name: content}
    beside = path.with_name(path.name.replace("vocab.json", "merges.txt"))
    if name == "vocab.json" and beside != path and beside.is_file():
        found |= {"merges.txt": _read(path.parent, [beside.name], 1, max_bytes)[beside.name]}
    return found


def _canonical(name: str, content: bytes) -> str:
    suffix = Path(name).suffix.lower()
    if suffix == ".model":
        return "tokenizer.model"
    if suffix == ".txt":
        return "merges.txt" if content.startswith(_MERGES_HEAD) or name.endswith("merges.txt") else "vocab.txt"
    if suffix == ".json":
        return "vocab.json" if _is_vocabulary(content) else "tokenizer.json"
    return name


def _is_vocabulary(content: bytes) -> bool:
    """Whether it maps tokens to numbers; a `tokenizer.json` has sections instead, or is a list of ranks."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(told, dict) and all(type(number) is int for number in told.values())

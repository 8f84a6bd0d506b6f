"""What a rank gives to a persistent checkpoint beside its tensors, for other programs and other layouts to find.

The place in the data goes into a file per data-parallel rank; the tokenizer's files and what of the values is plain
(scheduler, hyperparameters) come from rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from resilience.formats.loader_files import encode_loader, loader_file
from resilience.state.plain import plain_parts

__all__ = ["Extras", "extras_of"]

TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Extras:
    """`files` by name relative to the checkpoint's folder; `common`: entries of `common.pt`."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)


def extras_of(
    values: bytes,
    tensor_of: Callable[[str], torch.Tensor | None],
    *,
    loader_rank: int | None,
    leads: bool,
    tokenizer: Callable[[], Mapping[str, bytes]],
) -> Extras:
    """What this rank gives, from the values of its save.

    `loader_rank`: the data-parallel rank whose loader's state this rank writes (None: another does). `leads`: rank 0.
    `tokenizer`: its files by name; called by rank 0 alone.
    """
    files: dict[str, bytes] = {}
    if loader_rank is not None:
        loader = plain_parts(values, ("dataloader",), tensor_of).get("dataloader")
        if loader is not None:
            files[loader_file(loader_rank)] = encode_loader(_for_others(loader))
    if not leads:
        return Extras(files)
    files |= {f"{TOKENIZER}/{name}": content for name, content in tokenizer().items()}
    parts = plain_parts(values, ("scheduler", "optimizer"), tensor_of)
    common: dict[str, Any] = {}
    if isinstance(parts.get("scheduler"), dict):
        common["opt_param_scheduler"] = parts["scheduler"]
    groups = [each["param_groups"] for each in parts.get("optimizer", ()) if "param_groups" in each]
    if groups:
        common["optimizer"] = {"param_groups": groups[0]} if len(groups) == 1 else [{"param_groups": g} for g in groups]
    return Extras(files, common)


def _for_others(loader: Mapping[str, Any]) -> Any:
    """A loader that keeps its own state is understood by whoever knows such loaders; of another, our count of it."""
    return loader["loader"] if loader.get("loader") is not None else loader

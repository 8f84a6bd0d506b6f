"""`resilience convert`: write a persistent checkpoint again in another format, or as safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilience.stores.filesystem import PosixFileSystem

if TYPE_CHECKING:
    from rich.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    parser.add_argument("source", metavar="SRC", help="an iter_* folder, or the directory that it is in")
    parser.add_argument("destination", metavar="DST", help="a directory that is not there yet, or is empty")
    parser.add_argument("--to", required=True, choices=("torch_dist", "zarr", "fsdp_dtensor", "safetensors"))


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Convert. Status 2 if DST is not empty or SRC holds no checkpoint, 3 for damage."""
    from resilience.formats.convert import convert

    made = convert(Path(args.source).absolute(), Path(args.destination).absolute(), args.to, PosixFileSystem())
    return 0, {
        "items": made.items,
        "bytes": made.nbytes,
        "to": args.to,
        "path": str(made.path),
        "iteration": made.iteration,
        "world_size": made.world_size,
    }


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say, size

    say(console, f"{document['path']}: {document['items']} tensors of iteration {document['iteration']} as "
                 f"{document['to']}, {size(document['bytes'])}.")  # fmt: skip

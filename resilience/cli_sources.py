"""The options of every command that reads stores: where saves lie, and of which run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from resilience.errors import CommandError
from resilience.formats.registry import foreign_problem
from resilience.stores.authentication import key_of
from resilience.stores.discovery import Sources, default_memory_dir, find_sources
from resilience.stores.filesystem import PosixFileSystem

__all__ = ["add_sources", "at_least_one", "sources_of"]


def add_sources(parser: argparse.ArgumentParser, *, shared: bool = True) -> None:
    """Declare `--local`, `--save`, `--global-dir`, `--run-id`, `--secret-env`."""
    group = parser.add_argument_group("where saves lie")
    group.add_argument(
        "--local",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a directory of node-local or in-memory saves: <dir>, <dir>/<run> or <dir>/<run>/<node>; repeatable "
        "(default, if nothing else is given: this user's node memory, $RESILIENCE_MEMORY_DIR or "
        "/dev/shm/resilience-<uid>)",
    )
    if shared:
        group.add_argument("--save", type=Path, metavar="DIR", help="the directory of persistent checkpoints")
        group.add_argument("--global-dir", type=Path, metavar="DIR", help="the directory of `global` saves")
    group.add_argument("--run-id", metavar="ID", help="only this run")
    group.add_argument(
        "--secret-env",
        metavar="NAME",
        help="environment variable with the job's secret: what has no MAC of its key counts as not there",
    )


def sources_of(args: argparse.Namespace) -> Sources:
    """What the options name. CommandError: status 2 for a directory that is not there, 3 for an unreadable one."""
    save, global_dir = getattr(args, "save", None), getattr(args, "global_dir", None)
    local = list(args.local)
    if not local and save is None and global_dir is None:
        memory = default_memory_dir(os.environ)
        if not memory.is_dir():
            raise CommandError(
                f"Nothing was given to look at, and this user's node memory {memory} is not there.",
                advice="Give --local DIR, --save DIR or --global-dir DIR.",
                status=2,
            )
        local = [memory]
    return find_sources(
        PosixFileSystem(),
        local=local,
        save=save,
        global_dir=global_dir,
        run_id=args.run_id,
        foreign_problem=foreign_problem,
        seal=key_of(args.secret_env, os.environ, "--secret-env"),
    )


def at_least_one(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


at_least_one.__name__ = "number"  # argparse says "invalid number value: 'x'"

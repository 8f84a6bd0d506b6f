"""`resilience COMMAND …`: which command there is, how its answer is printed, and which exit status it gives.

Each command is a module with `arguments(parser)`, `run(args) -> (status, document)` and, where a plain listing would
not do, `show(document, console)` for people. It is imported only when it is asked for: a quick command stays quick.

Exit status: 0 well; 1 the answer is bad news; 2 wrong usage or configuration, a directory that is not there; 3 it could
not be done. `outcome` has its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from resilience import __version__
from resilience.errors import CheckpointNotFoundError, CommandError, ConfigError, ResilienceError

__all__ = ["COMMANDS", "main"]


@dataclass(frozen=True)
class Command:
    """One line of `resilience --help`, and the module that has the rest."""

    name: str
    module: str
    help: str


COMMANDS = tuple(
    Command(*each)
    for each in (
        ("ls", "resilience.cli_ls", "list the saves that exist, over nodes and tiers"),
        ("inspect", "resilience.cli_inspect", "show what a save holds: items, shapes, records"),
        ("verify", "resilience.cli_verify", "check saves; with --deep read and hash every byte"),
        ("explain", "resilience.cli_explain", "tell what a start would resume from, and why"),
        ("prune", "resilience.cli_prune", "delete saves that nobody needs any more"),
        ("convert", "resilience.cli_convert", "write a persistent checkpoint again in another format"),
        ("outcome", "resilience.cli_outcome", "tell how a run ended, for job scripts"),
        ("request", "resilience.cli_request", "ask a running job on this node to save or to stop"),
        ("top", "resilience.cli_top", "follow a running job: progress, what is safe, what a person should worry about"),
        ("doctor", "resilience.cli_doctor", "check a configuration and this machine before training"),
        ("advise", "resilience.cli_advise", "propose an interval, a kind of save and a redundancy, and say why"),
        ("simulate", "resilience.cli_simulate", "tell what failures would cost a run, by simulation and by theory"),
        ("drill", "resilience.cli_drill", "rehearse failures with real processes on virtual nodes"),
        ("report", "resilience.cli_report", "make one self-contained HTML page of a run's events"),
        ("completion", "resilience.cli_completion", "print shell completion for bash or zsh"),
    )
)


class _UsageError(CommandError):
    """What argparse would have said on stderr; a class, so that `--json` can say it as JSON."""

    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        end = "" if message.endswith("?") else "."
        super().__init__(f"{message[:1].upper()}{message[1:]}{end}", advice=f"See `{parser.prog} --help`.", status=2)
        self.usage = parser.format_usage()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(self, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; prints to stdout, errors to stderr unless `--json` was given."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # names in files of others may hold what no terminal's encoding has
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
    try:
        status = _run(words, as_json)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough; what is still buffered must not fail at exit
        _stop_printing()
        return 0
    except KeyboardInterrupt:
        return 130
    except (ResilienceError, OSError) as error:
        return _failed(error, as_json)
    except SystemExit as leaving:  # --help, --version
        return leaving.code if isinstance(leaving.code, int) else 0
    return status


def parser_of(command: Command) -> argparse.ArgumentParser:
    """The parser of one command; imports it."""
    parser = _Parser(prog=f"resilience {command.name}", description=_sentence(command.help), allow_abbrev=False)
    importlib.import_module(command.module).arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser


def _run(words: list[str], as_json: bool) -> int:
    top = _top_parser()
    place = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
    top.parse_args(words[:place])
    if place == len(words):
        top.print_help()
        return 2
    command = next((command for command in COMMANDS if command.name == words[place]), None)
    if command is None:
        raise _UsageError(top, _unknown(words[place]))
    args = parser_of(command).parse_args(words[place + 1 :])
    module = importlib.import_module(command.module)
    status, document = module.run(args)
    if as_json:
        print(json.dumps(document, indent=2, default=str))
    else:
        from resilience.cli_tables import console_for, show_plainly

        getattr(module, "show", show_plainly)(document, console_for(sys.stdout))
    return int(status)


def _top_parser() -> argparse.ArgumentParser:
    width = max(len(command.name) for command in COMMANDS)
    listed = "\n".join(f"  {command.name:<{width}}  {command.help}" for command in COMMANDS)
    top = _Parser(
        prog="resilience",
        usage="resilience COMMAND … [--json]",
        description="Look after training jobs that survive failures: their saves, restarts and rehearsals.",
        epilog=f"commands:\n{listed}\n\n"
        "`resilience COMMAND --help` tells more of each. Exit status: 0 well, 1 bad news, "
        "2 wrong\nusage or configuration, 3 it could not be done.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"resilience {__version__}")
    top.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return top


def _unknown(word: str) -> str:
    import difflib

    near = difflib.get_close_matches(word, [command.name for command in COMMANDS], n=1)
    return f"there is no command {word!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _failed(error: ResilienceError | OSError, as_json: bool) -> int:
    """Say what went wrong, and give the status that it stands for."""
    status = _status_of(error)
    advice = error.advice if isinstance(error, ResilienceError) else ""
    message = str(error)
    kind = "UsageError" if isinstance(error, _UsageError) else type(error).__name__
    if as_json:
        told: dict[str, Any] = {"type": kind, "message": message.removesuffix(advice).rstrip(), "advice": advice}
        tail = getattr(error, "tail", None)
        if tail:
            told["tail"] = list(tail)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"error": told}, indent=2), flush=True)
        return status
    usage = error.usage if isinstance(error, _UsageError) else ""
    with contextlib.suppress(BrokenPipeError):
        print(f"{usage}resilience: {message}", file=sys.stderr)
        for line in getattr(error, "tail", ()):
            print(f"  {line}", file=sys.stderr)
    return status


def _status_of(error: ResilienceError | OSError) -> int:
    if isinstance(error, CommandError):
        return error.status
    return 2 if isinstance(error, ConfigError | CheckpointNotFoundError) else 3


def _stop_printing() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())

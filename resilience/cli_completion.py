"""`resilience completion bash|zsh`: a script that completes commands, options and directories.

eval "$(resilience completion bash)"
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_BASH = """\
_resilience() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" options=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
        *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
}}
complete -o filenames -F _resilience resilience
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    parser.add_argument("shell", choices=("bash", "zsh"))


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Make the script from the commands' own parsers."""
    from resilience.cli import COMMANDS, parser_of

    cases = []
    for command in COMMANDS:
        words = [option for action in parser_of(command)._actions for option in action.option_strings]
        cases.append(f'        {command.name}) options="{" ".join(words)}" ;;')
    script = _BASH.format(commands=" ".join(command.name for command in COMMANDS), cases="\n".join(cases))
    if args.shell == "zsh":
        script = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + script
    return 0, {"shell": args.shell, "script": script}


def show(document: dict[str, Any], console: Console) -> None:
    console.file.write(document["script"])

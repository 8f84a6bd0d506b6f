"""`resilience drill`: the command line of a rehearsal; what it means is decided in `resilience/drill/`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import resilience
from resilience.config import load_config
from resilience.drill.drill import Soak, run_drill, run_soak
from resilience.drill.environment import Plan
from resilience.drill.orchestrate import Explain, Sources
from resilience.drill.result import Decision
from resilience.drill.scenario import KINDS, SAVE_TYPES, Scenario, parse_fault, random_faults
from resilience.drill.story import Story
from resilience.errors import ConfigError
from resilience.explain import explain_paths
from resilience.observe.phrases import human_seconds, plural

if TYPE_CHECKING:
    from rich.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    kinds = "; ".join(f"{kind}:{k.target}=K@N {k.meaning}" for kind, k in KINDS.items())
    add = parser.add_argument
    add("--nodes", type=int, default=4, metavar="N", help="virtual nodes, each with a torchrun agent (default 4)")
    add("--spares", type=int, default=1, metavar="N", help="nodes that wait to replace lost ones (default 1)")
    add("--elastic", action="store_true", help="go on with fewer nodes where no spare is left; nodes may join")
    add("--ranks-per-node", type=int, default=1, metavar="N", help="default 1")
    add("--train-iters", type=int, default=60, metavar="N", help="iterations to train (default 60)")
    add("--config", type=Path, metavar="F", help="YAML file with checkpoint: and resiliency: sections")
    add("--type", choices=SAVE_TYPES, help="where non-persistent saves live (default local)")
    add("--save-every", type=int, metavar="N", help="iterations between non-persistent saves (default 5)")
    add("--persist-every", type=int, metavar="N", help="iterations between persistent saves (default 20; 0: none)")
    add("--replication-jump", type=int, metavar="J", help="default: the ranks per node")
    add("--replication-factor", type=int, metavar="F", help="copies of each rank's save, its own included (default 2)")
    add("--redundancy", choices=("replica", "xor", "rs"), help="default replica")
    add("--fault", action="append", default=[], metavar="SPEC", help=f"repeatable: {kinds}".replace("%", "%%"))
    add("--random-faults", action="store_true", help="draw faults from --seed")
    add("--minutes", type=float, metavar="M", help="a soak: go on with random faults for so long, "
        "in one run, and judge whether anything grows (default: a drill with three of them)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="of --random-faults (default 0)")
    add("--workdir", type=Path, default=Path("drill-out"), metavar="DIR", help="default drill-out")
    add("--report", type=Path, metavar="F", help="the HTML page (default report.html in the work directory)")
    add("--timeout-s", type=float, default=1500.0, metavar="S", help="bound of a whole drill (default 1500)")
    add("script", nargs="*", metavar="-- SCRIPT ARGS", help="drill this script instead of the built-in example")


def predict(sources: Sources) -> Decision | None:
    """What the next start will resume from: the answer of `resilience explain`."""
    return explain_paths(sources.local, sources.save, sources.global_dir, sources.run_id, sources.world_size)


def run(args: argparse.Namespace, *, explain: Explain | None = predict) -> tuple[int, dict[str, Any]]:
    """Carry the drill out and tell its story on stderr. Returns exit status (0 passed, 1 not) and the JSON document.

    Raises `ConfigError` for options that do not go together.
    """
    plan = plan_of(args)
    story = Story(sys.stderr)
    with _ended_by_sigterm():
        if args.minutes is not None:
            return _soak(args, plan, story, explain)
        if args.random_faults:
            plan = replace(plan, scenario=random_faults(plan.scenario, args.seed))
        story.tell("drill", _headline(plan))
        result = run_drill(plan, story, explain=explain, report=args.report)
    return (0 if result.passed else 1), result.as_json()


def show(document: dict[str, Any], console: Console) -> None:
    """The answer for people; the story was told on stderr while it happened."""
    from resilience.cli_tables import say, table

    if document["faults"]:
        columns = ("fault", "resumed from", "iterations lost", "away", "own copies", "replicas", "predicted")
        table(console, columns, [_row(fault) for fault in document["faults"]], right="away")
    equal = "equal to" if document["bit_identical"] else "not known to be equal to"
    say(console, f"final state   {equal} the undisturbed run's")
    if document["why_not_bits"]:
        say(console, f"              {document['why_not_bits']}")
        if document["loss_difference"] is not None:
            say(console, f"loss          within {document['loss_difference']:.1%} of the undisturbed run's")
    say(console, f"goodput       {100 * document['goodput']:.1f} %")
    if soak := document.get("soak"):
        _show_soak(soak, console)
    say(console, f"report        {document['report']}")
    say(console, "passed" if document["passed"] else "failed", "bold green" if document["passed"] else "bold red")


def _show_soak(soak: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say, table

    say(console, f"soak          {plural(soak['iterations'], 'iteration')} in {plural(soak['attempts'], 'attempt')}, "
                 f"at most {soak['most_lost_iterations']} lost by a fault")  # fmt: skip
    columns = ("does it grow?", "samples", "at first", "at last", "allowed", "flat")
    words = {True: "yes", False: "NO", None: "too few samples"}
    rows = [
        (each["what"], each["samples"], f"{each['first']:,.0f}", f"{each['last']:,.0f}",
         f"{each['first'] + each['allowed']:,.0f}", words[each["flat"]])
        for each in soak["samples"]
    ]  # fmt: skip
    table(console, columns, rows, right="samples")


def _row(fault: dict[str, Any]) -> list[str]:
    resumed, away = fault["resumed_from"], fault["downtime_s"]
    return [
        fault["spec"],
        f"iteration {resumed['iteration']} ({resumed['tier']})" if resumed else "-",
        str(fault["lost_iterations"]),
        human_seconds(away) if away is not None else "-",
        str(fault["own_copies"]),
        str(fault["replica_copies"]),
        {True: "yes", False: "no", None: "-"}[fault["predicted"]],
    ]


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that the options ask for; an option wins over the configuration file, that over the defaults."""
    checkpoint, resiliency = load_config(args.config, os.environ)
    scenario = Scenario(
        nodes=args.nodes,
        spares=args.spares,
        ranks_per_node=args.ranks_per_node,
        train_iters=args.train_iters,
        faults=tuple(parse_fault(spec) for spec in args.fault),
        save_type=_first(args.type, checkpoint.non_persistent_ckpt_type, "local"),
        save_every=_first(args.save_every, checkpoint.non_persistent_save_interval, 5),
        persist_every=_first(args.persist_every, checkpoint.save_interval, 20),
        replication_jump=_first(args.replication_jump, checkpoint.replication_jump, None),
        replication_factor=_first(args.replication_factor, checkpoint.replication_factor, 2),
        redundancy=args.redundancy,
        elastic=args.elastic,
    )
    if args.random_faults and args.fault:
        raise ConfigError("--random-faults and --fault do not go together: the faults are drawn, or they are given.")
    if args.minutes is not None and not (args.random_faults and args.minutes > 0):
        raise ConfigError(
            f"--minutes {args.minutes:g}: it is a time above 0, and belongs to --random-faults.",
            advice="Add --random-faults, or leave --minutes out.",
        )
    script = tuple(args.script) or (str(example_script()), "--train-iters", str(args.train_iters))
    if not Path(script[0]).is_file():
        raise ConfigError(f"There is no script {script[0]!r}.", advice="Give it after `--`: -- train.py --lr 0.1")
    # Options after the script are its own, and it runs from here: only its path has to hold in other directories.
    script = (str(Path(script[0]).resolve()), *script[1:])
    return Plan(scenario, args.workdir, script, checkpoint=checkpoint, resiliency=resiliency, timeout_s=args.timeout_s)


def example_script() -> Path:
    """The example that is drilled by default: in a clone a link to `examples/`, of which an installation has a copy."""
    path = Path(resilience.__file__).parent / "examples" / "gpt.py"
    if path.is_file():
        return path
    raise ConfigError("The example script is not installed.", advice="Give a script of your own after `--`.")


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _headline(plan: Plan, faults: str = "") -> str:
    scenario = plan.scenario
    length = "" if faults else f"{plural(scenario.train_iters, 'iteration')}, "
    faults = faults or ", ".join(fault.spec for fault in scenario.faults) or "none"
    return (
        f"{plural(scenario.nodes, 'node')} × {plural(scenario.ranks_per_node, 'rank')}, "
        f"{plural(scenario.spares, 'spare')}, {length}saves: {scenario.save_type} "
        f"every {scenario.save_every}, persistent every {scenario.persist_every}; faults: {faults}"
    )


def _soak(args: argparse.Namespace, plan: Plan, story: Story, explain: Explain | None) -> tuple[int, dict[str, Any]]:
    """One run with faults drawn from the seed for as long as asked; what it says is the drill's answer and `soak`."""
    story.tell("drill", _headline(plan, f"drawn from seed {args.seed} for {args.minutes:g} min"))
    result, soaked = run_soak(plan, Soak(args.minutes, args.seed), story, explain=explain, report=args.report)
    document = result.as_json() | {"soak": soaked.as_json()}
    (Path(result.workdir) / "result.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return (0 if result.passed else 1), document


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """While a drill runs, TERM unwinds the stack as an exception, so that its processes are ended and mounts go."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""`resilience simulate`: what failures would cost a run of this shape, with these intervals, and how sure that is."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilience.cli_numbers import above_zero, from_zero, share_of_all
from resilience.cli_sources import at_least_one
from resilience.errors import ConfigError
from resilience.foresight.estimate import estimate, estimate_model, theory_of
from resilience.foresight.failures import DISTRIBUTIONS, FailureModel
from resilience.foresight.job import Job, plan_job
from resilience.foresight.simulation import Durations
from resilience.foresight.trace import read_trace
from resilience.planning.cadence import best_interval

if TYPE_CHECKING:
    from rich.console import Console

_MOST_RUNS = 100_000


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    job = parser.add_argument_group("the job")
    job.add_argument("--ranks", type=at_least_one, required=True, metavar="N", help="ranks of the job")
    job.add_argument("--steps", type=at_least_one, required=True, metavar="N", help="steps to train")
    job.add_argument("--step-s", type=above_zero, default=1.0, metavar="S", help="seconds of a step (default 1)")
    job.add_argument("--ranks-per-node", type=at_least_one, default=8, metavar="N", help="default 8")
    job.add_argument("--nodes-per-rack", type=at_least_one, default=1, metavar="N", help="nodes that one rack "
                     "failure takes (default 1)")  # fmt: skip
    _failures(parser.add_argument_group("what fails (one of the first three is needed)"))
    _saves(parser.add_argument_group("saves"))
    _costs(parser.add_argument_group("what things take, in seconds"))
    runs = parser.add_argument_group("the simulation")
    runs.add_argument("--runs", type=at_least_one, default=100, metavar="N", help="runs to average over (default "
                      "100; with a trace all are the same, so one)")  # fmt: skip
    runs.add_argument("--seed", type=int, default=0, metavar="S", help="equal seeds give equal answers (default 0)")


def _failures(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--mtbf-hours", type=above_zero, metavar="H", help="mean time between failures of the whole job")
    add("--node-mtbf-hours", type=above_zero, metavar="H", help="of one node instead")
    add("--trace", type=Path, metavar="FILE", help="failures that were observed, as CSV or JSON Lines with `hours` "
        "(or `seconds`) since the start and `nodes` that were lost (none: a process died)")  # fmt: skip
    add("--distribution", choices=DISTRIBUTIONS, default="exponential", help="of the time between failures (default "
        "exponential)")  # fmt: skip
    add("--shape", type=above_zero, default=0.7, metavar="K", help="of the Weibull distribution; below 1 failures come "
        "in bursts (default 0.7)")  # fmt: skip
    add("--process-share", type=share_of_all, default=0.5, metavar="P", help="share of failures that end a process and "
        "leave its node whole (default 0.5)")  # fmt: skip
    add("--rack-share", type=share_of_all, default=0.0, metavar="P", help="share of failures that take a whole rack "
        "(default 0); the rest take one node")  # fmt: skip


def _saves(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--save-every", type=int, metavar="N", help="steps between non-persistent saves (default: the interval that "
        "`advise` would choose; 0: none)")  # fmt: skip
    add("--persist-every", type=int, default=1000, metavar="N", help="steps between persistent saves (default 1000; 0: "
        "none)")  # fmt: skip
    add("--redundancy", choices=("none", "replica", "xor", "rs"), default="replica", help="default replica")
    add("--replication-factor", type=at_least_one, default=2, metavar="F", help="copies of each shard; with xor and rs "
        "the size of a clique (default 2)")  # fmt: skip
    add("--replication-jump", type=at_least_one, metavar="J", help="default: the ranks per node")
    add("--racks-apart", action="store_true", help="racks are the failure domains: no clique has two nodes of one")
    add("--keep-last", type=at_least_one, default=2, metavar="N", help="saves kept on nodes (default 2)")


def _costs(group: argparse._ArgumentGroup) -> None:
    for name, default, meaning in (
        ("stall-s", 0.5, "training waits for a non-persistent save"),
        ("persist-stall-s", 1.0, "training waits for a persistent save"),
        ("commit-s", 1.0, "until a snapshot is committed on its own nodes"),
        ("protect-s", 5.0, "until other nodes have it too"),
        ("persist-s", 60.0, "until a persistent save is complete"),
        ("refill-s", 30.0, "after a restart, until an empty node holds its copies again"),
        ("detect-s", 30.0, "until a failure is noticed"),
        ("restart-s", 60.0, "until the processes are there again"),
        ("restore-s", 2.0, "to restore from the own node"),
        ("peer-restore-s", 5.0, "to restore when a node's share comes from peers"),
        ("persistent-restore-s", 60.0, "to restore from shared storage"),
    ):
        group.add_argument(f"--{name}", type=from_zero, default=default, metavar="S", help=f"{meaning} ({default:g})")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Simulate. Status 1: at least one run never finished. Raises ConfigError for what does not go together."""
    sources = [args.mtbf_hours, args.node_mtbf_hours, args.trace]
    if sum(source is not None for source in sources) != 1:
        raise ConfigError(
            "What fails is not said, or said twice.", advice="Give one of --mtbf-hours, --node-mtbf-hours and --trace."
        )
    if args.runs > _MOST_RUNS:
        raise ConfigError(f"--runs {args.runs}: at most {_MOST_RUNS}.")
    nodes = -(-args.ranks // args.ranks_per_node)
    trace = None if args.trace is None else read_trace(args.trace, nodes)
    mtbf_s = _mtbf_s(args, nodes, trace_failures=len(trace or ()))
    durations = Durations(**{name: getattr(args, name) for name in Durations.__dataclass_fields__})
    job = _job(args, mtbf_s)
    planned = plan_job(job, durations)
    if trace is not None:
        found = estimate(planned.run, lambda _: trace, 1)
    else:
        model = FailureModel(
            nodes, mtbf_s, args.distribution, args.shape, args.process_share, args.rack_share, args.nodes_per_rack
        )
        found = estimate_model(planned.run, model, runs=args.runs, seed=args.seed)
    theory = theory_of(planned.run, mtbf_s, durations.away_s("peers"))
    document = found.as_json() | {
        "ranks": args.ranks,
        "nodes": nodes,
        "steps": args.steps,
        "mtbf_hours": mtbf_s / 3600,
        "save_every": planned.run.timetable.save_every,
        "persist_every": planned.run.timetable.persist_every,
        "theory": None if theory is None else {
            "goodput": theory.goodput, "young_interval": theory.young_interval, "daly_interval": theory.daly_interval,
        },
        "seed": args.seed,
        "notes": list(planned.notes),
    }  # fmt: skip
    return (1 if found.unfinished else 0), document


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say, table

    low, high = document["goodput_95"]
    sure = f"95 %: {100 * low:.2f} to {100 * high:.2f}" if document["runs"] > 1 else "one run"
    say(console, f"goodput        {100 * document['goodput']:.2f} %  ({sure})", "bold")
    if document["theory"]:
        theory = document["theory"]
        say(console, f"by theory      {100 * theory['goodput']:.2f} %  (Daly; the best interval would be "
                     f"{theory['daly_interval']} steps, by Young {theory['young_interval']})")  # fmt: skip
    say(console, f"{'failures':<14} {_number(document['failures'])} in {_number(document['wall_hours'])} hours")
    say(console, f"{'lost steps':<14} {_number(document['lost_steps'])} of {document['steps']}, at most "
                 f"{document['most_lost_steps']} by one failure")  # fmt: skip
    say(console, f"{'saves':<14} {_number(document['saves'])}, every {document['save_every']} steps; persistent every "
                 f"{document['persist_every']}")  # fmt: skip
    say(console, f"{'unrecoverable':<14} {_number(document['unrecoverable'])} (all copies on nodes were lost)")
    words = {"own_nodes": "own nodes", "peers": "peers", "persistent": "shared storage", "beginning": "the beginning"}
    resumed = [f"{words[name]} {_number(count)}" for name, count in document["resumed_from"].items() if count]
    say(console, f"{'resumed from':<14} {', '.join(resumed) or '-'}")
    names = {
        "useful": "steps that count", "lost": "steps done again", "stall": "waiting for saves",
        "cut": "cut off in the middle of a step", "away": "noticing, starting, restoring",
        "end": "the last save's way to shared storage",
    }  # fmt: skip
    say(console, "")
    table(
        console,
        ("where the time goes", "share"),
        [(names[name], f"{100 * share:.2f} %") for name, share in document["shares"].items()],
        right="share",
    )
    for note in document["notes"]:
        say(console, f"note: {note}", "yellow")
    if document["unfinished"]:
        say(console, f"{document['unfinished']} of {document['runs']} runs never finished", "bold red")


def _number(value: float) -> str:
    """Of a mean: whole where it is large or whole."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def _job(args: argparse.Namespace, mtbf_s: float) -> Job:
    """The job of the options. `--save-every` left out is for `planning/cadence.py` to choose."""
    every = args.save_every
    if every is None:
        shortest = max(1, math.ceil(args.protect_s / args.step_s))
        every = best_interval(save_s=args.stall_s, step_s=args.step_s, mtbf_s=mtbf_s, shortest_steps=shortest)
    return Job(
        ranks=args.ranks,
        steps=args.steps,
        step_s=args.step_s,
        ranks_per_node=args.ranks_per_node,
        nodes_per_rack=args.nodes_per_rack,
        racks_apart=args.racks_apart,
        save_every=every or None,
        persist_every=args.persist_every or None,
        redundancy=args.redundancy,
        factor=args.replication_factor,
        jump=args.replication_jump,
        keep_last=args.keep_last,
        stall_s=args.stall_s,
        persist_stall_s=args.persist_stall_s,
    )


def _mtbf_s(args: argparse.Namespace, nodes: int, *, trace_failures: int) -> float:
    """Of the whole job. For a trace: as if its failures were spread over the training alone."""
    if args.trace is not None:
        return float(args.steps * args.step_s / max(1, trace_failures))
    hours = args.mtbf_hours if args.mtbf_hours is not None else args.node_mtbf_hours / nodes
    return float(hours * 3600)

"""`resilience advise`: which interval, kind of save and redundancy a job should set, why, and what others are worth."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resilience.cli_numbers import above_zero, byte_count, from_zero, share_of_all
from resilience.cli_sources import at_least_one
from resilience.config import CheckpointConfig, ResiliencyConfig, unsupported
from resilience.errors import ConfigError
from resilience.foresight.advice import Advice, Option, Question, advise
from resilience.foresight.costs import ASSUMED, Bandwidths
from resilience.foresight.job import Redundancy
from resilience.foresight.measure import Measured, measure_node
from resilience.runtime.clock import SystemClock
from resilience.runtime.memory import available_bytes
from resilience.stores.filesystem import PosixFileSystem

if TYPE_CHECKING:
    from rich.console import Console

_SPEEDS = {
    "memory": "copied into shared memory",
    "hash": "hashed",
    "disk": "written to the local disk and synchronised",
    "network": "sent to another node while as much is received",
    "shared": "written to and read from shared storage, by the whole job",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    job = parser.add_argument_group("the job").add_argument
    job("--step-s", type=above_zero, required=True, metavar="S", help="seconds of a step")
    job(
        "--state-bytes",
        type=byte_count,
        required=True,
        metavar="B",
        help="bytes of one rank's shard, as for `doctor`: 10e9, 10GB",
    )
    job("--ranks", type=at_least_one, required=True, metavar="N", help="ranks of the job")
    job("--ranks-per-node", type=at_least_one, default=8, metavar="N", help="default 8")
    job("--keep-last", type=at_least_one, default=2, metavar="N", help="saves kept on nodes (default 2)")
    failures = parser.add_argument_group("what fails (one of the first two is needed)").add_argument
    failures("--mtbf-hours", type=above_zero, metavar="H", help="mean time between failures of the whole job")
    failures("--node-mtbf-hours", type=above_zero, metavar="H", help="of one node instead")
    failures("--process-share", type=share_of_all, default=0.5, metavar="P", help="share of failures that leave the "
             "node whole (default 0.5)")  # fmt: skip
    failures("--rack-share", type=share_of_all, default=0.0, metavar="P", help="share that takes a rack (default 0)")
    failures("--nodes-per-rack", type=at_least_one, default=1, metavar="N", help="default 1")
    failures("--detect-s", type=from_zero, default=30.0, metavar="S", help="until a failure is noticed (default 30)")
    failures("--restart-s", type=from_zero, default=60.0, metavar="S", help="until processes are there (default 60)")
    node = parser.add_argument_group("a node, all its ranks together").add_argument
    node("--measure", action="store_true", help="measure this node: copying, hashing, disk, loopback; a few seconds")
    node(
        "--measure-s", type=above_zero, default=1.0, metavar="S", help="bound of each of five measurements (default 1)"
    )
    node("--memory-dir", type=Path, default=Path("/dev/shm"), metavar="DIR", help="default /dev/shm")
    node("--disk-dir", type=Path, default=Path(), metavar="DIR", help="on the local disk (default: here)")
    for name, meaning in _SPEEDS.items():
        default = f"{getattr(ASSUMED, name):.3g}"
        node(f"--{name}-bytes-per-s", type=above_zero, metavar="B", help=f"{meaning} (default: measured, or {default})")
    node("--node-memory-bytes", type=byte_count, metavar="B", help="free for saves (default: measured, or not known)")
    node("--node-disk-bytes", type=byte_count, metavar="B", help="the same on the local disk")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Advise. Raises ConfigError where nothing would fit, CommandError where this node cannot be measured."""
    if (args.mtbf_hours is None) == (args.node_mtbf_hours is None):
        raise ConfigError(
            "How often something fails is not said, or said twice.", advice="Give --mtbf-hours or --node-mtbf-hours."
        )
    if args.process_share + args.rack_share > 1:
        raise ConfigError("--process-share and --rack-share are shares of all failures: at most 1 together.")
    nodes = -(-args.ranks // args.ranks_per_node)
    measured = _measure(args) if args.measure else None
    question = Question(
        ranks=args.ranks,
        ranks_per_node=min(args.ranks, args.ranks_per_node),
        step_s=args.step_s,
        shard_bytes=args.state_bytes,
        mtbf_s=3600 * (args.mtbf_hours if args.mtbf_hours is not None else args.node_mtbf_hours / nodes),
        speed=_speed(args, measured),
        nodes_per_rack=args.nodes_per_rack,
        process_share=args.process_share,
        rack_share=args.rack_share,
        detect_s=args.detect_s,
        restart_s=args.restart_s,
        keep_last=args.keep_last,
        **_room(args),
    )
    advice = advise(question, _available())
    return 0, _document(question, advice, measured)


def _measure(args: argparse.Namespace) -> Measured:
    return measure_node(args.memory_dir, args.disk_dir, SystemClock(), seconds=args.measure_s)


def _speed(args: argparse.Namespace, measured: Measured | None) -> Bandwidths:
    """What was told, else what was measured, else what is assumed."""
    given = {name: getattr(args, f"{name}_bytes_per_s") for name in _SPEEDS}
    found = measured.bandwidths(given["network"], given["shared"], ASSUMED) if measured else ASSUMED
    return Bandwidths(**{name: given[name] or getattr(found, name) for name in _SPEEDS})


def _room(args: argparse.Namespace) -> dict[str, int | None]:
    room: dict[str, int | None] = {"memory": None, "disk": None}
    if args.measure:
        here = available_bytes(args.memory_dir, args.disk_dir, PosixFileSystem())
        in_memory = [free for free in (here["memory"], here["shared_memory"]) if free is not None]
        room = {"memory": min(in_memory, default=None), "disk": here["disk"]}
    return {
        "memory_bytes": args.node_memory_bytes or room["memory"],
        "disk_bytes": args.node_disk_bytes or room["disk"],
    }


def _available() -> frozenset[Redundancy]:
    """The schemes that a job of this version would not refuse."""
    schemes: tuple[Literal["replica", "xor", "rs"], ...] = ("replica", "xor", "rs")
    done = [each for each in schemes if not unsupported(CheckpointConfig(), ResiliencyConfig(redundancy=each))]
    return frozenset({"none", *done})


def _document(question: Question, advice: Advice, measured: Measured | None) -> dict[str, Any]:
    best = advice.best
    return {
        "interval": best.interval,
        "expected_goodput": best.expected_goodput,
        "why": " ".join(advice.why),
        "persist_interval": best.persist_interval,
        "type": best.save_type,
        "redundancy": best.redundancy,
        "replication": best.redundancy != "none",
        "replication_factor": best.factor,
        "replication_jump": best.jump,
        "racks_apart": best.racks_apart,
        "intervals": [{"interval": every, "expected_goodput": goodput} for every, goodput in advice.intervals],
        "schemes": [_scheme(option) for option in advice.options],
        "durations": {"stall_s": best.stall_s, **vars(best.durations)},
        "overlapped_s": min(best.stall_s, question.step_s),
        "bytes_per_s": vars(question.speed),
        "measured": None if measured is None else vars(measured),
        "memory": list(best.memory.lines),
        "settings": _settings(best),
        "simulate": simulation_of(question, best),
    }


def _scheme(option: Option) -> dict[str, Any]:
    return {
        "type": option.save_type,
        "redundancy": option.redundancy,
        "replication_factor": option.factor,
        "interval": option.interval,
        "expected_goodput": option.expected_goodput,
        "node_bytes": option.memory.total,
        "kept_bytes": option.kept_bytes,
        "sent_bytes": option.sent_bytes,
        "survives": option.survives,
        "loss_probability": {str(lost): risk for lost, risk in option.loss_probability.items()},
        "to_shared_storage": option.to_shared_storage,
        "available": option.available,
        "fits": option.fits,
    }


def _settings(best: Option) -> dict[str, dict[str, Any]]:
    """For the configuration file."""
    checkpoint: dict[str, Any] = {
        "save_interval": best.persist_interval,
        "async_save": True,
        "non_persistent_ckpt_type": best.save_type,
        "non_persistent_save_interval": best.interval,
        "replication": best.redundancy != "none",
    }
    resiliency: dict[str, Any] = {}
    if best.redundancy != "none":
        checkpoint |= {"replication_factor": best.factor, "replication_jump": best.jump}
        resiliency["redundancy"] = best.redundancy
    return {"checkpoint": checkpoint, "resiliency": resiliency}


def simulation_of(question: Question, best: Option) -> str:
    """The command that simulates the advice, for a day of training."""
    words: dict[str, object] = {
        "ranks": question.ranks,
        "ranks-per-node": question.ranks_per_node,
        "steps": max(best.interval, round(86_400 / question.step_s)),
        "step-s": question.step_s,
        "mtbf-hours": question.mtbf_s / 3600,
        "process-share": question.process_share,
        "save-every": best.interval,
        "persist-every": best.persist_interval,
        "redundancy": best.redundancy,
        "replication-factor": best.factor,
        "stall-s": best.stall_s,
        "persist-stall-s": best.stall_s,
    }
    if question.rack_share:
        words |= {"rack-share": question.rack_share, "nodes-per-rack": question.nodes_per_rack}
    if best.jump is not None:
        words["replication-jump"] = best.jump
    words |= {name.replace("_", "-"): value for name, value in vars(best.durations).items()}
    options = " ".join(f"--{name} {_word(value)}" for name, value in words.items())
    return f"resilience simulate {options}{' --racks-apart' if best.racks_apart else ''}"


def _word(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else shlex.quote(str(value))


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say, size, table

    say(console, f"every {document['interval']} steps, {document['type']}, {_words(document)}; persistent every "
                 f"{document['persist_interval']}: {100 * document['expected_goodput']:.2f} % of the time is training",
        "bold")  # fmt: skip
    say(console, document["why"])
    say(console, "\nother intervals", "bold")
    rows = [(each["interval"], _percent(each["expected_goodput"])) for each in document["intervals"]]
    table(console, ("steps", "goodput"), rows, right="steps goodput")
    say(console, "\nother schemes, each at its own best interval", "bold")
    columns = (
        "scheme",
        "type",
        "steps",
        "goodput",
        "a node holds",
        "a rank sends",
        "survives",
        "fits",
        "in this version",
    )
    table(
        console,
        columns,
        [
            (_words(each), each["type"], each["interval"], _percent(each["expected_goodput"]), size(each["node_bytes"]),
             size(each["sent_bytes"]), each["survives"], _fits(each["fits"]), each["available"])
            for each in document["schemes"]
        ],
        right="steps goodput survives",
    )  # fmt: skip
    say(console, "\nsettings", "bold")
    for section, settings in document["settings"].items():
        say(console, f"{section}:") if settings else None
        for name, value in settings.items():
            say(console, f"  {name}: {str(value).lower() if isinstance(value, bool) else value}")
    hidden_s, stall_s = document["overlapped_s"], document["durations"]["stall_s"]
    waits = f"{hidden_s:.3g} of the {stall_s:.3g} s that training waits for a save"
    say(
        console,
        f"\nwith snapshot_mode: overlapped, {waits} would pass while the next step runs (see docs/overlapped.md)",
    )
    speeds = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in document["bytes_per_s"].items())
    say(console, f"\nreckoned with GB/s of a node: {speeds}" + ("" if document["measured"] else " (nothing measured)"))
    say(console, f"to simulate it: {document['simulate']}")


def _words(option: dict[str, Any]) -> str:
    factor = option["replication_factor"]
    return {"none": "no copies", "replica": f"{factor} copies"}.get(
        option["redundancy"], f"{option['redundancy']} over {factor}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _fits(fits: bool | None) -> str:
    return {True: "yes", False: "no", None: "not known"}[fits]

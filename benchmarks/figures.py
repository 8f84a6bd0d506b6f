"""Which figures are told, against what each is held, and which goals they have to reach.

Pure: from the samples of a run to figures with verdicts. `shard` bytes are per rank after the split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.peers import PEERS
from benchmarks.series import Series

__all__ = [
    "Figure",
    "Goal",
    "boundary_figures",
    "import_figures",
    "planning_figures",
    "redundancy_figures",
    "restore_figures",
    "save_figures",
]

Samples = Mapping[str, Series]

_SHORTER = "times shorter stall than"
_RESTORED = "times sooner restored, new process, than"
_SOONER = "times sooner committed on one node than"
_SOONER_ON_BOTH = "times sooner committed on both nodes than"


@dataclass(frozen=True)
class Goal:
    """A bound on the median of the ratio, or of the seconds where nothing is compared."""

    kind: Literal["at most", "at least"]
    value: float

    def __str__(self) -> str:
        return f"{'≤' if self.kind == 'at most' else '≥'} {self.value:g}"

    def met_by(self, value: float) -> bool:
        return value <= self.value if self.kind == "at most" else value >= self.value


@dataclass(frozen=True)
class Figure:
    """One line of the table: `ours`, what it is held `against`, the ratio of both, the goal."""

    name: str
    what: str
    ours: Series
    against: str = ""
    base: Series | None = None
    ratio: Series | None = None
    goal: Goal | None = None
    more_is_better: bool = False
    problem: str = ""  # why the goal is missed whatever the numbers say

    @property
    def worse_ratio(self) -> float | None:
        """The ratio at the bad end: 19 of 20 rounds were at least as good."""
        if self.ratio is None:
            return None
        return self.ratio.p5 if self.more_is_better else self.ratio.p95

    @property
    def met(self) -> bool | None:
        """None if there is no goal."""
        if self.goal is None:
            return None
        return not self.problem and self.goal.met_by((self.ratio or self.ours).median)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "what": self.what,
            "ours_s": self.ours.to_json(),
            "against": self.against,
            "base_s": self.base.to_json() if self.base else None,
            "ratio": self.ratio.to_json() if self.ratio else None,
            "goal": str(self.goal) if self.goal else None,
            "met": self.met,
            "problem": self.problem,
        }


def _times(
    name: str, what: str, ours: Series, against: str, base: Series, at_most: float | None = None, problem: str = ""
) -> Figure:
    """Ours as a multiple of a limit."""
    goal = None if at_most is None else Goal("at most", at_most)
    return Figure(name, what, ours, against, base, ours / base, goal, problem=problem)


def _faster(name: str, what: str, ours: Series, against: str, base: Series, at_least: float | None = None) -> Figure:
    """How many times faster than another ours is."""
    goal = None if at_least is None else Goal("at least", at_least)
    return Figure(name, what, ours, against, base, base / ours, goal, more_is_better=True)


def save_figures(found: Samples) -> list[Figure]:
    """`found`: seconds by measure, as `rounds.measure_saves` gives them."""
    memcpy, gloo = found["memcpy"], found["gloo"]
    stall, committed = found["ours_replicated.stall"], found["ours_replicated"]
    network = gloo + memcpy
    figures = [
        _times("stall", "stall of a replicated save", stall, "memcpy", memcpy, 1.05),
        _times(
            "stall_in_flight", "the same, the save before still in flight", found["ours_in_flight.stall"], "memcpy",
            memcpy,
        ),
        _times(
            "local_committed", "save without replication committed", found["ours_local"], "memcpy + hash",
            memcpy + found["hash"], 1.5,
        ),
        _times(
            "replicated_idle", "2-fold save committed on both nodes, training idle", committed, "gloo + memcpy",
            network, 1.1,
        ),
        _times(
            "replicated_device_bound", "the same, steps and boundaries going on", found["ours_device_bound"],
            "gloo + memcpy", network, 1.1,
        ),
        _faster("torch_save", _SHORTER, stall, "torch.save", found["torch_save"]),
        _faster("dcp_save", _SHORTER, stall, "DCP save", found["dcp_save"]),
        *_asynchronous(found, "dcp_async", "dcp_async", "DCP async_save", replicates=False),
        *_asynchronous(found, "dcp_process", "dcp_process", "DCP async_save by a process", replicates=False),
    ]  # fmt: skip
    if "nvrx_replicated" in found:
        nvrx = found["nvrx_replicated"]
        figures += [
            _faster("nvrx_local", _SOONER, found["ours_local"], "NVRx local", found["nvrx_local"]),
            _faster("nvrx_stall", _SHORTER, stall, "NVRx, 2-fold", nvrx, 25.0),
            _faster("nvrx_committed", _SOONER_ON_BOTH, committed, "NVRx, 2-fold", nvrx, 5.0),
            _faster("nvrx_async_stall", _SHORTER, stall, "NVRx async, 2-fold, stall", found["nvrx_async.stall"]),
            _faster(
                "drop_in_local", "ours by NVRx's interface, times sooner saved than", found["drop_in_local"],
                "NVRx local", found["nvrx_local"],
            ),
            _faster(
                "drop_in_replicated", "the same with copies on both nodes", found["drop_in_replicated"],
                "NVRx, 2-fold", nvrx,
            ),
            _faster(
                "drop_in_stall", "the same, asynchronous: times shorter stall than", found["drop_in_async.stall"],
                "NVRx async, 2-fold, stall", found["nvrx_async.stall"],
            ),
        ]  # fmt: skip
    return figures + _peer_figures(found) + _best_peer_figures(found)


def _peer_figures(found: Samples) -> list[Figure]:
    """Of each measured peer; a replicating one against our replicated save, as NVRx."""
    stall = found["ours_replicated.stall"]
    figures = []
    for peer in PEERS:
        module, name = peer.module, peer.name
        if f"{module}_async" in found:
            figures += _asynchronous(found, module, f"{module}_async", f"{name} async", replicates=peer.replicates)
        if f"{module}_save" in found:
            figures.append(_faster(f"{module}_save", _SHORTER, stall, f"{name} save", found[f"{module}_save"]))
    return figures


def _asynchronous(found: Samples, name: str, measure: str, words: str, *, replicates: bool) -> list[Figure]:
    """What training waits for an asynchronous save of another's, and when that is there."""
    ours, sooner = _same_work(found, replicates)
    stall = found["ours_replicated.stall"]
    return [
        _faster(f"{name}_stall", _SHORTER, stall, f"{words}, stall", found[f"{measure}.stall"]),
        _faster(f"{name}_committed", sooner, ours, f"{words}, committed", found[measure]),
    ]


def _best_peer_figures(found: Samples) -> list[Figure]:
    """The best of all in each round. Committed: of those that replicate, if one does; told if any but DCP is there."""
    waits = {"DCP": "dcp_async.stall", "DCP by a process": "dcp_process.stall", "NVRx": "nvrx_async.stall"}
    waits |= {peer.name: f"{peer.module}_async.stall" for peer in PEERS}
    replicated = {"NVRx": "nvrx_replicated"}
    replicated |= {peer.name: f"{peer.module}_async" for peer in PEERS if peer.replicates}
    alone = {"DCP": "dcp_async", "DCP by a process": "dcp_process"}
    alone |= {peer.name: f"{peer.module}_async" for peer in PEERS if not peer.replicates}
    waits, replicated, alone = (_measured(found, each) for each in (waits, replicated, alone))
    if all(name.startswith("DCP") for name in waits):
        return []
    ours, sooner = _same_work(found, bool(replicated))
    return [
        _faster("best_peer_stall", _SHORTER, found["ours_replicated.stall"], *_best(found, waits), 10.0),
        _faster("best_peer_committed", sooner, ours, *_best(found, replicated or alone), 3.0),
    ]


def _same_work(found: Samples, replicated: bool) -> tuple[Series, str]:
    """What of ours such a save is held against, and the words for it."""
    return (found["ours_replicated"], _SOONER_ON_BOTH) if replicated else (found["ours_local"], _SOONER)


def _measured(found: Samples, measures: Mapping[str, str]) -> dict[str, str]:
    return {name: measure for name, measure in measures.items() if measure in found}


def _best(found: Samples, measures: Mapping[str, str]) -> tuple[str, Series]:
    return f"the best of {', '.join(measures)}", Series.least([found[measure] for measure in measures.values()])


def restore_figures(found: Mapping[str, Samples]) -> list[Figure]:
    """`found`: by "<state>/<where>", the state being `in_place` or `adam`, where `own` or `peer`.

    A rank gets the whole replicated state back, which is two shards; from others, too.
    """
    figures = []
    for state, words in (("in_place", "state in memory that was touched"), ("adam", "two thirds into new memory")):
        own, peer = found[f"{state}/own"], found[f"{state}/peer"]
        goals = (1.4, 1.1) if state == "in_place" else (None, None)
        figures += [
            _times(
                f"restore_own_{state}", f"restore from the own node, new process; {words}", own["seconds"],
                "memcpy + hash of as much", (own["memcpy"] + own["hash"]).times(2), goals[0],
            ),
            _times(
                f"restore_peer_{state}", f"restore from a peer, new process; {words}", peer["seconds"],
                "gloo one way + memcpy of as much", peer["gloo_one_way"] + peer["memcpy"].times(2), goals[1],
            ),
        ]  # fmt: skip
    return figures + _restores_of_others(found["in_place/own"], found["in_place/peer"])


def _restores_of_others(own: Samples, peer: Samples) -> list[Figure]:
    """Ours from making the controller on, theirs from making what they need. The best: of the packages, in each
    round; told if any but DCP is there."""
    ways = _measured(own, {"DCP": "dcp", "NVRx": "nvrx"} | {each.name: each.module for each in PEERS})
    name = "torch.load of a mapped file, which proves nothing"
    figures = [_faster("restore_torch", _RESTORED, own["whole"], name, own["torch"])]
    figures += [
        _faster(f"restore_{measure}", _RESTORED, own["whole"], f"{name}, from the own node", own[measure])
        for name, measure in ways.items()
    ]
    if ways.keys() - {"DCP"}:
        figures.append(_faster("restore_best", _RESTORED, own["whole"], *_best(own, ways), 2.0))
    if "nvrx_replicated" in peer:
        name = "NVRx, one node being empty"
        figures.append(_faster("restore_nvrx_peer", _RESTORED, peer["whole"], name, peer["nvrx_replicated"], 2.0))
    return figures


def redundancy_figures(found: Samples) -> list[Figure]:
    """`found`: as `rounds.measure_redundancy` gives them. All of a clique of four nodes on one machine."""
    replica, two = found["replica_2"], "a replica on one other node"
    return [
        Figure("replica_2", f"{two} sent, verified, committed", replica),
        _times("replica_3", "replicas on two others", found["replica_3"], two, replica),
        _times("xor_4", "xor over four nodes: one loss", found["xor_4"], two, replica),
        _times("rs_4", "rs over four nodes: two losses", found["rs_4"], "replicas on two others", found["replica_3"]),
    ]


def boundary_figures(found: Mapping[int, Samples]) -> list[Figure]:
    """`found`: by number of processes, `bare` and `wrapped` seconds per step, and of each boundary the seconds that it
    takes (`boundary`) and those that the training thread `worked` in it."""
    figures = []
    for size, samples in found.items():
        what = f"a boundary without a save, {size} processes"
        ratio = samples["wrapped"] / samples["bare"]
        figures += [
            Figure(
                f"boundary_{size}", f"{what}; the ratio is of whole steps", samples["boundary"],
                "the loop without the trainer", samples["bare"], ratio,
            ),
            Figure(
                f"boundary_work_{size}", f"{what}: processor time of the training thread", samples["worked"],
                goal=Goal("at most", 1e-4),
            ),
        ]  # fmt: skip
    return figures


def planning_figures(found: Mapping[int, Samples]) -> list[Figure]:
    """`found`: by number of ranks, seconds to `decode` the records and to `plan`."""
    totals = {ranks: samples["decode"] + samples["plan"] for ranks, samples in found.items()}
    figures = []
    for ranks, total in totals.items():
        half = totals.get(ranks // 2)
        what = f"election and retrieval plan, {ranks:,} ranks × 3 saves, one core"
        against = "" if half is None else "twice the time of half the ranks"
        base = None if half is None else half.times(2)
        figures.append(Figure(f"planning_{ranks}", what, total, against, base, None if base is None else total / base))
    largest = max(totals)
    figures.append(
        Figure("planning", f"the same at {largest:,} ranks, in seconds", totals[largest], goal=Goal("at most", 1.0))
    )
    return figures


def import_figures(found: Samples, said: list[str]) -> list[Figure]:
    """`found`: seconds of `torch` alone, then with `resilience`, and with the `names` that a script imports."""
    torch, problem = found["torch"], f"it warns: {said[0][:200]}" if said else ""
    return [
        _times("import", "import torch, resilience", found["resilience"], "import torch", torch, 1.05, problem),
        _times("import_names", "import torch, and ResilientTrainer from resilience", found["names"], "import torch",
               torch, None, problem),
    ]  # fmt: skip

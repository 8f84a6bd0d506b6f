"""The undisturbed run that a drill is compared with: same script, same ranks, nothing saved, nothing broken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import resilience
from resilience.drill.agents import Agents, last_words
from resilience.drill.environment import Plan, environment, reference_settings
from resilience.drill.orchestrate import DrillFailed
from resilience.drill.output import LossTail
from resilience.drill.result import digest_of
from resilience.drill.story import Story
from resilience.observe.events import EventTail, read_events

_NODE = "reference"


@dataclass(frozen=True)
class Reference:
    """`losses`: (iteration, loss) as the script told them."""

    digest: str | None
    seconds: float
    losses: tuple[tuple[int, float], ...] = ()


def reference_run(plan: Plan, agents: Agents, story: Story, deadline: float) -> Reference:
    """Run it, or take the digest of an earlier one with the same parameters in the same work directory.

    Raises `DrillFailed` when the script does not even run undisturbed.
    """
    kept = plan.reference_dir / "reference.json"
    key = _key(plan)
    if (earlier := _kept(kept, key)) is not None:
        story.tell("reference", "the undisturbed run of an earlier drill with the same parameters is used")
        return earlier
    shutil.rmtree(plan.reference_dir, ignore_errors=True)
    plan.reference_dir.mkdir(parents=True)
    world_size = plan.scenario.world_size
    story.tell("reference", f"first an undisturbed run of {plan.scenario.train_iters} iterations, to compare with")
    began = time.monotonic()
    events, log = plan.reference_dir / "events", plan.reference_dir / "log.txt"
    events.mkdir()
    settings = reference_settings(plan, events)
    agents.start([_NODE], world_size, plan.script, [environment(os.environ, plan, _NODE, None, settings)], [log], 0)
    try:
        _wait(plan, agents, EventTail(events), log, deadline)
    finally:
        agents.end(grace_s=0)
    seconds = time.monotonic() - began
    digest = digest_of(read_events([events]), plan.scenario.train_iters, world_size)
    losses = tuple(LossTail([log]).poll())
    kept.write_text(json.dumps({"key": key, "digest": digest, "losses": losses}) + "\n", encoding="utf-8")
    story.tell("reference", f"done in {seconds:.1f} s; final state {digest or 'unknown: it told no digest'}")
    return Reference(digest, seconds, losses)


def _wait(plan: Plan, agents: Agents, tail: EventTail, log: Path, deadline: float) -> None:
    quiet_since = time.monotonic()
    while (code := agents.exits()[_NODE]) is None:
        if tail.poll():
            quiet_since = time.monotonic()
        if time.monotonic() - quiet_since > plan.stalled_after_s or time.time() > deadline:
            raise DrillFailed("The undisturbed run makes no progress.", last_words(log, 20))
        time.sleep(0.05)
    if code != 0:
        raise DrillFailed(f"The script does not run even undisturbed (exit status {code}).", last_words(log, 20))


def _kept(path: Path, key: str) -> Reference | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != key or not isinstance(kept["digest"], str):
            return None
        losses = tuple((int(iteration), float(loss)) for iteration, loss in kept["losses"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Reference(str(kept["digest"]), 0.0, losses)


def _key(plan: Plan) -> str:
    """Changes with whatever could change the final state: script, arguments, shape, settings, the package itself."""
    package = Path(resilience.__file__).parent
    parts = [
        sys.version,
        repr(plan.script),
        str(plan.scenario.world_size),
        str(plan.scenario.train_iters),
        repr(plan.checkpoint),
        repr(plan.resiliency),
        *(f"{path}:{path.stat().st_mtime_ns}" for path in sorted(package.rglob("*.py"))),
    ]
    script = Path(plan.script[0])
    content = script.read_bytes() if script.is_file() else b""
    return hashlib.blake2b("\n".join(parts).encode() + content, digest_size=16).hexdigest()

"""What a start says about itself: who takes part, what was resumed from and why, what a user should know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from resilience.assembly import Start
from resilience.reports import Resume
from resilience.runtime.process_age import process_age_s
from resilience.state.training_state import TrainingState

__all__ = ["announce_start"]


def announce_start(
    start: Start,
    state: TrainingState,
    generation: int,
    resume: Resume | None,
    notes: Sequence[str],
    reason: str,
    tell: Callable[..., None],
    env: Mapping[str, str],
) -> None:
    """Emit the events of a start. `notes`: what was seen while taking stock; `reason`: of the decision."""
    job = start.job
    age_s = process_age_s()
    tell(
        "start", world_size=job.world_size, generation=generation, run_id=start.run_id, local_rank=job.local_rank,
        **({} if age_s is None else {"process_s": age_s}),
    )  # fmt: skip
    if job.rank == 0:
        for note in (*notes, *start.topology.notes, *_cautions(state)):
            tell("warning", what=note, advice="")
        _warn_of_shared_store(tell, env)
    if resume is None:
        tell("fresh", reason=reason)
        return
    passed_over = [
        {"iteration": p.iteration, "generation": p.generation, "tier": p.tier, "reason": p.reason}
        for p in resume.passed_over
    ]
    for note in resume.notes if job.rank == 0 else ():
        tell("warning", what=f"resumed, but not all as it was: {note}", advice="")
    first = job.rank == 0  # the counts are of the whole job: said once, so that they can be summed
    tell(
        "resume",
        iteration=resume.iteration,
        generation=resume.generation,
        tier=resume.tier,
        seconds=resume.seconds,
        retrieved_bytes=resume.retrieved_bytes * first,
        own_copies=resume.own_copies * first,
        replica_copies=resume.replica_copies * first,
        rebuilt=resume.rebuilt * first,
        passed_over=passed_over,
        reason=reason,
    )


def _cautions(state: TrainingState) -> list[str]:
    """What a restart of this job could not do, said while it can still be changed."""
    return [] if state.loader.exact else [f"the data loader: {state.loader.exactness}"]


def _warn_of_shared_store(tell: Callable[..., None], env: Mapping[str, str]) -> None:
    """torchrun's workers share one store over restarts in place: ranks then find the addresses of dead peers there."""
    restarts = env.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts not in ("", "0") and env.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        tell(
            "warning",
            what="a restart in place by torchrun may fail: its store keeps the addresses of the dead processes",
            advice="Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun.",
        )

"""The life of this rank's copies on nodes: the links to its clique over the epochs, and what goes through them."""

from __future__ import annotations

from collections.abc import Callable

from resilience.assembly import Start
from resilience.errors import PeerLostError, ResilienceError
from resilience.planning.inventory import Kept, ParityName
from resilience.planning.pacing import falls_behind
from resilience.replication.communicator import Agreements, Links
from resilience.replication.pace import Pace
from resilience.replication.protection import Board, Protection, SaveJob
from resilience.replication.redundancy import REDUNDANCIES, Redundancy
from resilience.restore import Plan
from resilience.runtime.clock import Clock
from resilience.runtime.worker import Lane
from resilience.saving.progress import CountedLinks
from resilience.snapshot.twins import Twins
from resilience.stores.keeper import ShardKeeper

__all__ = ["Replicas"]


class Replicas:
    """Everything here happens in the protect lane, in the order in which all ranks agreed on it."""

    def __init__(
        self,
        start: Start,
        keeper: ShardKeeper,
        group: Agreements,
        board: Board,
        lane: Lane,
        clock: Clock,
        tell: Callable[..., None],
        twins: Twins | None = None,
    ) -> None:
        """`group`: the data-parallel group, used by the lane alone. `twins`: where replicas are composed."""
        self._twins = twins
        self._start = start
        self._keeper = keeper
        self._lane = lane
        self._clock = clock
        self._tell = tell
        self._protection = Protection(keeper, group, board, tell, clock.now, start.job.nodes)
        self._bytes_per_s: float | None = None
        self._pace = Pace(None, clock.now, clock.sleep)
        self._saved_at: float | None = None
        self._warned = False
        self._epoch = 0
        self.transfers = 0  # that are over: a wait for saves sees by it that they move
        self._tried = -1  # the newest epoch whose links were opened, or could not be; written in the lane

    def begin(self, plan: Plan, bytes_per_s: float | None) -> None:
        """Open the first links and send what the elected save lacks. `bytes_per_s`: cap of the traffic."""
        if not self._start.topology.replicates:
            return
        self._bytes_per_s = bytes_per_s
        self._pace = Pace(bytes_per_s, self._clock.now, self._clock.sleep)
        self._protection.replicating = True
        self._lane.submit("connect", lambda: self._connect(0))
        self._again(plan)

    def submit(self, job: SaveJob) -> None:
        """Hand over one agreed save."""
        if job.arena is not None:
            self._check_cap(job.arena.nbytes)
        self._lane.submit(f"save {job.save.iteration}", lambda: self._protection.run(job))

    def close(self, *, failed: bool) -> None:
        self._protection.close(failed=failed)

    def _again(self, plan: Plan) -> None:
        """A node that came empty gets back what it keeps, at once, in the background: one exchange, like a save's."""
        chosen, standing = plan.decision.chosen, plan.standing
        keeper, protection, rank = self._keeper, self._protection, self._start.job.rank
        clique = self._start.topology.clique_of(rank)
        if chosen is None or not standing.lacks_any(clique):
            return
        sends = standing.is_sent(rank, clique)
        save, digest = chosen.save, standing.digests[rank]

        def lacks(kept: Kept) -> bool:
            if isinstance(kept, ParityName):  # what lies under that name may be of another clique
                return rank in standing.lacking_parity
            return not keeper.holds(save, kept)

        def protect() -> None:
            arena = None
            try:
                arena = keeper.mapped(save, rank) if sends else None
            except (ResilienceError, OSError) as error:  # the others must hear "nothing", not silence
                self._tell(
                    "warning", what=f"the shard of iteration {save.iteration} cannot be sent: {error}", advice=""
                )
            protection.protect_again(save, arena, digest, lacks, plan.split)

        self._lane.submit("protect again", protect)

    def _connect(self, epoch: int) -> None:
        """Open the links of an epoch to the clique. In the protect lane."""
        if epoch < self._epoch:
            return  # this lane was late: the peers are on their way to a newer one
        try:
            self._protection.connect(None)
            self._protection.connect(self._open(epoch))
        finally:
            self._tried = epoch

    def _open(self, epoch: int) -> Redundancy | None:
        topology, job = self._start.topology, self._start.job
        members = topology.clique_of(job.rank)
        if len(members) == 1:
            self._protection.replicating = False
            return None
        try:
            name = f"epoch{epoch}/clique{members[0]}"
            links: Links = self._start.communicator.links(name, members, wanted=lambda: epoch == self._epoch)
        except PeerLostError as error:
            peer = {} if error.rank is None else {"peer": error.rank, "peer_node": job.nodes[error.rank]}
            self._tell("replication_down", error=str(error), epoch=epoch, **peer)
            return None
        if epoch:
            self._tell("epoch", epoch=epoch)
        links = CountedLinks(links, self._count)
        return REDUNDANCIES[self._start.scheme.name](links, job.rank, topology, self._pace, self._keeper, self._twins)

    def _count(self) -> None:
        self.transfers += 1

    def _check_cap(self, shard_bytes: int) -> None:
        """Say once that the cap is too low for how often saves come."""
        before, self._saved_at = self._saved_at, self._clock.now()
        if self._bytes_per_s is None or before is None or self._warned:
            return
        sent = self._start.scheme.traffic(self._start.topology, self._start.job.rank, shard_bytes)
        problem = falls_behind(sent, self._bytes_per_s, self._saved_at - before)
        if problem:
            self._warned = True
            self._tell("warning", what=problem, advice="Raise replication_bytes_per_s, or save less often.")

    def epoch_wanted(self) -> int:
        """The next epoch if this rank's links are down, else the one in force."""
        return self._epoch + 1 if self._protection.broken and self._tried == self._epoch else self._epoch

    def set_epoch(self, epoch: int) -> None:
        """All ranks agreed on `epoch`: rebuild the links, in the lane's order."""
        if epoch > self._epoch:
            self._epoch = epoch
            self._lane.submit("connect", lambda: self._connect(epoch))

"""A save on nodes that another number of ranks took: its shards brought together, and loaded as a checkpoint would be.

    1. verify   one copy of every shard, each by one rank of a node that holds it; bad ones are struck off
    2. show     every rank hears what is in each shard: header, values, small tensors, digests of all segments
    3. plan     `Stager` plans the load as from shared storage: the same rules, the same code (`state/recut.py`)
    4. bring    the segments that the plan needs come to the nodes that have no copy of them, each once
    5. copy     once all ranks have verified bytes of all that they need, straight into the live tensors

Nothing live changes before step 5, which begins when all ranks agreed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from resilience.config import CheckpointConfig
from resilience.errors import CorruptCopyError
from resilience.formats.protocol import Target
from resilience.formats.shard_parts import parts_together, to_be_marked
from resilience.formats.shards_reader import ShardsReader
from resilience.formats.shown_shard import (
    ShownShard,
    frames,
    mark_of,
    shown_bytes,
    shown_of,
    small_marks,
    unframed,
)
from resilience.job import Job
from resilience.planning.assembly import Assembly
from resilience.planning.decision import Candidate, Strike
from resilience.planning.typed_json import from_json
from resilience.replication.assembling import ShardBringer, share
from resilience.replication.communicator import Agreements
from resilience.reports import Resume
from resilience.restore_staging import Peers, Stager
from resilience.state.training_state import TrainingState
from resilience.stores.digest import algorithm_of, combined
from resilience.stores.filesystem import FileSystem
from resilience.stores.node_store import NodeStore
from resilience.stores.shared_records import FolderRecord

__all__ = ["AssemblyLoader"]


@dataclass
class AssemblyLoader:
    """One start's. `store`: this node's directory, for what is told to people."""

    job: Job
    setup: Agreements
    bringer: ShardBringer
    checkpoint: CheckpointConfig
    peers: Peers
    store: NodeStore
    fs: FileSystem
    tell: Callable[..., None]

    def obtain(
        self, chosen: Candidate, assembly: Assembly
    ) -> tuple[list[Strike], Callable[[TrainingState], Callable[[], Resume]]]:
        """Verify this rank's share of the copies; the function (collective) plans the load and has its bytes ready."""
        failed = self.bringer.verify_shown(chosen.save, assembly)
        return failed, lambda state: self._load(chosen, assembly, state)

    def close(self) -> None:
        """Free what was mapped and fetched. Local; after every rank loaded."""
        self.bringer.close()

    def _load(self, chosen: Candidate, assembly: Assembly, state: TrainingState) -> Callable[[], Resume]:
        shards = self._hear_of_all(chosen, assembly)
        reader = self._open(chosen, assembly, shards)
        digests = {owner: shard.segments for owner, shard in shards.items()}

        def bring(targets: Sequence[Target]) -> None:
            self.bringer.bring(chosen.save, assembly, lambda: reader.wanted(targets), digests)
            reader.fill()

        stager = Stager(
            reader, chosen, self.checkpoint, lambda: None, self.job.rank, self.peers, self.fs, self.tell, bring=bring
        )
        copy = stager.stage(state)

        def finish() -> Resume:
            resume = copy()
            bringer = self.bringer
            return replace(
                resume, retrieved_bytes=bringer.retrieved_bytes, own_copies=bringer.own_copies,
                replica_copies=bringer.replica_copies,
            )  # fmt: skip

        return finish

    # -- what the shards show of themselves ---------------------------------------------------------------------------

    def _hear_of_all(self, chosen: Candidate, assembly: Assembly) -> dict[int, ShownShard]:
        """By owner. Collective."""

        def tell_mine() -> bytes:
            shown = self.bringer.shown(chosen.save, assembly)
            return frames(shown_bytes(shard, segments) for _, shard, segments in shown)

        expected = {each.owner: each for each in assembly.shown}
        shards: dict[int, ShownShard] = {}
        for payload in share(self.setup, tell_mine):
            for content in unframed(memoryview(payload)):
                shard = shown_of(content)
                header = shard.header
                planned = expected.get(header.owner)
                if planned is None or (header.save, header.world_size) != (chosen.save, assembly.world_size):
                    raise CorruptCopyError(f"a shard of rank {header.owner} was told of that is not of this save.")
                if (combined(shard.segments, algorithm_of(planned.digest)), shard.nbytes) != (
                    planned.digest,
                    planned.nbytes,
                ):
                    raise CorruptCopyError(f"what was told of rank {header.owner}'s shard is not of what was sealed.")
                shards[header.owner] = shard
        if shards.keys() != expected.keys():
            raise CorruptCopyError(f"of {len(expected)} shards {len(shards)} were told of.")
        return shards

    def _open(self, chosen: Candidate, assembly: Assembly, shards: Mapping[int, ShownShard]) -> ShardsReader:
        """Collective: what has to be compared before it is known what belongs together is looked at where it lies."""
        headers = {owner: shard.header for owner, shard in shards.items()}
        asked = to_be_marked(headers)

        def mark() -> bytes:
            told = {}
            for shown, shard, _ in self.bringer.shown(chosen.save, assembly):
                pieces = shard.header.pieces
                told[shown.owner] = {key: mark_of(shard, pieces[key]) for key in asked[shown.owner]}
            return json.dumps(told).encode()

        marks = {owner: small_marks(shard) for owner, shard in shards.items()}
        for payload in share(self.setup, mark):
            for owner, told in from_json(dict[int, dict[str, str]], payload, "what a rank's pieces are").items():
                if owner not in marks:
                    raise CorruptCopyError(f"pieces of rank {owner} were told of, whose shard was not.")
                marks[owner] |= told
        together = parts_together(headers, marks)
        folder = self.store.shard_path(chosen.save, 0, assembly.world_size).parent
        record = FolderRecord(chosen.run_id or "", chosen.save, assembly.world_size, "shards", {})
        here = [copy.owner for copy in assembly.local if copy.node == self.job.node_id]
        return ShardsReader(folder, record, shards, together, here, self.bringer.content)

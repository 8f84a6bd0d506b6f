"""ML Flashpoint's save of a shard, put together from its parts: only its adapters for frameworks do that themselves.

It writes into a pool of mapped files and then sends the file to the other node's service. Tensors that are on the CPU
are not copied before that, so that the state is free again when the file is written.
"""

from __future__ import annotations

import concurrent.futures
import copy
import os
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
import torch.distributed as dist
from ml_flashpoint.adapter.pytorch import custom_state_dict_saver as steps
from ml_flashpoint.adapter.pytorch.memory_storage_writer import MemoryStorageWriter
from ml_flashpoint.checkpoint_object_manager.checkpoint_object_manager import CheckpointObjectManager
from ml_flashpoint.core.buffer_pool import BufferPoolConfig
from ml_flashpoint.core.checkpoint_id_types import CheckpointContainerId
from ml_flashpoint.core.checkpoint_saver import DefaultMLFlashpointCheckpointSaver
from ml_flashpoint.replication.replication_manager import PairwiseReplicationStrategy, ReplicationManager
from ml_flashpoint.replication.transfer_service.transfer_service_ext import TransferService
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.utils import _DistWrapper

from benchmarks.rank import Place, waited

__all__ = ["MlFlashpointSaves"]

_BUFFERS: Final = 3
_HEADERS_BYTES: Final = 1 << 20  # of a file, beside the tensors
#: A copy has the same name on every node. Here the nodes share a machine: the name goes by way of the working
#: directory, which each process has for itself.
_HERE: Final = Path("/proc/self/cwd")


class MlFlashpointSaves:
    """A bench of its own; making it is collective as well."""

    def __init__(self, place: Place, half: dict[str, torch.Tensor]) -> None:
        home = place.node_directory / "ml-flashpoint"
        home.mkdir(parents=True)
        os.chdir(home)
        os.environ |= {"NNODES": str(place.size), "LOCAL_RANK": "0"}  # counted by GPUs otherwise
        nbytes = place.settings.shard_bytes + _HEADERS_BYTES
        self._objects = CheckpointObjectManager(BufferPoolConfig(str(_HERE / "pool"), place.rank, _BUFFERS, nbytes))
        self._replication = _replication(self._objects, place)
        self._saver = DefaultMLFlashpointCheckpointSaver(
            dist.get_rank, lambda: 0, dist.barrier, self._objects, self._replication, nbytes
        )
        self._events: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._events.set_result(SimpleNamespace(dict=dict, Event=threading.Event))  # this process does it all itself
        self._world = _DistWrapper(None, True, 0)
        self._half, self._number = half, 0
        self._plan: tuple[Any, Any, bool] = (None, None, False)
        self._metadata: Any = None
        self._removal: subprocess.Popen[bytes] | None = None  # of the save before

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {"ml_flashpoint_async": self._async}

    def _async(self) -> dict[str, Any]:
        try:
            return waited(self._write, lambda complete: complete())
        finally:
            if self._removal is not None:
                self._removal.wait()

    def _write(self) -> Callable[[], None]:
        """Plans (once: later saves find the same) and writes. Returns what completes the save."""
        self._number += 1
        name = CheckpointContainerId(str(_HERE / CheckpointContainerId.format_version_container(self._number)))
        writer = MemoryStorageWriter(self._saver, self._events, 1)
        writer.reset(name.data)
        buckets, metadata, *plan = steps.generate_plan(
            name, self._half, writer, DefaultSavePlanner(), self._world, self._plan
        )
        self._plan = tuple(plan)
        self._metadata = metadata or self._metadata
        staged = writer.stage_write_data_buckets(name, buckets)
        steps.write_data(name, writer, staged, False)
        return partial(self._complete, name, writer, {bucket.object_id for bucket in staged})

    def _complete(self, name: Any, writer: Any, objects: set[Any]) -> None:
        for sent in concurrent.futures.as_completed(writer.replicate_written_objects(objects)):
            if not sent.result().success:
                raise RuntimeError(sent.result().error_message)
        steps.finish_write(name, writer, copy.deepcopy(self._metadata), self._world)
        self._removal = self._saver.finalize_checkpoint(name)

    def close(self) -> None:
        self._objects.teardown_pool()
        self._replication.shutdown()


def _replication(objects: Any, place: Place) -> Any:
    """Pairs of nodes with one process each."""
    service = TransferService()
    addresses: list[Any] = [None] * place.size
    dist.all_gather_object(addresses, f"127.0.0.1:{service.initialize(0, global_rank=place.rank)}")
    manager = ReplicationManager()
    manager.initialize(
        objects, replication_transfer_service=service, repl_strategy=PairwiseReplicationStrategy(addresses, 1)
    )
    return manager

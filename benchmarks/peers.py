"""Which other packages for checkpoints are compared, besides NVRx and what torch has: names, versions, what each does.

Nothing of theirs is imported here. What is measured by which of their calls stands in `benchmarks.peers_rank`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["PEERS", "Peer"]


@dataclass(frozen=True)
class Peer:
    """`measures` are of its asynchronous saves (`…_async`: wait and completion) and synchronous ones (`…_save`)."""

    name: str  # on PyPI
    version: str
    module: str
    measures: tuple[str, ...]
    replicates: bool  # its save is complete when another node has it too
    restores: bool = True  # what it saved can be loaded without an adapter for a framework
    beside: tuple[str, ...] = ()  # what it imports and we do not have, each as name==version
    pip_options: tuple[str, ...] = ()


PEERS: Final = (
    Peer(
        "torchsnapshot", "0.1.0", "torchsnapshot", ("torchsnapshot_async", "torchsnapshot_save"), False,
        beside=("aiofiles==25.1.0", "importlib-metadata==8.7.0", "nest-asyncio==1.6.0", "psutil==7.2.2", "zipp==4.1.2"),
    ),
    Peer(
        "torch-checkpointing", "0.1.1", "torch_checkpointing",
        ("torch_checkpointing_async", "torch_checkpointing_save"), False, beside=("safetensors==0.8.0",),
    ),
    Peer("lm-resiliency", "0.2.0", "lm_resiliency", ("lm_resiliency_async",), True),
    Peer(
        "ml-flashpoint", "0.0.10", "ml_flashpoint", ("ml_flashpoint_async",), True, restores=False,
        # Its own ignore file would leave its extension modules out.
        pip_options=(
            "--config-settings=cmake.define.BUILD_TESTING=OFF", "--config-settings=sdist.include=src/**/*.so",
        ),
    ),
)  # fmt: skip

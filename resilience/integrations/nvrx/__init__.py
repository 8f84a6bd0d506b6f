"""Local checkpoints by the interface of NVIDIA's Resiliency Extension (NVRx), for jobs that use it already.

    from resilience.integrations.nvrx import CliqueReplicationStrategy, LocalCheckpointManager

in place of NVRx's modules; docs/trainers.md says what is the same and what is not. NVRx itself need not be installed;
where it is, exceptions, requests and state dicts are its own classes.
"""

from resilience.integrations.nvrx.basic_state import BasicTensorAwareStateDict
from resilience.integrations.nvrx.cliques import (
    CliqueReplicationStrategy,
    GroupWrapper,
    LazyCliqueReplicationStrategy,
    parse_group_sequence,
)
from resilience.integrations.nvrx.manager import CkptID, LocalCheckpointManager
from resilience.integrations.nvrx.names import (
    AsyncRequest,
    CheckpointingException,
    LocalCheckpointError,
    NoReplicasAvailableError,
    SameMachineReplicationException,
    TensorAwareStateDict,
)

__all__ = [
    "AsyncRequest",
    "BasicTensorAwareStateDict",
    "CheckpointingException",
    "CkptID",
    "CliqueReplicationStrategy",
    "GroupWrapper",
    "LazyCliqueReplicationStrategy",
    "LocalCheckpointError",
    "LocalCheckpointManager",
    "NoReplicasAvailableError",
    "SameMachineReplicationException",
    "TensorAwareStateDict",
    "parse_group_sequence",
]

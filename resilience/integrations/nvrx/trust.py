"""Which classes a local checkpoint may name: what is read back is a pickle, and a pickle can name anything.

A state of Megatron's is opaque to us, so it is pickled as a whole, without its tensors; this is the one place of the
package where a pickle is loaded as it is. Its bytes have matched their digest before. A name in it is admitted if it is

- of Python's or torch's plain values (the list below), or an enumeration's member,
- a `TensorAwareStateDict`, or one of Megatron Core's descriptions of shards,
- or one of the caller's `trusted_classes`.

Nothing is imported for a name that is on neither list: it has to be there already. The same rule is applied when a
state is saved, so that what could not be loaded is refused before it is counted on.
"""

from __future__ import annotations

import enum
import io
import pickle
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Final

import torch

from resilience.errors import CorruptCopyError, UnsupportedStateError
from resilience.integrations.nvrx.names import TensorAwareStateDict
from resilience.stores.pickle_bounds import bounds_of

__all__ = ["Trust"]

_PLAIN: Final = frozenset(
    {
        "argparse.Namespace",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.frozenset",
        "builtins.range",
        "builtins.set",
        "builtins.slice",
        "collections.Counter",
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.deque",
        "builtins.dict",
        "builtins.list",
        "builtins.int",
        "builtins.float",
        "datetime.date",
        "datetime.datetime",
        "datetime.timedelta",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.numeric._frombuffer",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.core.numeric._frombuffer",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.PosixPath",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_parameter",
        "resilience.integrations.nvrx.basic_state._Place",
        "nvidia_resiliency_ext.checkpointing.local.replication.torch_device_utils.TensorPlaceholder",
        "megatron.core.dist_checkpointing.mapping.LocalNonpersistentObject",
        "megatron.core.dist_checkpointing.mapping.ShardedObject",
        "megatron.core.dist_checkpointing.mapping.ShardedTensor",
        "megatron.core.rerun_state_machine.Call",
        "megatron.core.rerun_state_machine.Caller",
        "megatron.core.dist_checkpointing.tensor_aware_state_dict.MCoreTensorAwareStateDict",
    }
)


class Trust:
    """What may be named in a state. `trusted_classes`: classes, or their full names ("my.module.MyClass")."""

    def __init__(self, trusted_classes: Iterable[type | str] = ()) -> None:
        self._names = _PLAIN | {
            each if isinstance(each, str) else f"{each.__module__}.{each.__qualname__}" for each in trusted_classes
        }

    def load(self, content: bytes, tensor: Callable[[Any], torch.Tensor]) -> Any:
        """The state in `content`; `tensor` gives the one that an id stands for.

        CorruptCopyError if it asks for too much, UnsupportedStateError if it names what is not trusted.
        """
        problem = bounds_of(content).problem
        if problem:
            raise CorruptCopyError(f"the state's own part is refused: {problem}.")
        return _Unpickler(content, self, tensor).load()

    def check(self, content: bytes) -> None:
        """UnsupportedStateError if `content`, a state's own pickle, names what could not be loaded."""
        for module, name in _named(content):
            self.find(module, name)

    def find(self, module: str, name: str) -> Any:
        """What is named so; UnsupportedStateError if it is not to be trusted, or not imported."""
        listed = f"{module}.{name}" in self._names
        found: Any = _imported(module) if listed else sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            raise UnsupportedStateError(
                f"the state has a {module}.{name}, which this process has not imported.",
                advice=f"Import {module} before the checkpoint is loaded.",
            )
        if listed or isinstance(found, torch.dtype) or _is_admitted_kind(found):
            return found
        raise UnsupportedStateError(
            f"the state has a {module}.{name}, which is not trusted to be loaded.",
            advice=f'Pass trusted_classes=["{module}.{name}"] to LocalCheckpointManager if it is yours.',
        )


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        return None


def _is_admitted_kind(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, enum.Enum | TensorAwareStateDict)


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, trust: Trust, tensor: Callable[[Any], torch.Tensor]) -> None:
        super().__init__(io.BytesIO(content))
        self._trust = trust
        self._tensor = tensor

    def find_class(self, module: str, name: str) -> Any:
        return self._trust.find(module, name)

    def persistent_load(self, pid: Any) -> torch.Tensor:
        return self._tensor(pid)


def _named(content: bytes) -> set[tuple[str, str]]:
    """What a pickle of ours would look up: it is loaded once with stand-ins, in which nothing runs."""
    noting = _Noting(content)
    noting.load()
    return noting.named


class _StandIn(dict[Any, Any]):
    """Takes whatever is done to an object while it is unpickled."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> _StandIn:
        return _StandIn()

    def __setstate__(self, state: Any) -> None:
        return

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def append(self, value: Any) -> None:
        return

    def extend(self, values: Any) -> None:
        return

    def add(self, value: Any) -> None:
        return


class _Noting(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.named: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.named.add((module, name))
        return _StandIn

    def persistent_load(self, pid: Any) -> Any:
        return _StandIn()

"""Which checkpoint of a shared directory counts as its newest: the two tracker files at its top.

`latest_train_state.pt` (a copy of the newest `train_state.pt`) counts; `latest_checkpointed_iteration.txt` ("7" or
"release", no newline) only where the first is absent or unreadable. Read without torch: a tracker is opened by every
`resilience ls`.
"""

from __future__ import annotations

import io
import lzma
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilience.errors import CorruptCopyError, UnsafePathError
from resilience.stores.filesystem import FileSystem
from resilience.stores.inert_pickle import Inert, PersistentId, load_inert

__all__ = ["RELEASE", "TEXT_TRACKER", "TRAIN_STATE", "TRAIN_STATE_TRACKER", "Tracker", "read_tracker", "step_of"]

TRAIN_STATE = "train_state.pt"
TRAIN_STATE_TRACKER = "latest_train_state.pt"
TEXT_TRACKER = "latest_checkpointed_iteration.txt"

#: The checkpoint in the folder `release`: a model to start from, without a place in any run's count of iterations.
RELEASE = "release"

_STORAGE_BYTES = {"torch.IntStorage": 4, "torch.LongStorage": 8}
_ALLOWED = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        *(f"torch.{kind}Storage" for kind in ("Int", "Long", "Float", "Double", "Bool")),
    }
)
_LIMIT = 1 << 20

#: What a damaged archive makes `zipfile` raise; the bytes are in memory, so that no OSError is one of the disk.
_BROKEN_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True)
class Tracker:
    """What the trackers name: an iteration, `release`, or nothing (None); `notes` says what was odd about them."""

    names: int | str | None
    notes: tuple[str, ...] = ()


def read_tracker(root: Path, fs: FileSystem) -> Tracker:
    """Look at both trackers. An I/O error is a StoreError: not being able to look is not the same as no tracker."""
    notes: list[str] = []
    found: dict[str, int | str] = {}
    for name, read in ((TRAIN_STATE_TRACKER, step_of), (TEXT_TRACKER, _iteration_in_text)):
        try:
            found[name] = read(fs.read(root / name, _LIMIT), str(root / name))
        except FileNotFoundError:
            continue
        except (CorruptCopyError, UnsafePathError) as error:
            notes.append(str(error))
    if not found:
        return Tracker(None, tuple(notes))
    binary, text = found.get(TRAIN_STATE_TRACKER), found.get(TEXT_TRACKER)
    if text == RELEASE and (binary is None or binary == 0):
        return Tracker(RELEASE, tuple(notes))
    if binary is not None and text is not None and binary != text:
        notes.append(f"{TRAIN_STATE_TRACKER} in {root} names {binary}, {TEXT_TRACKER} {text}: the first one counts.")
    return Tracker(text if binary is None else binary, tuple(notes))


def step_of(content: bytes, what: str) -> int:
    """`step` in the bytes of a `train_state.pt` (int32 or int64); CorruptCopyError that names `what` if it has none."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _step_in(archive, what)
    except CorruptCopyError:
        raise
    except _BROKEN_ARCHIVE as error:
        raise CorruptCopyError(f"{what} is no file of torch.save: {error}.") from error


def _step_in(archive: zipfile.ZipFile, what: str) -> int:
    pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "")
    prefix = pickled.removesuffix("data.pkl")
    state = load_inert(_member(archive, pickled, what), _ALLOWED, what)
    storage = _storage_of(state.get("step") if isinstance(state, dict) else None)
    if storage is None:
        raise CorruptCopyError(f"{what} holds no step.")
    key, nbytes = storage
    content = _member(archive, f"{prefix}data/{key}", what)
    order = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in archive.namelist() else b"little"
    step = int.from_bytes(content, "big" if order == b"big" else "little", signed=True)
    if len(content) != nbytes or step < 0:
        raise CorruptCopyError(f"{what} holds a step of {len(content)} bytes that reads {step}.")
    return step


def _storage_of(tensor: Any) -> tuple[str, int] | None:
    """`(key, bytes)` of the storage behind a scalar integer tensor of its own; None for anything else."""
    if not isinstance(tensor, Inert) or tensor.pickled_name != "torch._utils._rebuild_tensor_v2":
        return None
    match tensor.arguments:
        case (PersistentId(arguments=(("storage", type() as kind, str() as key, _, 1),)), 0, (), *_):
            nbytes = _STORAGE_BYTES.get(getattr(kind, "pickled_name", ""))
            return None if nbytes is None else (key, nbytes)
    return None


def _member(archive: zipfile.ZipFile, name: str, what: str) -> bytes:
    if archive.getinfo(name).file_size > _LIMIT:
        raise CorruptCopyError(f"{what}: {name} claims {archive.getinfo(name).file_size} bytes.")
    return archive.read(name)


def _iteration_in_text(content: bytes, what: str) -> int | str:
    text = content.decode("ascii", "replace").strip()
    if text == RELEASE:
        return RELEASE
    if not text.isdecimal() or len(text) > 15:
        raise CorruptCopyError(f"{what} holds {text[:40]!r}; expected an iteration or 'release'.")
    return int(text)

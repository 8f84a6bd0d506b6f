"""Page-locked arenas: what an accelerator copies into without the host's help, and at the speed of the bus.

The arena's mapping itself is registered (`cudaHostRegister`), so that what crosses lands in the file that the snapshot
is, and is not copied a second time. Where that fails, copies are slower and the host waits for them: right as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

__all__ = ["page_lock"]


def page_lock(content: torch.Tensor) -> Callable[[], None]:
    """Lock the pages of `content` (a byte tensor over a mapping); returns what unlocks them. RuntimeError.

    Takes as long as the kernel needs to walk the pages: a second for some gigabytes, far less in huge pages. What it
    returns keeps nothing alive.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address, nbytes = content.data_ptr(), content.numel()
    code = int(runtime.cudaHostRegister(address, nbytes, 0))
    if code:
        _forget_error()
        torch.cuda.check_error(code)

    def unlock() -> None:
        if int(runtime.cudaHostUnregister(address)):
            _forget_error()

    return unlock


def _forget_error() -> None:
    """CUDA's runtime remembers a failed call until somebody asks, which would be the next kernel of this thread's."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")

"""What a queue of background calls (NVRx's, Megatron's) has to do for a save of ours: wait.

Such queues run it in another process, forked or spawned, with arguments that are pickled; so it takes words and
numbers. The save itself goes on in a thread of the training process.
"""

from __future__ import annotations

import os
import time

__all__ = ["wait_until_written"]

_LONGEST_PAUSE_S = 0.05


def wait_until_written(unfinished: str, pid: int, bound_s: float) -> None:
    """Until the file `unfinished` is there no longer: it was given its name, or removed. At most `bound_s` seconds.

    `pid`: of the process that writes it; its end is the end of the wait. What became of it all ranks agree afterwards.
    """
    deadline, pause_s = time.monotonic() + bound_s, 0.001
    while unfinished and os.path.lexists(unfinished) and _lives(pid) and time.monotonic() < deadline:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

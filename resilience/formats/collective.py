"""How all ranks do one thing and all learn whether it worked, so that none waits for one that gave up.

Collective over `agreements`; JSON only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from resilience.errors import CorruptCopyError, ResilienceError, SaveFailedError
from resilience.planning.typed_json import parsed
from resilience.replication.communicator import Agreements

__all__ = ["exchange", "on_first"]


def exchange(agreements: Agreements, work: Callable[[], dict[str, Any]], doing: str) -> list[dict[str, Any]]:
    """Every rank's result of `work`; if it failed on any, SaveFailedError on all."""
    cause: BaseException | None = None
    try:
        payload: dict[str, Any] = {"ok": work()}
    except Exception as error:  # noqa: BLE001  (whatever it was: the others must hear of it, or they wait for us)
        cause, payload = error, {"failed": _in_words(error)}
    answers = [_json_object(answer) for answer in agreements.gather(json.dumps(payload).encode())]
    failed = {rank: answer.get("failed") for rank, answer in enumerate(answers) if "ok" not in answer}
    if failed:
        said = "; ".join(f"rank {rank}: {why}" for rank, why in list(failed.items())[:5])
        more = f" and {len(failed) - 5} more ranks" if len(failed) > 5 else ""
        raise SaveFailedError(f"The checkpoint could not be written ({doing}): {said}{more}.") from cause
    return [answer["ok"] for answer in answers]


def on_first(agreements: Agreements, work: Callable[[], None]) -> None:
    """`work` on rank 0; SaveFailedError on all if it failed."""
    cause: BaseException | None = None
    answer = b""
    if agreements.rank == 0:
        try:
            work()
        except Exception as error:  # noqa: BLE001  (as above)
            cause, answer = error, _in_words(error).encode()
    answer = agreements.broadcast(answer if agreements.rank == 0 else None)
    if answer:
        raise SaveFailedError(f"The checkpoint could not be finished by rank 0: {answer.decode()}.") from cause


def _in_words(error: Exception) -> str:
    kind = "" if isinstance(error, ResilienceError) else f"{type(error).__name__}: "
    return f"{kind}{str(error)[:500]}".rstrip(".") or type(error).__name__


def _json_object(content: bytes) -> dict[str, Any]:
    answer = parsed(content, "what a rank answered")
    if not isinstance(answer, dict):
        raise CorruptCopyError("A rank answered with something else than a JSON object.")
    return answer

"""Reports to `ft_launcher`, the fault-tolerance launcher of NVIDIA's Resiliency Extension: `ft_launcher=True`.

It starts a monitor beside each worker, which ends the workers of a job one of which falls silent; then they are started
again. How long a silence may be is the launcher's to say (`--ft-param-rank_heartbeat_timeout`,
`--ft-param-rank_section_timeouts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from resilience.errors import ConfigError
from resilience.runtime.launcher_reports import Channel, Unheard

__all__ = ["channel_to_ft_launcher"]

#: Where its monitor of this rank listens.
_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


def channel_to_ft_launcher(env: Mapping[str, str], tell: Callable[..., None]) -> Channel:
    """This rank's; nobody's, and that is said, where another launcher started it. ConfigError if it is not here."""
    if not env.get(_SOCKET):
        tell(
            "warning", what="ft_launcher is set, and this process was started by another launcher: nobody is told",
            advice="Start the job with ft_launcher.",
        )  # fmt: skip
        return Unheard()
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient
    except ImportError as error:
        raise ConfigError(
            f"ft_launcher is set, and NVIDIA's Resiliency Extension cannot be imported: {error}",
            advice="Install it: pip install torch-resilience[nvrx]",
        ) from error
    try:
        return _FtLauncher(RankMonitorClient())
    except Exception as error:  # noqa: BLE001 - whatever its monitor's trouble is, training does not depend on it
        what = f"ft_launcher's monitor cannot be told anything: {type(error).__name__}: {error}"
        tell("warning", what=what, advice="")
        return Unheard()


class _FtLauncher:
    def __init__(self, client: Any) -> None:
        self._client = client
        client.init_workload_monitoring()
        # its monitor takes no other sections than those that it was given a time for
        self._sections = frozenset(client.section_timeouts.section)

    def heartbeat(self) -> None:
        self._client.send_heartbeat()

    def begin(self, section: str) -> None:
        if section in self._sections:
            self._client.start_section(section)

    def end(self, section: str) -> None:
        if section in self._sections:
            self._client.end_section(section)

    def close(self) -> None:
        self._client.shutdown_workload_monitoring()

"""The facts of this node and its Slurm that `planning/site.py` judges. Whatever cannot be found out is left open."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from resilience.planning.site import Interface, JobScript, SiteFacts
from resilience.runtime.memory import control_group_limit

__all__ = ["slurm_settings", "site_facts"]

_ASK_S: Final = 10.0
_GET_ADDRESS: Final = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
_LOGIND: Final = ("/usr/lib/systemd/logind.conf.d", "/etc/systemd/logind.conf.d")


def site_facts(memory_dirs: Sequence[str], env: Mapping[str, str], script: JobScript | None) -> SiteFacts:
    """Looks at /proc, /sys, logind's configuration and, where there is one, asks Slurm's controller. Takes seconds at

    most."""
    return SiteFacts(
        uid=os.geteuid(),
        memory_dirs=tuple(memory_dirs),
        slurm=slurm_settings(),
        remove_ipc=_remove_ipc(),
        lingers=Path(f"/var/lib/systemd/linger/{env.get('USER', '')}").is_file(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gloo_interface=env.get("GLOO_SOCKET_IFNAME", ""),
        own_address=_own_address(),
        interfaces=_interfaces(),
        memory_limit_bytes=control_group_limit(),
        script=script,
    )


def slurm_settings() -> dict[str, str] | None:
    """What `scontrol show config` prints; None without Slurm, or where its controller does not answer."""
    try:
        ran = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=_ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    pairs = (line.partition("=") for line in ran.stdout.splitlines())
    return {name.strip(): value.strip() for name, equal, value in pairs if equal}


def _remove_ipc() -> bool | None:
    """logind's setting, which is on unless it is turned off; None where there is no logind."""
    files = [Path("/etc/systemd/logind.conf")]
    if not Path("/run/systemd/seats").is_dir():
        return None
    for folder in _LOGIND:
        files += sorted(Path(folder).glob("*.conf"))
    setting = True
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            name, equal, value = line.partition("=")
            if equal and name.strip() == "RemoveIPC":
                setting = value.strip().lower() in ("yes", "true", "on", "1")
    return setting


def _own_address() -> str:
    """What the host's name stands for, which is what gloo takes unless it is told an interface."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _interfaces() -> tuple[Interface, ...]:
    found = []
    for _, name in socket.if_nameindex():
        try:
            up = Path(f"/sys/class/net/{name}/operstate").read_text().strip() in ("up", "unknown")
        except OSError:
            continue
        if up:
            found.append(Interface(name, _speed(name), tuple(filter(None, [_address(name)]))))
    return tuple(found)


def _speed(name: str) -> int | None:
    try:
        told = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return None
    return told if told > 0 else None


def _address(name: str) -> str:
    """The interface's IPv4 address; "" if it has none."""
    request = array.array("B", struct.pack("256s", name.encode()[:15]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            fcntl.ioctl(asked.fileno(), _GET_ADDRESS, request, True)
        except OSError:
            return ""
    return socket.inet_ntoa(request.tobytes()[20:24])

"""The environment for NVRx, apart from ours: with it installed every `import torch` warns, and others' imports fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.crew import REPOSITORY
from benchmarks.environments import python_with

__all__ = ["NVRX", "nvrx_python"]

NVRX: Final = "nvidia-resiliency-ext==0.4.1"
_PROBE: Final = "import nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager"


def nvrx_python(home: Path = REPOSITORY / ".venv-nvrx", beside: Sequence[str] = ()) -> tuple[str, str]:
    """`(interpreter, "")`, made and filled if need be; `("", reason)` if it cannot be had.

    `beside`: what else is to be installed with it, each as name==version.
    """
    probe = "; ".join([_PROBE, *(f"import {each.partition('==')[0]}" for each in beside)])
    return python_with(home, [NVRX, *beside], probe)

"""The CRC-32C of a chunk's bytes, which zarr puts behind them. It comes with the extra `zarr`."""

from __future__ import annotations

from typing import Any

import numpy as np

from resilience.errors import ConfigError

__all__ = ["checksum"]


def checksum(content: memoryview, before: int = 0) -> int:
    """Of `content`, continued from the checksum of what lies before it. ConfigError without the extra."""
    return int(_library().extend(before, np.frombuffer(content, np.uint8)))


def _library() -> Any:
    try:
        import google_crc32c
    except ImportError as error:
        raise ConfigError(
            "The format zarr needs packages that are not installed here.",
            advice="Install them: pip install torch-resilience[zarr]",
        ) from error
    return google_crc32c

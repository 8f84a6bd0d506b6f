"""Carrying saves out on one rank: the snapshot, and the lanes that replicate, drain and tidy up behind it."""

from resilience.saving.saving import Saving

__all__ = ["Saving"]

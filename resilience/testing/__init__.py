"""Contract tests: what redundancy schemes, formats and file systems must keep to. Subclass one in your own tests."""

from resilience.testing.formats import FormatContract
from resilience.testing.redundancy import RedundancyContract
from resilience.testing.stores import FileSystemContract

__all__ = ["FileSystemContract", "FormatContract", "RedundancyContract"]

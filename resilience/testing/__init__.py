"""Contract tests: what every redundancy scheme must keep to. Subclass one in your own tests, which pytest runs."""

from resilience.testing.redundancy import RedundancyContract

__all__ = ["RedundancyContract"]

"""What a user can set, and where it may be set: the two configurations, their rules, and their sources.

`checkpoint.py` and `resiliency.py` hold the fields, `setting.py` how one field is described and checked, `together.py`
the rules across fields, `load.py` the way from YAML, environment and command line. Imports no torch.
"""

from __future__ import annotations

from resilience.config.checkpoint import CheckpointConfig
from resilience.config.load import Override, load_config, override_from_env
from resilience.config.resiliency import ResiliencyConfig
from resilience.config.together import unsupported, validate_together, without_effect

__all__ = [
    "CheckpointConfig",
    "Override",
    "ResiliencyConfig",
    "load_config",
    "override_from_env",
    "unsupported",
    "validate_together",
    "without_effect",
]

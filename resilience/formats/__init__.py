"""Persistent checkpoints as others know them: what lies in an `iter_NNNNNNN` folder, one class per format."""

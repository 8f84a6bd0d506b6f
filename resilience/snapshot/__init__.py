"""How a rank's items become bytes: the plan of a shard file, the arena it lies in, the copy into it."""

"""The whole cluster in one process under a seed: the real code, and everything around it simulated.

The controller, planning, stores and replication that run here are those of a real job; threads, time, network and disks
are `schedule`, `network` and `disk`. `history` draws what happens to a run from a seed, `cluster` lets it happen,
`truth` knows what must hold, `shrink` makes a failing history small. `python -m resilience.drill.simulator` runs many.
"""

"""The process's edge: clock, threads, signals, the watchdog."""

"""Rehearsals: real processes on virtual nodes, real kills, and the proof that nothing was lost."""

"""What will failures cost a run, and what should it set? Foreseen from figures, before a job is started."""

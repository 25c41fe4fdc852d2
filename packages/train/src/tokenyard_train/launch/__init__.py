"""Start the ranks of a run on one machine, and restart them after a failure."""

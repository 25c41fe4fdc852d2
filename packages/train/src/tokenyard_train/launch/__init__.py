"""Starting the ranks of a run on one machine, and restarting them when one fails."""

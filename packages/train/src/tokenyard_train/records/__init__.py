"""Records of a run: metrics, plots and trackers."""

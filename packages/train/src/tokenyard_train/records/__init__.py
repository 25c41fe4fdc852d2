"""What a run writes down: metrics, pictures, trackers."""

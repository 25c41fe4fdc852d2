"""The training engine.

`loop` drives a run. It builds a `setup` once, takes steps with `step`, scores with `evaluate`,
writes checkpoints with `save`, and calls each `callback`. `state` holds the run's position.
"""

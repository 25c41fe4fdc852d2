"""The training engine.

`loop` drives a run. It builds a `setup` once, loads a checkpoint with `resume`, takes steps with
`step`, scores with `evaluate`, writes checkpoints with `save`, and calls each `callback`. `state`
holds the run's position and the requests to stop it, which `signals` sets. `nonfinite` decides what
follows a loss that is not finite.
"""

"""Trackers: services that receive the records of metrics.jsonl, each imported only when used."""

from tokenyard_train.records.trackers._base import Tracker, scalars
from tokenyard_train.records.trackers._build import Trackers, build_trackers, check_trackers

__all__ = ["Tracker", "Trackers", "build_trackers", "check_trackers", "scalars"]

"""Where metrics go besides metrics.jsonl: trackers, each behind one small interface and imported when a config asks."""

from tokenyard_train.records.trackers._base import Tracker, scalars
from tokenyard_train.records.trackers._build import Trackers, build_trackers

__all__ = ["Tracker", "Trackers", "build_trackers", "scalars"]

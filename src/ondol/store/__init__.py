"""The run store: one run = one folder of recipe, environment, SQLite and checkpoints."""

from __future__ import annotations

from ondol.store.checkpoint import latest_checkpoint, save_checkpoint
from ondol.store.database import Database, Event, MetricRow, TrajectoryRow
from ondol.store.images import Images
from ondol.store.metrics import METRICS, Metric, metric, register
from ondol.store.run import STATES, Run, RunSummary

__all__ = [
    "METRICS",
    "STATES",
    "Database",
    "Event",
    "Images",
    "Metric",
    "MetricRow",
    "Run",
    "RunSummary",
    "TrajectoryRow",
    "latest_checkpoint",
    "metric",
    "register",
    "save_checkpoint",
]

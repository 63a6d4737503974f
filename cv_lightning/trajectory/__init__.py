"""The trajectory store: versioned JSON lines and images by content hash, one writer, one typed reader."""

from cv_lightning.trajectory.parquet import Exported, write_parquet
from cv_lightning.trajectory.reader import BadLine, GroupReader, read_groups, to_dataframe
from cv_lightning.trajectory.record import (
    GroupRecord,
    ImageRecord,
    LogprobSummary,
    TaskRecord,
    TrajectoryRecord,
    to_record,
)
from cv_lightning.trajectory.store import StoreConfig, TrajectoryWriter

__all__ = [
    "BadLine",
    "Exported",
    "GroupReader",
    "GroupRecord",
    "ImageRecord",
    "LogprobSummary",
    "StoreConfig",
    "TaskRecord",
    "TrajectoryRecord",
    "TrajectoryWriter",
    "read_groups",
    "to_dataframe",
    "to_record",
    "write_parquet",
]

"""The trajectory store: versioned JSON lines and images by content hash, one writer, one typed reader."""

from cv_lightning.trajectory.parquet import Exported, write_parquet
from cv_lightning.trajectory.reader import BadLine, GroupReader, read_groups, to_dataframe
from cv_lightning.trajectory.store import StoreConfig, TrajectoryWriter
from cv_lightning.trajectory.stored_image import StoredImage, path_of, pixels_of

__all__ = [
    "BadLine",
    "Exported",
    "GroupReader",
    "StoreConfig",
    "StoredImage",
    "TrajectoryWriter",
    "path_of",
    "pixels_of",
    "read_groups",
    "to_dataframe",
    "write_parquet",
]

"""Trajectories as one Parquet file, one row each with its images, for `datasets`, pandas and DuckDB."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cv_lightning.files import whole_file
from cv_lightning.trajectory.codec import TOKENS
from cv_lightning.trajectory.reader import FLAT_COLUMNS, flat_row, in_utf8, read_groups
from cv_lightning.trajectory.stored_image import path_of
from cv_lightning.types import DataError, Group, TrajectoryImage, Turn

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 64
"""Rows whose images are in memory at the same time."""


@dataclass(slots=True, kw_only=True)
class Exported:
    """What an export wrote."""

    num_rows: int = 0
    num_images: int = 0
    num_missing_images: int = 0
    """Images that a line names but the store lacks: their bytes are null."""
    num_bad_lines: int = 0


def write_parquet(stores: Mapping[str, Path], out: Path) -> Exported:
    """Write the trajectories of some stores.

    Columns: `store`, and those of `to_dataframe`, except that `turns` holds the turns (structs) and `images` the image
    files, the task's first; then the tokens, where a store kept them. Stores are read twice and never held in memory.

    Args:
        stores: Folders, by the name that the column `store` gives them.
        out: The file; it appears whole or not at all.

    Raises:
        DataError: No store holds a trajectory, or one was written by a newer version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(group for path in stores.values() for group in read_groups(path))
    done = Exported()
    out.parent.mkdir(parents=True, exist_ok=True)
    # the writer would try a dictionary of images and give it up
    plain = [field.name for field in schema if field.name != "images"]
    with (
        whole_file(out) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=plain) as writer,
    ):
        rows = _rows(stores, schema, done)
        while some := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
    return done


# ------------------------------------------------------------------------------------------------ rows
def _rows(stores: Mapping[str, Path], schema: pa.Schema, done: Exported) -> Iterator[dict[str, Any]]:
    with_tokens = TOKENS[0] in schema.names
    for name, path in stores.items():
        reader = read_groups(path)
        for group in reader:
            for trajectory in group.trajectories:
                done.num_rows += 1
                yield {
                    "store": name,
                    **flat_row(group, trajectory),
                    "turns": [_turn(turn) for turn in trajectory.turns],
                    "images": [_image(image, done) for image in trajectory.images],
                    **({column: getattr(trajectory, column) or None for column in TOKENS} if with_tokens else {}),
                }
        done.num_bad_lines += len(reader.bad_lines)


def _turn(turn: Turn) -> dict[str, Any]:
    call, result = turn.tool_call, turn.result
    fields = {
        "text": turn.text,
        "code": call.code if call else None,
        "on_image": call.image_index if call else None,
        "status": result.status.value if result else None,
        "error": (result.error if result else turn.parse_error) or None,
        "operations": [op.name for op in result.operations] if result else [],
        "image": turn.image_index,
        "num_images": len(turn.image_indices),
        "response": turn.response_text,
        "generate_s": turn.generate_s,
        "tool_s": turn.tool_s,
    }
    return in_utf8(fields)


def _image(image: TrajectoryImage, done: Exported) -> dict[str, Any]:
    """The stored file as it is, undecoded."""
    path = path_of(image.original)
    assert path is not None, "read from a store"
    done.num_images += 1
    try:
        data = path.read_bytes()
    except OSError:
        data = None
    done.num_missing_images += data is None
    return {"bytes": data, "path": path.name}


# ------------------------------------------------------------------------------------------------ schema
def _schema(groups: Iterable[Group]) -> pa.Schema:
    """Types of all columns; reward components and tokens as the stores have them."""
    import pyarrow as pa

    components: dict[str, None] = {}
    has_rows = has_tokens = False
    for group in groups:
        for trajectory in group.trajectories:
            has_rows = True
            has_tokens = has_tokens or bool(trajectory.token_ids)
            components |= dict.fromkeys(trajectory.reward.components if trajectory.reward else ())
    if not has_rows:
        raise DataError("no trajectories to export: the stores are empty")
    strings, kinds = pa.list_(pa.string()), {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    turn = pa.struct([(name, strings if kind is list else kinds[kind]) for name, kind in TURN.items()])
    columns = [("store", pa.string()), *((name, kinds[kind]) for name, kind in FLAT_COLUMNS.items())]
    columns += [(f"reward/{name}", pa.float64()) for name in components]
    columns += [("turns", pa.list_(turn)), ("images", pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})))]
    if has_tokens:
        columns += zip(TOKENS, (pa.list_(pa.int32()), pa.list_(pa.bool_()), pa.list_(pa.float32())), strict=True)
    # `datasets` takes the other columns as Arrow types them; these features tell it which column holds images
    features = {"images": {"_type": "Sequence", "feature": {"_type": "Image"}}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(dict(columns), metadata=metadata)


TURN: dict[str, type] = {
    **dict.fromkeys(("text", "code", "status", "error", "response"), str),
    **dict.fromkeys(("on_image", "image", "num_images"), int),
    "operations": list,
    **dict.fromkeys(("generate_s", "tool_s"), float),
}
"""Fields of a turn; `on_image` is the image of the code, `image` the first of `num_images` that it made."""

"""`cv-lightning config migrate FILE`: rewrite a config of an earlier version under the names of today."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

from cv_lightning.command_line import run_verb
from cv_lightning.files import write_text
from cv_lightning.renames import migrate_config
from cv_lightning.types import CVLightningError


def migrate(file: Path) -> None:
    """Rewrite a YAML config in place and keep its comments; the original becomes FILE.old.

    Args:
        file: The config.

    Raises:
        CVLightningError: The file cannot be read, or is not a config.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    parser = YAML()
    parser.preserve_quotes = True
    parser.width = 120
    try:
        text = file.read_text(encoding="utf-8")
        config = parser.load(text)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise CVLightningError(f"{file}: cannot be read as YAML ({error})") from error
    if not isinstance(config, dict):
        raise CVLightningError(f"{file}: not a config; its top level is not a mapping of keys to values")
    migrated, changes = migrate_config(config)
    if not changes:
        print(f"{file}: nothing to change")
        return
    written = io.StringIO()
    parser.dump(migrated, written)
    write_text(file.with_name(f"{file.name}.old"), text)
    write_text(file, written.getvalue())
    for old, new in changes.items():
        print(f"{file}: {old} is now {new}")


main = partial(run_verb, migrate, name="config migrate")

"""Rows that a long suite writes as it goes, so that an interrupted one goes on where it stopped."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from seed_jax.cli import UserError
from seed_jax.files import replace_text

Row = dict[str, Any]


class Journal:
    """Rows by id, in a JSON-lines file whose first line says what they were made with."""

    def __init__(self, path: Path | None = None, fingerprint: str = ""):
        """Reads what there is; rows of other settings give way.

        Args:
          path: None keeps rows in memory alone.
          fingerprint: of all settings that rows depend on.

        Raises:
          UserError: the file is something else.
        """
        self.rows: dict[str, Row] = {}
        self._path = path
        if path is None:
            return
        head = {"settings": fingerprint}
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        # What follows the last line break was cut short.
        try:
            entries = [json.loads(line) for line in lines]
        except ValueError:
            raise UserError(f"{path} is damaged; delete it, or name another --output") from None
        if entries and entries[0] == head:
            self.rows = {row["id"]: row for row in entries[1:]}
        text = "".join(json.dumps(row) + "\n" for row in [head, *self.rows.values()])
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)

    def add(self, rows: Iterable[Row]) -> None:
        """Keeps rows, each with an 'id'."""
        rows = list(rows)
        self.rows |= {row["id"]: row for row in rows}
        if self._path is not None:
            with self._path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

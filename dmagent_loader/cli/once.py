"""An option that is refused if it comes twice, where other commands take several values."""

from __future__ import annotations

import argparse
from typing import Any


class Once(argparse.Action):
    """Stores a value. Of two, argparse would take the last in silence. The default is None."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice, but this command takes one")
        setattr(namespace, self.dest, values)

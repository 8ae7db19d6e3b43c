"""How a command line is read."""

from __future__ import annotations

import argparse
from typing import Any


class Command(argparse.ArgumentParser):
    """The parser of one command: options may stand anywhere, between its paths too."""

    _mixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which calls this once more for the options alone, and once for the paths."""
        if self._mixed:
            return super().parse_known_args(args, namespace)
        self._mixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixed = False

"""What a long run of the benchmarks prints on the way."""

from __future__ import annotations

from typing import Any


class Printer:
    """Prints every twenty-fifth step of a row's adaptation."""

    def __init__(self, row: str, seed: int) -> None:
        self.row, self.seed = row, seed

    def __call__(self, history: Any, steps: int) -> None:
        if history.step % 25 == 0 or history.step == 1:
            mean = sum(values[-1] for values in history.losses.values()) / len(history.losses)
            kept = f" kept {history.kept[-1]:.4f}" if history.kept else ""
            print(
                f"  {self.row} seed {self.seed} step {history.step}/{steps} mean loss {mean:.3f}{kept} {history.seconds:.0f} s",
                flush=True,
            )

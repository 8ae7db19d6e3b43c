"""One thread, no network and reproducible examples for every test; what several files of tests start from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from rich.cells import cell_len
from rich.console import Console
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the network
os.environ.pop("COLUMNS", None)  # names and paths stay whole in what tests read, however wide the terminal is
torch.set_num_threads(1)
settings.register_profile(
    "adarank",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("adarank")


WIDTHS = [80, 120]  # of terminals
Shown = Callable[..., str]


def whole(text: str) -> str:
    """Text without any space, for what is longer than a line."""
    return "".join(text.split())


@pytest.fixture(params=WIDTHS)
def terminal(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shown:
    """Runs a command on a terminal of a width; returns what it shows, after it was checked to fit."""
    from adarank.cli import console
    from adarank.cli.main import main

    width = request.param
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(console, "out", Console(width=width, highlight=False, markup=False))
    monkeypatch.setattr(console, "err", Console(width=width, highlight=False, markup=False, stderr=True))

    def shown(*command: object, code: int = 0) -> str:
        capsys.readouterr()
        assert main([str(part) for part in command]) == code
        captured = capsys.readouterr()
        for line in (captured.out + captured.err).splitlines():
            assert cell_len(line) <= width, line
            assert "…" not in line, line
        return captured.out if code == 0 else captured.err

    return shown


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import text_zoo  # not before the environment says that nothing is asked of the network

    return text_zoo.make_zoo(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import image_zoo

    return image_zoo.make_zoo(tmp_path_factory.mktemp("images"))


@pytest.fixture
def problem() -> tuple[nn.Module, dict[str, nn.Module], dict[str, list[Tensor]]]:
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    experts = {task: nn.Linear(6, 4) for task in "ab"}
    for own in experts.values():
        own.load_state_dict({n: t + 0.3 * torch.randn_like(t) for n, t in base.state_dict().items()})
    return base, experts, {task: [torch.randn(8, 6) for _ in range(6)] for task in experts}

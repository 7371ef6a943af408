"""What tests have in common."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _heed_ctrl_c() -> None:
    """Processes that a script's shell starts in the background ignore Ctrl-C, and so do those that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of trained models that METAL_MARLIN_MODELS names."""
    folder = os.environ.get("METAL_MARLIN_MODELS")
    if folder is None:
        pytest.skip("METAL_MARLIN_MODELS names no folder of models")
    return Path(folder)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Computes without gradients, as quantised layers do."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        yield

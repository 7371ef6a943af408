"""What tests have in common."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of trained models that METAL_MARLIN_MODELS names."""
    folder = os.environ.get("METAL_MARLIN_MODELS")
    if folder is None:
        pytest.skip("METAL_MARLIN_MODELS names no folder of models")
    return Path(folder)

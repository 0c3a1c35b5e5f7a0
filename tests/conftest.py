"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: PALATE_SHARED_DATA, or ``../shared/data`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PALATE_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no real data here: put it in ../shared/data or name its folder in PALATE_SHARED_DATA")
    return folder

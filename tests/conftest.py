"""Where real videos, captions and models are: the folder that the environment variable QADAPTER_REAL names."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real() -> Path:
    if not os.environ.get("QADAPTER_REAL"):
        pytest.skip("QADAPTER_REAL is not set")
    return Path(os.environ["QADAPTER_REAL"]).resolve()

"""Where real videos, captions and models are: the folder that the environment variable QADAPTER_REAL names."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # for models this small a second thread costs more than it gives


@pytest.fixture(scope="session")
def real() -> Path:
    if not os.environ.get("QADAPTER_REAL"):
        pytest.skip("QADAPTER_REAL is not set")
    return Path(os.environ["QADAPTER_REAL"]).resolve()

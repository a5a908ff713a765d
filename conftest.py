"""What all tests share: one thread, so that sums are taken in one order on every machine, and one seed.

Fits take their seed from torch's: a test must not depend on what another one in its process drew, or seeded.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of the test are made
def pytest_runtest_setup(item: pytest.Item) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

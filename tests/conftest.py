"""What all tests share: fixed seeds, hypothesis without chance, GPU tests skipped where there is no GPU."""
import random

import hypothesis
import numpy as np
import pytest
import torch

# The same examples on every run and machine; no clock decides whether a test passes.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

"""What every test starts from: one thread, the same seed, no network, no screen."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports it
os.environ["MPLBACKEND"] = "agg"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # tensors here are small, and the workers share the cores

# The same examples in every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("repeat", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


def pytest_collection_finish() -> None:
    """What all modules have made by now is nobody's garbage: tests that collect it look at what is new only."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def youth() -> None:
    """Nor is what the modules before made, and the libraries that they have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers, whatever ran before."""
    torch.manual_seed(0)

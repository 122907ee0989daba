"""Settings of every test: a deterministic hypothesis profile, and no network."""

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # two processes of one machine meet there, whatever its name is
torch.set_num_threads(1)  # the tests run in parallel processes; tiny models gain nothing from threads

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=20,
    database=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("thorough", parent=settings.get_profile("ci"), derandomize=False, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seed():
    """Modules that a test builds draw from the global generator: let it be the same in every order of tests."""
    torch.manual_seed(0)

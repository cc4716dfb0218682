"""Shared fixtures. Everything runs on the CPU, without network, from fixed seeds."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Derandomized: the same examples in every run, so that a failure can be looked at again.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=25,
                          suppress_health_check=[HealthCheck.too_slow])
# With a planted bug (tests/mutations.py) the first failure is enough, however large.
settings.register_profile("mutation", parent=settings.get_profile("default"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutation" if "MUTATION" in os.environ else "default")

torch.set_num_threads(1)  # the tests' tensors are so small that threads only wait for each other


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

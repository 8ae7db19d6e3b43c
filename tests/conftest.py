"""One thread, no network and reproducible examples for every test."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the network
torch.set_num_threads(1)
settings.register_profile(
    "adarank",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("adarank")

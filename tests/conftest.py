"""What every test gets: one thread, no network, the same start of the random numbers."""

import os

# Before torch is imported: two test processes on two cores must not start four threads, and no test may fetch anything.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Seed torch's global generator, so that a test gives the same numbers alone and among others."""
    torch.manual_seed(0)

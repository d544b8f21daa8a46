"""Test-wide settings: 8 virtual CPU devices, and silent broadcasting is an error."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of acceptance data beside the checkout; the test skips without it."""
    if not _SHARED.is_dir():
        pytest.skip("acceptance data (../shared/data) is not here")
    return _SHARED


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)

"""Test-wide settings: 8 virtual CPU devices, and silent broadcasting is an error."""

import gc
import logging
import os
from pathlib import Path

import jax
import pytest

_ROOT = Path(__file__).resolve().parents[1]
# Compiled once for all workers and for the commands, kernels and hosts they start; the
# small programs too, for they are thousands, and to keep one costs next to nothing.
_CACHE = {
    "jax_compilation_cache_dir": str(_ROOT / ".pytest_cache" / "xla"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    for _name, _value in _CACHE.items():
        jax.config.update(_name, _value)
        os.environ[_name.upper()] = str(_value)
# Compilation is most of the time: without LLVM's optimization, and with XLA's older
# emitters where they still are, it takes a third or less. Commands, kernels and hosts
# inherit this; `make parity` and `make test-newest` compile as users do.
_QUICK = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()
# Tracing makes objects by the thousand that live on: looking through them for garbage
# after every 700 was a tenth of its time.
gc.set_threshold(50_000, 10, 10)
pytest_plugins = ["tests.cpu_seconds"]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_SHARED = _ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of acceptance data beside the checkout; the test skips without it."""
    if not _SHARED.is_dir():
        pytest.skip("acceptance data (../shared/data) is not here")
    return _SHARED


@pytest.fixture(autouse=True)
def quiet_again():
    """Takes back what the command sets up for its log, when a test has called it."""
    yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    logging.getLogger("jalign").setLevel(logging.NOTSET)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)

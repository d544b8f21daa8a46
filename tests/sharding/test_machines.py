"""Names of machines."""

import importlib.util

import jax
import pytest

from jalign import sharding


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v5e:4x4", ("v5e", 16, 16)),
        ("v5p:4x4x4", ("v5p", 64, 95)),
        ("v3:2x2", ("v3", 8, 16)),
        ("h100:8", ("h100", 8, 80)),
    ],
)
def test_machine(topology, expected):
    kind, count, size = sharding.machine(topology)[:3]
    assert (kind, count, size) == (*expected[:2], expected[2] * 2**30)


def test_this_machine():
    assert sharding.machine()[:2] == ("cpu", 8)
    assert sharding.topology_devices(None) == jax.devices()


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v5e:4x", "z80:4", "v5e:4x4 "])
def test_unknown_machines_are_refused(topology):
    with pytest.raises(ValueError, match="not KIND:SHAPE.*v5p"):
        sharding.machine(topology)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed"
)
def test_without_libtpu_the_error_says_what_to_install():
    with pytest.raises(ValueError, match="libtpu"):
        sharding.topology_devices("v5e:4x4")


def test_slices_are_counted():
    two = sharding.machine("2*v5e:4x4")
    assert (two.num_devices, two.slices, two.sides) == (32, 2, (4, 4))
    assert two.device_bytes == sharding.machine("v5e:4x4").device_bytes
    assert sharding.machine("v5e:4x4").slices == sharding.machine().slices == 1
    with pytest.raises(ValueError, match=r"2\*v5e:16x16"):
        sharding.machine("0*v5e:4x4")

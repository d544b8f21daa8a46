"""Meshes: sizes, Auto axes, and the text form."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jalign import sharding


def test_fsdp_takes_all_devices_by_default():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}


def test_axes_are_auto_whatever_the_default_of_jax():
    assert sharding.make_mesh().axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize("free", ["data", "fsdp", "context", "tensor"])
def test_minus_one_takes_what_is_left(free):
    sizes = dict(data=2, fsdp=2, context=1, tensor=2) | {free: -1}
    if free == "context":
        sizes["data"] = 1
    assert dict(sharding.make_mesh(**sizes).shape)[free] == 2


def test_axes_of_a_torus_are_split_where_they_have_to_be(monkeypatch):
    """As 8 x 8 of 4 x 4 x 4 chips; jax.make_mesh refuses those."""

    def refuse(*_, **__):
        raise NotImplementedError

    want = sharding.make_mesh(fsdp=2, context=4)
    monkeypatch.setattr(jax, "make_mesh", refuse)
    got = sharding.make_mesh(fsdp=2, context=4)
    assert got.shape == want.shape and got.axis_types == want.axis_types


def test_devices_can_be_chosen():
    assert sharding.make_mesh(devices=jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(fsdp=4), "4 is not the number of devices, 8"),
        (dict(tensor=3), "3 does not divide the number of devices, 8"),
        (dict(fsdp=-1, tensor=-1), "at most one axis may be -1"),
        (dict(fsdp=0), "must be positive"),
        (dict(fsdp=-2), "must be positive"),
        (dict(tensor=16), "16 does not divide"),
    ],
)
def test_wrong_sizes_raise(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (None, {}),
        ("", {}),
        ("fsdp=8,tensor=2", {"fsdp": 8, "tensor": 2}),
        (" data=2 , fsdp=-1 ", {"data": 2, "fsdp": -1}),
    ],
)
def test_parse_mesh(spec, sizes):
    assert sharding.parse_mesh(spec) == sizes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fspd=8", "did you mean fsdp"),
        ("fsdp", "not AXIS=SIZE"),
        ("fsdp=two", "not AXIS=SIZE"),
        ("fsdp=0", "not AXIS=SIZE"),
        ("fsdp=2,fsdp=4", "given twice"),
    ],
)
def test_parse_mesh_names_the_wrong_part(spec, message):
    with pytest.raises(ValueError, match=message):
        sharding.parse_mesh(spec)


def test_abstract_mesh_cuts_as_a_mesh_of_a_machine_that_is_not_here():
    mesh = sharding.abstract_mesh(64, tensor=4)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 16, "context": 1, "tensor": 4}
    tree = {"unembed": {"kernel": jax.ShapeDtypeStruct((64, 12), "float32")}}
    placed = sharding.param_shardings(mesh, tree)["unembed"]["kernel"]
    assert placed.shard_shape((64, 12)) == (4, 3)


class _Chip:
    """A described device of one of two slices."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, number, slices):
        self.id, self.slice_index = number, number // (8 // slices)
        within = number % (8 // slices)
        self.coords, self.core_on_chip = (within % 2, within // 2, 0), 0

    def __repr__(self):
        return f"{self.slice_index}:{self.id}"


def test_only_data_lies_between_slices():
    chips = [_Chip(number, 2) for number in range(8)]
    for sizes in (dict(), dict(data=2, tensor=2), dict(data=4), dict(data=-1, fsdp=2)):
        mesh = sharding.make_mesh(devices=chips, **sizes)
        of = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
        halves = np.split(of, 2)  # the first half of data is one slice
        assert [set(half.flat) for half in halves] == [{0}, {1}]
        at = sharding.abstract_mesh(8, slices=2, **sizes)
        assert dict(at.shape) == dict(mesh.shape)
    assert dict(sharding.make_mesh(devices=chips).shape)["data"] == 2
    for make in (
        lambda: sharding.make_mesh(devices=chips, data=1),
        lambda: sharding.abstract_mesh(8, slices=2, data=1),
    ):
        with pytest.raises(ValueError, match="of 2 slices, and data is to be a mult"):
            make()
    with pytest.raises(ValueError, match="what fits is data=2,fsdp=4,tensor=1"):
        sharding.make_mesh(devices=chips, fsdp=3)

"""Meshes, rule tables, partitioning and multi-host start.

The only room that says PartitionSpec or names a mesh axis: others speak of logical
axes ("batch", "heads", ...), which `rules.py` maps to the mesh axes data,
fsdp, context, tensor.
"""

from jalign.sharding.agreement import agree
from jalign.sharding.compiling import (
    announced,
    batch_words,
    give_back_compiler_memory,
)
from jalign.sharding.decoding import (
    decoding_mesh,
    device_bytes,
    relay,
    shard_bytes,
)
from jalign.sharding.machines import Machine, machine, topology_devices
from jalign.sharding.mesh import abstract_mesh, make_mesh, parse_mesh
from jalign.sharding.multihost import (
    barrier,
    gather,
    initialize,
    is_main_process,
    leave,
    preempted,
    process_slice,
    put_batch,
)
from jalign.sharding.partition import (
    activation_sharding,
    batch_parts,
    batch_sharding,
    constrain,
    param_shardings,
    replicated,
    shard_map,
    state_shardings,
)
from jalign.sharding.staged import staged
from jalign.sharding.watchdog import alive, watched

__all__ = [
    "Machine",
    "abstract_mesh",
    "activation_sharding",
    "agree",
    "alive",
    "announced",
    "barrier",
    "batch_parts",
    "batch_sharding",
    "batch_words",
    "constrain",
    "decoding_mesh",
    "device_bytes",
    "gather",
    "give_back_compiler_memory",
    "initialize",
    "is_main_process",
    "leave",
    "machine",
    "make_mesh",
    "param_shardings",
    "parse_mesh",
    "preempted",
    "process_slice",
    "put_batch",
    "relay",
    "replicated",
    "shard_bytes",
    "shard_map",
    "staged",
    "state_shardings",
    "topology_devices",
    "watched",
]

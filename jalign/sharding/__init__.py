"""Meshes, rule tables, partitioning and multi-host start.

The only room that says PartitionSpec or names a mesh axis: others speak of logical
axes ("batch", "heads", ...), which `rules.py` maps to the mesh axes data, fsdp, tensor.
"""

from jalign.sharding.agreement import agree
from jalign.sharding.compiling import (
    announced,
    batch_words,
    give_back_compiler_memory,
)
from jalign.sharding.mesh import (
    Machine,
    abstract_mesh,
    machine,
    make_mesh,
    parse_mesh,
    topology_devices,
)
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
    batch_parts,
    batch_sharding,
    constrain,
    param_shardings,
    replicated,
    shard_map,
    state_shardings,
)
from jalign.sharding.watchdog import alive, watched

__all__ = [
    "Machine",
    "abstract_mesh",
    "agree",
    "alive",
    "announced",
    "barrier",
    "batch_parts",
    "batch_sharding",
    "batch_words",
    "constrain",
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
    "replicated",
    "shard_map",
    "state_shardings",
    "topology_devices",
    "watched",
]

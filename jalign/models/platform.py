"""What is best on a CPU, a GPU or a TPU, a row each; and PLAIN, the definition.

Nothing else in jalign asks which machine it runs on. All rows compute the same numbers,
up to rounding; docs/performance.md says what each trick is worth.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# checkpoint_names of what is not to be computed again: attention, and products of
# matrices, with their adapters added where there are any.
KEPT, PRODUCT = "attention", "product"
Policy = Callable[..., Any]


class Platform(NamedTuple):
    """One kind of device. The defaults are PLAIN: no tricks, and forward mode.

    Attributes:
      attention: what "auto" takes for long rows, see `attention.attend`.
      interpret: Pallas kernels run without their machine (slow; for tests).
      one_query_sums: attention to one query is sums, not products of matrices.
      scores_bytes: of attention scores, float32, that stay in a core's cache; None
        goes through all heads at once.
      einsum: jnp.einsum, or what gives the same and differentiates faster.
      reduced_in_one: devices over which a gradient is reduced and cut in one step,
        see sharding.staged; None is any number.
      casts_in_loop: kernels are cast layer by layer, where XLA would cast those of all
        layers before the loop over them, and hold the casts to the loop's end.
      merge_adapters: x (W + s A B) rather than x W + s (x A) B, see models.adapted.
      keep: of an array that every layer reads: computed once and written to memory.
      scanned, unrolled: what scanned and unrolled layers store for the backward pass,
        a policy of jax.checkpoint; None is all that it needs.
      unroll_training, unroll_decoding: up to so many layers each have their own code.
        Compile time grows with them.
      init_effort: xla_backend_optimization_level for drawing parameters; None is XLA's.
      logits_bytes: that a device holds at once; None: as losses.token_logps has it.
      grow_cache: attention reads all slots at a cost: they are added as they fill.
    """

    attention: str = "plain"
    interpret: bool = True
    one_query_sums: bool = False
    scores_bytes: int | None = None
    einsum: Callable[..., Any] = jnp.einsum
    reduced_in_one: int | None = None
    casts_in_loop: bool = False
    merge_adapters: bool = False
    keep: Callable[[jax.Array], jax.Array] = lambda x: x
    scanned: Policy | None = None
    unrolled: Policy | None = None
    unroll_training: int = 0
    unroll_decoding: int = 0
    init_effort: int | None = None
    logits_bytes: int | None = None
    grow_cache: bool = False


_NAMED = jax.checkpoint_policies.save_only_these_names(KEPT, PRODUCT)


def products(primitive, *args, **params) -> bool:
    """What is stored for the backward pass: products of matrices and attention.

    Norms, rotations and gates take no longer to compute again than to write to memory
    and read back.
    """
    # cuDNN's kernel, by the name of jax's primitive; its output cannot be named.
    fused = primitive.name.startswith("dot_product_attention_fwd")
    return fused or bool(_NAMED(primitive, *args, **params))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """jnp.einsum whose gradient transposes the narrower of two tall matrices.

    The kernel's gradient is x^T dy. XLA on a CPU copies what it transposes, and left
    alone it transposes dy, together with all that dy is computed from. Unlike
    jnp.einsum it has no forward mode (jax.jvp).
    """
    return jnp.einsum(equation, x, kernel)


def _project_forward(equation, x, kernel):
    return jnp.einsum(equation, x, kernel), (x, kernel)


def _project_backward(equation, saved, d_y):
    x, kernel = saved
    inputs, y_axes = equation.split("->")
    x_axes, kernel_axes = inputs.split(",")
    d_x = jnp.einsum(f"{y_axes},{kernel_axes}->{x_axes}", d_y, kernel)
    return d_x, kernel_gradient(equation, x, d_y)


def kernel_gradient(equation: str, x: jax.Array, d_y: jax.Array) -> jax.Array:
    """x^T dy, the kernel's gradient in `project(equation, x, kernel)`."""
    inputs, y_axes = equation.split("->")
    x_axes, kernel_axes = inputs.split(",")
    first, second = (x_axes, x), (y_axes, d_y)
    if x.size > d_y.size:
        first, second = second, first
    axes = "".join(
        axis for side in (first[0], second[0]) for axis in kernel_axes if axis in side
    )
    d_kernel = jnp.einsum(f"{first[0]},{second[0]}->{axes}", first[1], second[1])
    # The barrier keeps XLA from turning the product round to save this small copy.
    d_kernel = jax.lax.optimization_barrier(d_kernel)
    return jnp.einsum(f"{axes}->{kernel_axes}", d_kernel)


project.defvjp(_project_forward, _project_backward)


def written_out(x: jax.Array) -> jax.Array:
    """x itself, computed once and kept.

    XLA on a CPU computes a cosine anew in each operation that reads it, for each head
    of each layer, and drops an optimization barrier; an exact product it cannot undo.
    """
    return jnp.matmul(x, jnp.eye(x.shape[-1]), precision=jax.lax.Precision.HIGHEST)


PLAIN = Platform()
CPU = Platform(
    attention="blocked",
    one_query_sums=True,
    scores_bytes=2 << 20,  # what a core or two keep to themselves
    einsum=project,
    merge_adapters=True,
    keep=written_out,
    # Not where layers are unrolled: XLA would drop the barriers that keep the
    # recomputation from being undone. Training gains nothing from unrolling either.
    scanned=products,
    unroll_decoding=16,
    init_effort=0,  # LLVM otherwise spends 7 s on optimizing the random bits
    logits_bytes=64 << 20,  # memory that is new to each step is slow
    grow_cache=True,
)
GPU = Platform(
    attention="cudnn",
    scanned=products,
    unrolled=products,
    unroll_training=32,
    unroll_decoding=32,
)
TPU = Platform(
    attention="splash", interpret=False, reduced_in_one=32, casts_in_loop=True
)
_ROWS = {"cpu": CPU, "gpu": GPU, "cuda": GPU, "tpu": TPU}


def platform_of(mesh: Mesh | None) -> Platform:
    """The row of the devices that arrays of this mesh live on."""
    # A mesh may stand for a machine that is not here, as `jalign plan` has it.
    name = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    return _ROWS.get(name, Platform(attention="blocked"))

"""Tests for decoder.products: what the backward pass finds stored."""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo

from jalign.models import decoder


class Named:
    def __init__(self, name):
        self.name = name


def test_the_fused_kernel_of_a_gpu_is_not_run_twice():
    # The policy knows it by its name, which only jax's internals say.
    names = [
        x.name
        for x in vars(fused_attention_stablehlo).values()
        if isinstance(getattr(x, "name", None), str) and "attention_fwd" in x.name
    ]
    assert names and all(decoder.products(Named(name)) for name in names)
    assert not decoder.products(Named("dot_product_attention_bwd_wrapper"))


def test_products_are_stored_and_elementwise_work_is_done_again():
    def fn(x, w):
        return jnp.sum(jnp.sin(jnp.exp(x @ w)))

    x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
    again = jax.checkpoint(fn, policy=decoder.products)
    jaxpr = str(jax.make_jaxpr(jax.grad(again))(x, w))
    assert jaxpr.count(" exp ") > str(jax.make_jaxpr(fn)(x, w)).count(" exp ")
    forward = jaxpr.count("dot_general") - 1  # one of them is the gradient
    assert forward == 1

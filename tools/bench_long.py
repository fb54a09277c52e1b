"""What long sequences and large vocabularies cost, in programs compiled for TPUs that need not be there.

    pip install 'llmjax[tpu]'
    JAX_PLATFORMS=cpu python tools/bench_long.py loss_head       # a quarter of a minute

loss_head   loss and gradients of 16384 tokens, V = 128256, D = 4096, on one TPU v5p: bfloat16 hidden states, float32
            weights and their float32 gradient. Against all logits at once, with the target's logit looked up or picked
            by a comparison with all ids. `temporaries` is memory beside arguments and results; `products` are the
            operations of matrix products; `traffic`, bytes of main memory, is to take no longer than the products do.

One JSON object a line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.ops.loss import softmax_cross_entropy
from llmjax.plan.compile import topology_devices
from llmjax.plan.flops import product_flops
from llmjax.plan.hlo import parse
from llmjax.plan.traffic import bytes_touched

MIB = 2**20
V5P_FLOPS, V5P_BYTES = 459e12, 2765e9  # a second


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the compiler says of a program: MiB of temporaries, TFLOP of its products, GB of main memory touched."""

    temporaries: float
    products: float
    traffic: float


def report(
    name: str, value: float, unit: str, rival: str, rival_value: float, goal: float, **more: Any
) -> None:
    line = {"name": name, "value": round(value, 3), "unit": unit, "rival": rival}
    line |= {"rival_value": round(rival_value, 3), "ratio": round(value / rival_value, 4)}
    print(json.dumps({**line, "goal": round(goal, 3), "met": value <= goal, **more}), flush=True)


def cost(function: Callable, *args: Any) -> Cost:
    program = jax.jit(function).lower(*args).compile()
    module = parse(program.as_text())
    temporaries = program.memory_analysis().temp_size_in_bytes
    return Cost(temporaries / MIB, product_flops(module) / 1e12, bytes_touched(module) / 1e9)


def loss_head() -> None:
    T, V, D = 16384, 128256, 4096
    sharding = jax.sharding.SingleDeviceSharding(topology_devices("v5p:2x2x1")[0])

    def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def all_at_once(logit_of: Callable) -> Callable:
        def loss(hidden_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> Any:
            w_VD = w_VD.astype(hidden_BTD.dtype)
            logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, w_VD, preferred_element_type=jnp.float32)
            lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
            return jnp.sum(weights_BT * (lse_BT - logit_of(logits_BTV, targets_BT[..., None])[..., 0]))

        return loss

    def looked_up(logits_BTV: jax.Array, targets_BT1: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits_BTV, targets_BT1, axis=-1)

    def compared(logits_BTV: jax.Array, targets_BT1: jax.Array) -> jax.Array:
        is_target_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) == targets_BT1
        return jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1, keepdims=True)

    args = (
        abstract((1, T, D), jnp.bfloat16),
        abstract((V, D), jnp.float32),
        abstract((1, T), jnp.int32),
        abstract((1, T), jnp.float32),
    )
    losses = {
        "ours": lambda *x: softmax_cross_entropy(*x).loss,
        "all logits at once, looked up": all_at_once(looked_up),
        "all logits at once, compared": all_at_once(compared),
    }
    costs = {name: cost(jax.value_and_grad(loss, (0, 1)), *args) for name, loss in losses.items()}
    ours = costs.pop("ours")
    sizes = {"tokens": T, "vocabulary": V, "width": D, "device": "TPU v5p"}
    for rival, theirs in costs.items():
        report("loss_head_temporaries", ours.temporaries, "MiB", rival, theirs.temporaries, 300, **sizes)
        goal = 1.01 * theirs.products
        report("loss_head_products", ours.products, "TFLOP", rival, theirs.products, goal, **sizes)
        goal = ours.products * 1e12 / V5P_FLOPS * V5P_BYTES / 1e9
        report("loss_head_traffic", ours.traffic, "GB", rival, theirs.traffic, goal, **sizes)


FIGURES = {"loss_head": loss_head}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="+", choices=FIGURES)
    for name in parser.parse_args().figures:
        FIGURES[name]()


if __name__ == "__main__":
    main()

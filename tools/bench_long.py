"""Finds out what long sequences and large vocabularies cost on TPUs, from programs that are compiled without a TPU.

    pip install 'llmjax[tpu]'
    JAX_PLATFORMS=cpu python tools/bench_long.py ring window documents loss_head      # some minutes
    JAX_PLATFORMS=cpu python tools/bench_long.py context                              # a quarter of an hour

ring        one attention layer, forward and backward, of 131072 tokens, with 32 query heads and 8 key/value heads of
            128, in bfloat16, on a TPU v5e 2x4: the memory beside arguments and results, the bytes that each device
            sends, the number of permutes, and the share of them that has a kernel between start and end, which hides
            them. The rival is jax's own splash attention under Ulysses
window      the same with a sliding window of 4096
documents   packed rows of 131072 tokens with document lengths as on the web (median 545), on 8 and 32 devices, counted
            on the host in blocks of 512: the pairs of blocks that are computed over those that are needed, the time
            over that with perfect balance (forward, where keys come from both directions at once, and backward, where
            one direction follows the other), and hops. The rival is a zigzag layout
context     a training step of Llama 3.1 8B (configs/llama3_8b_long.py): the tokens of one sequence, and the memory
loss_head   loss and gradients of 16384 tokens, V = 128256, D = 4096, on one TPU v5p, with hidden states in bfloat16,
            and weights and their gradient in float32. The rivals compute all logits at once, and find the target's
            logit by its index or by a comparison with all ids. `temporaries` is the memory beside arguments and
            results, `products` are the operations of matrix products, and `traffic` is the bytes of main memory that
            are read and written. The goal of the traffic is to take no longer than the products do

The output has one JSON object in each line.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import bench_layout
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lines import can_run, make_parser, report

from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.layout.layout import RowLayout
from llmjax.ops.attention.mask import self_mask
from llmjax.ops.attention.ring import Ring
from llmjax.ops.attention.sequence_attention import Sharing, make_attend
from llmjax.ops.losses.cross_entropy import softmax_cross_entropy
from llmjax.plan.compile import measure
from llmjax.plan.hlo.flops import product_flops
from llmjax.plan.hlo.parse import Instruction, Module, parse
from llmjax.plan.hlo.traffic import bytes_touched, collectives
from llmjax.plan.ring_work import ring_work
from llmjax.plan.topology import topology_devices
from llmjax.types import Head

MIB = 2**20
# The sizes of the attention layer: those of Llama 3.1 8B on a long sequence.
CELL = {"tokens": 131_072, "query_heads": 32, "key_heads": 8, "head_dim": 128}
SMOKE_CELL = {"tokens": 4096, "query_heads": 8, "key_heads": 8, "head_dim": 128}
# What --smoke changes in configs/llama3_8b_long.py.
SMOKE_MODEL = {
    "model.num_layers": 1, "model.model_dim": 256, "transformer.num_heads": 4, "transformer.num_kv_heads": 2,
    "transformer.head_dim": 128, "transformer.mlp_dim": 256, "tokenizer.vocab_size": 512,
}  # fmt: skip
# Peak bfloat16 operations and bytes of main memory per second of a TPU v5p (cloud.google.com/tpu/docs/v5p).
V5P_FLOPS, V5P_BYTES = 459e12, 2765e9


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled program needs.

    temporaries  memory beside arguments and results, in MiB
    products     operations of its matrix products, in units of 1e12
    traffic      bytes of main memory that it reads and writes, in GB
    """

    temporaries: float
    products: float
    traffic: float


def cost(function: Callable, *args: Any) -> Cost:
    """The cost of a function for arguments of these shapes."""
    program = jax.jit(function).lower(*args).compile()
    module = parse(program.as_text())
    temporaries = program.memory_analysis().temp_size_in_bytes
    return Cost(temporaries / MIB, product_flops(module) / 1e12, bytes_touched(module) / 1e9)


def loss_head(smoke: bool) -> None:
    """Compiles our loss and the two rivals, and reports their costs."""
    T, V, D = (512, 1024, 256) if smoke else (16384, 128256, 4096)
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
    # Looking a logit up needs a gather, and a scatter in the backward pass. The comparison needs neither, and can be
    # fused with the other arithmetic.
    losses = {
        "ours": lambda h, w, *x: softmax_cross_entropy(h, Head(w), *x).loss,
        "all logits at once, looked up": all_at_once(looked_up),
        "all logits at once, compared": all_at_once(compared),
    }
    costs = {name: cost(jax.value_and_grad(loss, (0, 1)), *args) for name, loss in losses.items()}
    ours = costs.pop("ours")
    sizes = {"tokens": T, "vocabulary": V, "width": D, "processor": "TPU v5p, compiled for"}
    for rival, theirs in costs.items():
        # (figure, unit, goal). The products may be recomputed for 1% only, and the traffic is to take no longer.
        for what, unit, goal in (
            ("temporaries", "MiB", 300),
            ("products", "TFLOP", 1.01 * theirs.products),
            ("traffic", "GB", ours.products * 1e12 / V5P_FLOPS * V5P_BYTES / 1e9),
        ):
            mine, its = (getattr(x, what) for x in (ours, theirs))
            report(f"loss_head_{what}", mine, unit, rival, its, goal, mine <= goal, **sizes)


@dataclasses.dataclass(frozen=True)
class Sent:
    """What the compiled program of an attention layer needs on each device.

    temporaries  memory beside arguments and results, in MiB
    sent         what the device sends to others, in GB
    count        the number of collectives
    hidden       the share of them during which a kernel runs
    """

    temporaries: float
    sent: float
    count: int
    hidden: float


def attention_cost(attend: Callable[..., jax.Array], cell: dict[str, int], window: int = 0) -> Sent:
    """Compiles `attend(q, k, v, segments, positions)`, forward and backward, for a v5e 2x4 and the sizes of `cell`.

    Ring attention chooses while it runs how far keys travel, and its program has a branch for each choice. The branch
    that counts is the one that a single document as long as the row takes: the last one, which goes all around the
    ring, or with a window the one of a single hop.
    """
    devices = Mesh(np.array(topology_devices("v5e:2x4")), "seq")
    tokens, whole = PartitionSpec(None, "seq"), PartitionSpec()

    def gradients(q, k, v, dout, segments, positions):
        shared = jax.shard_map(
            attend, mesh=devices, in_specs=(*[tokens] * 3, whole, whole), out_specs=tokens, check_vma=False
        )
        return jax.vjp(lambda q, k, v: shared(q, k, v, segments, positions), q, k, v)[1](dout)

    def abstract(heads: int) -> jax.ShapeDtypeStruct:
        shape = 1, cell["tokens"], heads, cell["head_dim"]
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(devices, tokens))

    q, k = abstract(cell["query_heads"]), abstract(cell["key_heads"])
    places = jax.ShapeDtypeStruct((1, cell["tokens"]), jnp.int32, sharding=NamedSharding(devices, whole))
    program = jax.jit(gradients).lower(q, k, k, q, places, places).compile()
    module, reaches = parse(program.as_text()), Ring("seq", 8).reaches
    branch = reaches.index((1, 0)) if window else len(reaches) - 1
    # The collectives of the branch that counts, each as often as it runs.
    made = [c for c in collectives(module) if all(name.endswith(f"[{branch}]") for name in c.within)]
    hidden = sum(runs * any(runs_a_kernel(module, x) for x in c.between) for c in made for runs in [c.runs])
    count = sum(c.runs for c in made)
    sent = sum(c.sent_bytes * c.runs for c in made)
    return Sent(program.memory_analysis().temp_size_in_bytes / MIB, sent / 1e9, count, hidden / count)


def runs_a_kernel(module: Module, ins: Instruction) -> bool:
    """Whether an instruction is a Pallas kernel or calls one."""
    inner = [module.computations[name] for name in ins.called("calls", "body", "branch_computations")]
    return "tpu_custom_call" in ins.attributes or any(
        runs_a_kernel(module, x) for computation in inner for x in computation.instructions.values()
    )


def ours(algorithm: str, ulysses: int = 1, window: int = 0) -> Callable[..., jax.Array]:
    """Our attention over 8 devices, by the algorithm `ring` or `ulysses`, as `attention_cost` wants it."""
    attend = make_attend("pallas_tpu", Sharing(algorithm, "seq", 8, ulysses))
    return lambda q, k, v, segments, positions: attend(q, k, v, self_mask(segments, positions, window=window))


def splash_under_ulysses(tokens: int, window: int = 0) -> Callable[..., jax.Array]:
    """jax's splash attention in blocks of 512. Each device computes all tokens and an eighth of the heads.

    Two all-to-all collectives exchange tokens for heads before, and heads for tokens afterwards (DeepSpeed Ulysses,
    Jacobs et al. 2023).
    """
    masks, T = splash_attention_mask, tokens
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = splash_attention_kernel.BlockSizes(**{f"block_{name}": 512 for name in names})
    mask = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))

    def swap(x: jax.Array, split: int, concat: int) -> jax.Array:
        return jax.lax.all_to_all(x, "seq", split, concat, tiled=True)

    def attend(q, k, v, segments, positions):
        # The kernel wants heads before positions, and queries that are scaled already.
        q, k, v = (swap(x, 2, 1).transpose(0, 2, 1, 3) for x in (q * q.shape[3] ** -0.5, k, v))
        of_heads = masks.MultiHeadMask([mask] * q.shape[1])
        kernel = splash_attention_kernel.make_splash_mha_single_device(of_heads, block_sizes=blocks)
        ids = splash_attention_kernel.SegmentIds(segments, segments)
        out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(q, k, v, ids)
        return swap(out.transpose(0, 2, 1, 3), 1, 2)

    return attend


def ring(smoke: bool, window: int = 0) -> None:
    """Compiles our attention and the rival for one long document, and reports what they need."""
    name, cell = "window" if window else "ring", SMOKE_CELL if smoke else CELL
    more = {**cell, "window": window, "processor": "TPU v5e 2x4, compiled for"}
    mine, rival = attention_cost(ours("ring", window=window), cell, window), "splash under Ulysses"
    theirs = attention_cost(splash_under_ulysses(cell["tokens"], window), cell)
    # (figure, unit, goal). A window ends after one hop, where a whole document goes all around the ring.
    for what, unit, goal in (
        ("sent", "GB", 0.30 if window else 1.41),
        ("temporaries", "MiB", 900),
        ("count", "permutes", 3 if window else 21),
    ):
        value, its = (getattr(x, what) for x in (mine, theirs))
        report(f"{name}_{what}", value, unit, rival, its, goal, value <= goal, **more)
    report(
        f"{name}_hidden", mine.hidden, "of the permutes", rival, theirs.hidden, 1, mine.hidden >= 1, **more
    )
    if not window:
        mine = attention_cost(ours("ulysses", 8), cell)
        for what, unit, goal in (("sent", "GB", 0.67), ("temporaries", "MiB", 897)):
            value, its = (getattr(x, what) for x in (mine, theirs))
            report(f"ulysses_{what}", value, unit, rival, its, goal, value <= goal, **more)


def window(smoke: bool) -> None:
    """The same as `ring` with a sliding window."""
    ring(smoke, 512 if smoke else 4096)


def documents(smoke: bool) -> None:
    """Counts the work and the waiting of ring attention on packed rows, with the layouts documents and zigzag."""
    T, block, rng = CELL["tokens"], 512, np.random.default_rng(0)
    kinds, count = {"packed": "web", "in the order drawn": "web_mixed"}, 64
    if smoke:
        T, block, count, kinds = 8192, 128, 2, {"in the order drawn": "web_mixed"}
    for kind, rows in kinds.items():
        drawn = bench_layout.ROWS[rows](T, count, rng)
        # (devices, goal of the waiting, goal of the hops). More devices are harder to keep busy.
        for shards, waiting, hops in ((8, 1.10, 3), (32, 1.25, 8))[: 1 if smoke else 2]:
            found = {
                name: around(drawn, RowLayout(name, shards, block), T) for name in ("documents", "zigzag")
            }
            goals = {"executed_over_needed": 1.3, "lockstep_forward": waiting, "lockstep_backward": waiting}
            goals |= {"hops_needed": hops, "hops_made": hops}
            for name, goal in goals.items():
                mine, theirs = (found[layout][name] for layout in ("documents", "zigzag"))
                more = {"rows": kind, "devices": shards, "block": block}
                report(f"documents_{name}", mine, "", "zigzag layout", theirs, goal, mine <= goal, **more)


def around(rows: list[np.ndarray], layout: RowLayout, tokens: int) -> dict[str, float]:
    """The figures of a layout, means over the rows.

    `hops_needed` is how far keys must travel. `hops_made` is how far they travel in the shortest branch of the program
    that is long enough.
    """
    found = []
    for lengths in rows:
        order, segment_of = layout.order(lengths, tokens)
        segments, positions = bench_layout.fields(lengths, tokens)
        work = ring_work(segment_of[segments[order]], positions[order], layout.shards, layout.block)
        reach = work.reach
        made = next(r for r in Ring("seq", layout.shards).reaches if r[0] >= reach[0] and r[1] >= reach[1])
        found.append({
            "executed_over_needed": work.executed_over_needed,
            "lockstep_forward": work.lockstep_slowdown,
            "lockstep_backward": work.one_way_lockstep_slowdown,
            "hops_needed": work.hops,
            "hops_made": sum(made),
        })  # fmt: skip
    return {name: float(np.mean([row[name] for row in found])) for name in found[0]}


def context(smoke: bool) -> None:
    """Plans training steps of Llama 3.1 8B with sequences of millions of tokens, and reports the memory they need."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from configs import llama3_8b_long

    # (tokens, topology, what is offloaded to the host, goal in millions of tokens).
    cells = [
        (2**24, "v5p:4x4x4", (), 16.0),
        (24 * 2**20, "v5p:4x4x4", ("residual",), 24.0),
        (6 * 2**20, "v5e:16x16", (), 0.0),
        (12 * 2**20, "v5e:16x16", ("residual",), 0.0),
    ]
    for tokens, topology, offload, goal in [(4096, "v5e:2x2", (), 0.0)] if smoke else cells:
        raw = llama3_8b_long.get_config()
        devices = topology_devices(topology)
        raw.data.seq_len = raw.train.tokens_per_update = tokens
        raw.mesh.seq, raw.compute.offload, raw.plan.topology = len(devices), offload, topology
        if smoke:
            raw.update_from_flattened_dict(SMOKE_MODEL)
        config, derived = resolve_config(read_config(raw.to_dict()), len(devices))
        need = measure(make_program(config, derived, config.tokenizer.vocab_size, devices))
        more = {
            "tokens": tokens,
            "offload": list(offload),
            "GB_per_device": need.total / 1e9,
            "processor": f"TPU {topology}, compiled for",
        }
        rival = (
            (None, None)
            if topology.startswith("v5e")
            else ("MaxText 0.2.5, offloaded, as measured before", 14.0)
        )
        report("context", tokens / 1e6, "M tokens", *rival, goal, tokens / 1e6 >= goal, **more)


# The parts of the benchmark, by their names on the command line.
FIGURES = {"ring": ring, "window": window, "documents": documents, "loss_head": loss_head, "context": context}


def main() -> None:
    parser = make_parser(__doc__)
    # The choices are checked below, because argparse of Python 3.11 would refuse an empty list of them.
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(FIGURES)}; all unless given")
    args = parser.parse_args()
    unknown = [name for name in args.figures if name not in FIGURES]
    if unknown:
        parser.error(f"{unknown[0]!r} is no figure; use some of {', '.join(FIGURES)}")
    for name in args.figures or FIGURES:
        if name == "documents" or can_run(name, "libtpu", args.smoke):
            FIGURES[name](args.smoke)


if __name__ == "__main__":
    main()

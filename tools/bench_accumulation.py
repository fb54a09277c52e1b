"""Measures what gradient accumulation costs, ours and that of `optax.MultiSteps` as it is ("stock").

    python tools/bench_accumulation.py --parts time controller       # about two minutes; on an idle machine
    pip install 'llmjax[tpu]'
    JAX_PLATFORMS=cpu python tools/bench_accumulation.py --parts memory reductions     # about 10 minutes, no TPU

time        milliseconds per micro-step of AdamW with 16.8 M parameters on the CPU, in updates of 8 micro-steps. The
            gradient is given, so there is no forward or backward pass. What is measured is our train step, with its
            checks and norms, and `MultiSteps.update` with `apply_updates`. Each side runs in a process of its own. Ours
            has the memory settings that every run of llmjax has (`parallel/host_memory.py`), stock is measured without
            and with them. The sides take turns, and the figures are medians over the rounds.
controller  milliseconds per update of `configs/base.py`, in four micro-steps, for what the noise-scale controller
            needs: the squared norms of the micro-gradients, which are computed without it too, and the decision on the
            host.
memory      bytes of main memory per parameter and micro-step that programs read and write, if they are compiled for one
            TPU v5e chip and 268 M parameters.
reductions  gradients that each device gives to reductions in one update, in GB, for a decoder of 470 M parameters that
            is trained with pure data parallelism on a TPU v5e 2x4. The program is only compiled. Stock averages the
            mean losses of the micro-batches.

Stock does the same work in every micro-step. So does our engine `multisteps`, which is stock with sums and weights and
has no goal. `in_place` computes the update in the last micro-step: `accumulating` is a micro-step before it, and
`mean_of_8` is the mean over an update. `fused` computes its gradients in the loop, which on the CPU adds 8 bytes per
parameter. The output has one JSON object in each line. The goal of a time is for the ratio ours / rival, and the other
goals are for our value.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from accumulation_sides import BASE, STEPS, STOCK, Engines, stock_update
from bench_train import load_config
from jax.sharding import NamedSharding, PartitionSpec
from lines import can_run, make_parser, report
from turns import take_turns

from llmjax.build.model import make_task_loss
from llmjax.build.program import Program, make_program
from llmjax.parallel.host_memory import keep_freed_memory
from llmjax.parallel.mesh import make_mesh
from llmjax.plan.hlo.parse import NO_TRIPS, Module, Trips, loops, parse
from llmjax.plan.hlo.traffic import bytes_touched, collectives
from llmjax.plan.topology import topology_devices
from llmjax.train.steering.steering import Measured
from llmjax.train.update.state import TrainState
from llmjax.types import Array, Batch, Params

# The parameters whose updates are timed are this many square matrices.
MATRICES = 16
# The goals: of the ratio of times, of bytes per parameter and micro-step, of GB per device and update, and of the
# controller's time as a share of an update.
TIME_GOAL, MEMORY_GOAL, REDUCTION_GOAL, CONTROLLER_GOAL = 0.1, 17.0, 1.9, 0.01
# A decoder of 470 M parameters, as changes to configs/base.py.
DECODER = {
    "model.num_layers": 24, "model.model_dim": 1024, "transformer.num_heads": 16, "transformer.mlp_dim": 4096,
    "model.dtype": "bfloat16", "compute.scan_layers": True, "compute.remat": "full", "tokenizer.vocab_size": 65536,
    "data.seq_len": 1024, "compute.micro_batch_size": 16, "compute.accumulation_steps": 0, "optimizer.name": "adamw",
}  # fmt: skip
# What --smoke changes in the decoder, and in configs/base.py for the controller.
SMOKE_MODEL = {
    "model.num_layers": 2, "model.model_dim": 128, "transformer.num_heads": 2, "transformer.mlp_dim": 128,
    "tokenizer.vocab_size": 512, "data.seq_len": 128, "train.tokens_per_update": 2048,
}  # fmt: skip


def matrices(count: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of `count` parameters, float32 [width, width] each."""
    return {f"w{i}_DF": jax.ShapeDtypeStruct((width, width), jnp.float32) for i in range(count)}


def stock_rounds(params: Params, grads: Params) -> Callable[[], dict[str, float]]:
    """A function that makes an update with stock MultiSteps and returns the milliseconds per micro-step."""
    multi = Engines.stock()
    step = jax.jit(functools.partial(stock_update, multi), donate_argnums=(0, 1))
    state = (params, multi.init(params))

    def one_update() -> dict[str, float]:
        nonlocal state
        start = time.perf_counter()
        for _ in range(STEPS):
            state = jax.block_until_ready(step(*state, grads))
        return {"mean": 1e3 * (time.perf_counter() - start) / STEPS}

    return one_update


def summing_rounds(engine: str, params: Params, grads: Params) -> Callable[[], dict[str, float]]:
    """A function that makes an update with `in_place` or `multisteps`, which have a call for each micro-step.

    It returns the milliseconds per micro-step: `mean` over all, `accumulating` over all but the last.
    """
    engines = Engines(params, make_mesh(BASE.mesh, jax.devices()[:1]))
    micro_step = functools.partial(engines.micro_step, engine)
    step, order, batch = jax.jit(micro_step, donate_argnums=0), engines.order(), engines.batch()
    state = engines.state(engine)

    def one_update() -> dict[str, float]:
        nonlocal state
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            state = jax.block_until_ready(step(state, batch, order, grads)[0])
            times.append(1e3 * (time.perf_counter() - start))
        return {"accumulating": statistics.mean(times[:-1]), "mean": statistics.mean(times)}

    return one_update


def fused_rounds(params: Params, grads: Params) -> Callable[[], dict[str, float]]:
    """A function that makes an update with `fused` and returns the milliseconds per micro-step, as `summing_rounds`.

    One call makes all micro-steps, so `accumulating` follows from the difference between updates of eight and of one.
    """
    engines = Engines(params, make_mesh(BASE.mesh, jax.devices()[:1]))
    step, order, batch = jax.jit(engines.fused, donate_argnums=0), engines.order(), engines.batch(STEPS)
    state = engines.state("fused")

    def call(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        state = step(state, batch, dataclasses.replace(order, steps=jnp.int32(steps)))[0]
        jax.block_until_ready(state)
        return 1e3 * (time.perf_counter() - start)

    def one_update() -> dict[str, float]:
        one, all_steps = call(1), call(STEPS)
        return {"accumulating": (all_steps - one) / (STEPS - 1), "mean": all_steps / STEPS}

    return one_update


def make_side(make_update: Callable, keep: bool, width: int) -> tuple[Callable[[], dict[str, float]], None]:
    """One side for `take_turns`, with MATRICES matrices. `keep` says whether it has the memory settings of llmjax."""
    if keep:
        keep_freed_memory()
    params = {
        name: 0.02 * jax.random.normal(jax.random.key(1), x.shape)
        for name, x in matrices(MATRICES, width).items()
    }
    one_update = make_update(params, jax.tree.map(lambda p: 1e-3 * p, params))
    # The first update compiles.
    one_update()
    return one_update, None


def bench_time(rounds: int, smoke: bool) -> None:
    """Measures updates of all engines and of stock in turns, `rounds` times."""
    width = 32 if smoke else 1024
    makes = {
        "stock": (stock_rounds, False),
        "stock_tuned": (stock_rounds, True),
        "in_place": (functools.partial(summing_rounds, "in_place"), True),
        "multisteps": (functools.partial(summing_rounds, "multisteps"), True),
        "fused": (fused_rounds, True),
    }
    sides = take_turns([functools.partial(make_side, *make, width) for make in makes.values()], rounds)
    # One column for each side and each of its figures, and one row for each round.
    columns = {
        f"{name}_{what}": [row[what] for row in side.values]
        for name, side in zip(makes, sides)
        for what in side.values[0]
    }
    times = [dict(zip(columns, row)) for row in zip(*columns.values())]
    median = {name: statistics.median(row[name] for row in times) for name in times[0]}
    for name, value in median.items():
        # The rivals stand beside ours, and not for themselves.
        if name.startswith("stock"):
            continue
        for rival, words in (
            ("stock_mean", STOCK),
            ("stock_tuned_mean", f"{STOCK} with our allocator settings"),
        ):
            ratio = statistics.median(row[name] / row[rival] for row in times)
            more = {"ratio": ratio, "parameters": MATRICES * width**2}
            goal = None if name.startswith("multisteps") else TIME_GOAL
            met = None if goal is None else ratio <= goal
            report(f"time_{name}", value, "ms per micro-step", words, median[rival], goal, met, **more)


def compiled(function: Callable, donate: tuple[int, ...], *args: Any) -> Module:
    """The compiled program of a function for arguments of these shapes. The arguments `donate` are donated."""
    return parse(jax.jit(function, donate_argnums=donate).lower(*args).compile().as_text())


def bench_memory(smoke: bool) -> None:
    """Counts the memory traffic of programs for one chip, with parameters too large to stay in its VMEM."""
    mesh, width = make_mesh(BASE.mesh, topology_devices("v5e:1x1")), 128 if smoke else 8192
    params = matrices(4, width)
    engines, size = Engines(params, mesh), 4 * width**2

    def abstract(make: Callable, *args: Any) -> Any:
        shapes, sharding = jax.eval_shape(make, *args), NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    def state(engine: str) -> TrainState:
        return abstract(lambda p: Engines(p, mesh).state(engine), params)

    def summing(engine: str) -> Module:
        step = functools.partial(engines.micro_step, engine)
        return compiled(step, (0,), state(engine), abstract(engines.batch), order, params)

    params, order = abstract(lambda p: p, params), abstract(engines.order)
    multi = engines.stock()
    stock = compiled(
        functools.partial(stock_update, multi), (0, 1), params, abstract(multi.init, params), params
    )
    in_place = summing("in_place")
    fused = compiled(engines.fused, (0,), state("fused"), abstract(lambda: engines.batch(STEPS)), order)

    def touched(module: Module, trips: Trips = NO_TRIPS) -> float:
        """Bytes per parameter that a program reads and writes. `trips` is how often its loops run."""
        return bytes_touched(module, trips) / size

    rival = touched(stock)
    # All micro-steps of an update but the last only add to the sums.
    mean = ((STEPS - 1) * touched(in_place, 0) + touched(in_place, 1)) / STEPS
    # The loop of `in_place` runs once in the last micro-step, to compute the update. The loop of `fused` is over
    # micro-steps.
    values = {
        "memory_in_place_accumulating": touched(in_place, 0),
        f"memory_in_place_mean_of_{STEPS}": mean,
        "memory_fused_accumulating": (touched(fused, STEPS) - touched(fused, 0)) / STEPS,
        f"memory_fused_mean_of_{STEPS}": touched(fused, STEPS) / STEPS,
        "memory_multisteps": touched(summing("multisteps")),
    }
    for name, value in values.items():
        unit = "bytes per parameter and micro-step"
        more = {"parameters": size, "processor": "TPU v5e, compiled for"}
        goal = None if name == "memory_multisteps" else MEMORY_GOAL
        report(name, value, unit, STOCK, rival, goal, None if goal is None else value <= goal, **more)


def program_of(changes: dict[str, Any], devices: list[jax.Device]) -> Program:
    """The program of configs/base.py with these changes, {whole key: value}."""
    config, derived = load_config(changes, len(devices))
    return make_program(config, derived, config.tokenizer.vocab_size, devices)


def bench_controller(rounds: int, smoke: bool) -> None:
    """Measures an update, and then what the controller needs for it, `rounds` times."""
    changes = {**SMOKE_MODEL} if smoke else {}
    changes |= {
        "compute.micro_batch_size": 2,
        "compute.accumulation_steps": 0,
        "controller.name": "noise_scale",
    }
    program = program_of(changes, jax.devices()[:1])
    state, steering = program.init(), program.steering
    # The values of the batch do not matter, only its shapes.
    batch = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype, device=x.sharding), program.placement.abstract_batch()
    )
    grads = jax.tree.map(jnp.copy, state.params)
    square = jax.jit(functools.partial(optax.tree.norm, squared=True))
    history, times = steering.start(), []
    # The first round compiles, and it is left out below.
    for _ in range(rounds + 1):
        decision = steering.decide(history, 0)
        start = time.perf_counter()
        for _ in range(decision.steps):
            state, _ = program.train_step(state, batch, decision.inputs)
        jax.block_until_ready(state)
        update = time.perf_counter()
        for _ in range(decision.steps):
            jax.block_until_ready(square(grads))
        # Any plausible numbers: the time does not depend on them.
        measured = Measured(decision.steps, 2.0**12, 2.0**22, 4.0, 8.0, 1.0, 1.0, True)
        steering.decide(steering.observe(history, decision, measured)[0], 0)
        times.append((1e3 * (time.perf_counter() - update), 1e3 * (update - start)))
    value, rival = (statistics.median(column) for column in zip(*times[1:]))
    ratio = statistics.median(a / b for a, b in times[1:])
    report("controller", value, "ms per update", "an update of configs/base.py", rival, CONTROLLER_GOAL,
           ratio <= CONTROLLER_GOAL, ratio=ratio)  # fmt: skip


def decoder(steps: int, accumulation: str, smoke: bool) -> Program:
    """The program of the decoder on a TPU v5e 2x4, with updates of `steps` micro-steps by the engine `accumulation`."""
    model = {**DECODER, **(SMOKE_MODEL if smoke else {})}
    # The micro-batch stays the same, so the number of tokens decides the number of micro-steps.
    tokens = steps * model["compute.micro_batch_size"] * model["data.seq_len"]
    changes = {"compute.engine": accumulation, "mesh.data": 8, "train.tokens_per_update": tokens}
    return program_of({**model, **changes}, topology_devices("v5e:2x4"))


def reduced(module: Module, steps: int) -> dict[str, float]:
    """The GB that each device gives to reductions in a program, and sends for them.

    given   all that it gives to reductions
    inside  the part of it that is within the loop over micro-steps
    sent    what it sends to other devices

    `steps` is how often loops run whose trip count is not a constant, which is the loop over micro-steps.
    """
    unknown = {loop.instruction.name: steps for loop in loops(module) if loop.trips is None}
    found = [c for c in collectives(module) if c.kind in ("all-reduce", "reduce-scatter")]
    given = sum(c.operand_bytes * c.times(unknown) for c in found)
    inside = sum(c.operand_bytes * c.times(unknown) for c in found if c.within)
    sent = sum(c.sent_bytes * c.times(unknown) for c in found)
    return {"given": given / 1e9, "inside": inside / 1e9, "sent": sent / 1e9}


def stock_reductions(smoke: bool) -> dict[str, float]:
    """The GB that each device gives to reductions with stock optax.

    micro_step  in a micro-step with `optax.MultiSteps`
    scan        in an update with a `jax.lax.scan` over STEPS micro-steps
    """
    program = decoder(STEPS, "in_place", smoke)
    loss = make_task_loss(program.config, program.model, program.layout, training=True)
    multi = Engines.stock()
    sharding = NamedSharding(program.mesh, PartitionSpec())

    def mean_loss(params: Params, batch: Batch) -> Array:
        sums = loss(params, batch, None)
        return sums.main / sums.weight

    def micro_step(params: Params, state: Any, batch: Batch) -> tuple[Params, Any]:
        return stock_update(multi, params, state, jax.grad(mean_loss)(params, batch))

    def update(params: Params, state: Any, batches: Batch) -> tuple[Params, Any]:
        def add(total: Params, batch: Batch) -> tuple[Params, None]:
            return jax.tree.map(jnp.add, total, jax.grad(mean_loss)(params, batch)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)
        grads = jax.tree.map(lambda g: g / STEPS, total)
        updates, state = multi.inner_opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def abstract(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def stacked(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """The batches of all micro-steps in one array."""
        spec = PartitionSpec(None, *x.sharding.spec)
        return jax.ShapeDtypeStruct((STEPS, *x.shape), x.dtype, sharding=NamedSharding(program.mesh, spec))

    params, batch = program.abstract_state().params, program.placement.abstract_batch()
    one = compiled(micro_step, (0, 1), params, abstract(jax.eval_shape(multi.init, params)), batch)
    state = abstract(jax.eval_shape(multi.inner_opt.init, params))
    scan = compiled(update, (0, 1), params, state, jax.tree.map(stacked, batch))
    return {"micro_step": reduced(one, 1)["given"], "scan": reduced(scan, STEPS)["given"]}


def bench_reductions(micro_steps: list[int], smoke: bool) -> None:
    """Counts the reductions of our fused update for each number of micro-steps, beside those of stock optax."""
    stock = stock_reductions(smoke)
    for steps in micro_steps:
        program = decoder(steps, "fused", smoke)
        size = sum(x.size for x in jax.tree.leaves(program.abstract_state().params))
        ours = reduced(parse(program.lower().compile().as_text()), steps)
        # MultiSteps reduces in every micro-step.
        rivals = {STOCK: steps * stock["micro_step"]}
        if steps == STEPS:
            rivals["jax.lax.scan of gradients, optax.adamw"] = stock["scan"]
        for rival, value in rivals.items():
            report(
                f"reductions_fused_{steps}",
                ours["given"],
                "GB per device and update",
                rival,
                value,
                REDUCTION_GOAL,
                ours["given"] <= REDUCTION_GOAL and ours["inside"] == 0,
                inside_the_loop=ours["inside"],
                sent=ours["sent"],
                parameters=size,
                micro_steps=steps,
                processor="TPU v5e 2x4, compiled for",
            )


def main() -> None:
    parser = make_parser(__doc__)
    parts = ("time", "controller", "memory", "reductions")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=15, help="of the times")
    parser.add_argument("--micro-steps", nargs="+", type=int, default=[2, 8, 32], help="of the reductions")
    args = parser.parse_args()
    rounds, micro_steps = (1, [STEPS]) if args.smoke else (args.rounds, args.micro_steps)
    if "time" in args.parts:
        bench_time(rounds, args.smoke)
    if "controller" in args.parts:
        bench_controller(rounds, args.smoke)
    if "memory" in args.parts and can_run("memory", "libtpu", args.smoke):
        bench_memory(args.smoke)
    if "reductions" in args.parts and can_run("reductions", "libtpu", args.smoke):
        bench_reductions(micro_steps, args.smoke)


if __name__ == "__main__":
    main()

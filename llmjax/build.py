"""The one place where a Config becomes the things it describes: corpus, mesh, model, task, optimizer, steps.

`make_corpus` is the host's half (text, tokenizer, store, packed sequences), `make_program` the devices' half
(everything that is compiled); they meet in the vocabulary size and in `Batch`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llmjax.config import Config, row_layout
from llmjax.data.cache import cached_store, cached_tokenizer
from llmjax.data.layout import RowLayout
from llmjax.data.pipeline import Batches, PackedSequences, make_batches
from llmjax.data.plan import PackingPlan, cached_plan, check_corpus
from llmjax.data.sources import list_sources
from llmjax.data.store import Store
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.evaluate.scoring import make_token_losses
from llmjax.models.contract import Model
from llmjax.models.gpt import GPT
from llmjax.names import at_home, plain_name
from llmjax.nn.choice import choose_kernel, choose_sharing
from llmjax.ops.attention.share import make_attend
from llmjax.ops.seeds import make_key
from llmjax.parallel.hosts import local_batch_rows, make_global
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout, partition_spec
from llmjax.tasks.language_model import make_loss
from llmjax.train.accumulate import Accumulator, Order
from llmjax.train.batch import BatchArithmetic, make_batch_schedule
from llmjax.train.engines import ENGINES
from llmjax.train.fused import MANUAL, make_window
from llmjax.train.lengths import make_length_schedule
from llmjax.train.optimizer import make_optimizer
from llmjax.train.stash import HOST
from llmjax.train.state import (
    TrainState,
    abstract_state,
    init_state,
    resumed_state,
    saved_state,
    state_around,
)
from llmjax.train.statistics import make_statistics
from llmjax.train.steering import Steering
from llmjax.train.step import TrainStep, make_eval_step, make_fused_step, make_train_step
from llmjax.types import Batch, LossSums, Params

Progress = Callable[[str, int, int], None]  # what is being made, how much of it is done, how much there is
FAMILIES = {"gpt": GPT}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text, from documents to packed sequences. `held_out` is None where nothing is held out."""

    tokenizer: Tokenizer
    store: Store
    train_plan: PackingPlan
    held_out_plan: PackingPlan
    train: PackedSequences
    held_out: PackedSequences | None
    held_out_ids: np.ndarray

    @property
    def fingerprint(self) -> str:
        """What the sequence numbers mean: a data cursor is of use only with the same fingerprint."""
        return self.train_plan.fingerprint + self.store.header.content_fingerprint

    @property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out text."""
        return int(self.store.num_bytes[self.held_out_ids].sum())

    def train_text(self, first: int, count: int) -> str:
        """What `count` packed sequences from number `first` on hold, document by document, as Markdown."""
        parts = []
        for doc, start, stop in self.train.spans(np.arange(first, first + count)):
            name = plain_name(self.store.name(doc))
            text = self.tokenizer.decode(self.store.tokens(doc, start, stop).tolist())
            parts.append(f"## {name} [tokens {start}:{stop}]\n\n{text}\n")
        return "\n".join(parts)

    def held_out_text(self, limit: int = 64 * 2**20) -> bytes:
        """The held-out documents as bytes, whole documents until `limit` is passed."""
        parts, size = [], 0
        for doc in self.held_out_ids:
            if size >= limit:
                break
            tokens = self.store.tokens(doc, 1, int(self.store.lengths[doc]) - 1)
            parts.append(self.tokenizer.decode(tokens.tolist()).encode())
            size += len(parts[-1])
        return b"".join(parts)


def cache_directory(config: Config) -> pathlib.Path:
    """Where tokenizers and stores are kept between runs."""
    if config.data.cache_dir:
        return at_home(config.data.cache_dir, "data.cache_dir")
    return at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "data.cache_dir") / "llmjax"


def make_corpus(
    config: Config, batch: BatchArithmetic, progress: Progress = lambda what, done, total: None
) -> Corpus:
    """Reads the sources, or what was made of them before; UserError where they do not fill a batch."""
    data, cache = config.data, cache_directory(config)
    files = list_sources(data.sources)
    reading = {"text_field": data.text_field, "on_bad_text": data.on_bad_text}
    tokenizer = cached_tokenizer(
        cache,
        config.tokenizer,
        files,
        **reading,
        progress=functools.partial(progress, "training the tokenizer"),
    )
    store = cached_store(
        cache,
        files,
        tokenizer,
        **reading,
        num_workers=data.num_workers or os.cpu_count() or 1,
        progress=functools.partial(progress, "tokenizing"),
    )
    train_ids, held_out_ids = store.split(data.held_out_fraction)
    train_plan, held_out_plan = (
        cached_plan(store.lengths, ids, data.seq_len, config.seed, cache / "plans")
        for ids in (train_ids, held_out_ids)
    )
    check_corpus(
        train_plan,
        held_out_plan,
        sequences_per_update=batch.sequences_per_update,
        held_out_fraction=data.held_out_fraction,
    )
    held_out = (
        PackedSequences(store, held_out_plan, config.seed, repeat=False) if held_out_plan.num_rows else None
    )
    return Corpus(
        tokenizer,
        store,
        train_plan,
        held_out_plan,
        PackedSequences(store, train_plan, config.seed),
        held_out,
        held_out_ids,
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs on the devices: the model on its mesh, the state's shape, and the compiled steps."""

    config: Config
    batch: BatchArithmetic
    mesh: Mesh
    model: Model
    accumulator: Accumulator
    steering: Steering
    param_specs: Params
    train_step: TrainStep
    eval_step: Callable[[Params, Batch], LossSums]
    statistics: Callable[[Params, Batch], dict]
    token_losses: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]

    @property
    def layout(self) -> Layout:
        return Layout(self.mesh)

    def init(self, params: Params | None = None) -> TrainState:
        """A fresh state, every array born in its place on the mesh; around `params`, which are donated, if given."""
        rng = make_key(self.config.seed)
        if params is not None:
            return state_around(params, self.accumulator, rng, self.param_specs, self.mesh)
        return init_state(self.model.init, self.accumulator, rng, self.param_specs, self.mesh)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(self.model.init, self.accumulator, self.param_specs, self.mesh)

    def abstract_saved(self) -> TrainState:
        """The same of what a checkpoint holds."""
        own = Accumulator(self.accumulator.optimizer)
        return abstract_state(self.model.init, own, self.param_specs, self.mesh)

    def saved(self, state: TrainState) -> TrainState:
        """What a checkpoint holds of `state`."""
        return saved_state(state, self.accumulator)

    def resumed(self, saved: TrainState) -> TrainState:
        """The state to go on from."""
        return resumed_state(saved, self.accumulator, self.param_specs, self.mesh)

    def eval_params(self, state: TrainState) -> Params:
        """The parameters to evaluate and generate with."""
        return self.accumulator.eval_params(state.opt_state, state.params)

    @property
    def averages(self) -> bool:
        """Whether `eval_params` are others than the parameters in training."""
        return self.config.optimizer.name == "schedule_free_adamw"

    @property
    def fused(self) -> bool:
        """Whether `train_step` is a whole update."""
        return self.config.train.accumulation == "fused"

    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of what a call of `train_step` takes."""
        lead = (self.steering.max_steps,) if self.fused else ()
        shape = (*lead, self.batch.micro_batch_size, self.batch.seq_len)
        arrays = {
            field.name: jax.ShapeDtypeStruct(
                shape[:-1] if field.name == "index" else shape,
                np.float32 if field.name == "weights" else np.int32,
                sharding=self.batch_sharding(field.name, *[None] * len(lead)),
            )
            for field in dataclasses.fields(Batch)
            if field.name != "columns" or self.row_layout.moves
        }
        return Batch(**arrays)

    @property
    def row_layout(self) -> RowLayout:
        """Which token of a sequence lies on which device."""
        sharing, _ = choose_sharing(self.config.model, self.config.mesh, self.mesh.shape)
        return row_layout(self.config, 1 if sharing is None else sharing.chunks)

    @property
    def attention(self) -> dict[str, tuple[str, str]]:
        """What was chosen, and why: the `kernel`, and the algorithm over `mesh.seq`."""
        sharing, why = choose_sharing(self.config.model, self.config.mesh, self.mesh.shape)
        kernel = choose_kernel(self.config.model, self.mesh.devices.flat[0].platform)
        return {"kernel": kernel, "mesh.seq": ("" if sharing is None else sharing.describe(), why)}

    def abstract_order(self) -> Order:
        """Shapes and dtypes of what the host decides."""
        order = self.steering.decide(self.steering.start(), 0).order
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), order)

    def lower(self) -> jax.stages.Lowered:
        """`train_step`, traced from shapes alone and ready to compile."""
        return self.train_step.lower(self.abstract_state(), self.abstract_batch(), self.abstract_order())

    def batch_sharding(self, field: str, *lead: None) -> NamedSharding:
        """How a field of `Batch` lies on the mesh, after leading dimensions that are not split."""
        names = ("batch",) if field == "index" else ("batch", "length")
        return self.layout.sharding(*lead, *names)

    def place(self, arrays: dict[str, np.ndarray]) -> Batch:
        """A batch on the devices, of which every process has made all rows."""
        rows = local_batch_rows(self.batch_sharding("tokens"), len(arrays["tokens"]))
        fields = {}
        for name, array in arrays.items():
            fields[name] = make_global(self.batch_sharding(name), array.shape, rows, array[rows])
        return Batch(**fields)

    def probe_shape(self, length: int) -> tuple[int, int]:
        """Rows and positions of a batch for texts of `length` tokens: that of an evaluation, or where they do not fit
        into a sequence longer and fewer rows, of about as many tokens."""
        T, shards = self.batch.seq_len, batch_shards(self.layout)[0]
        rows, longer = self.config.evaluate.batch_size or self.batch.micro_batch_size, -(-length // T)
        return max(rows // longer // shards, 1) * shards, longer * T

    def batches(
        self,
        source: PackedSequences,
        *,
        start: int = 0,
        stop: int | None = None,
        batch_size: int = 0,
        length: int = 0,
    ) -> Feed:
        """Micro-batches on the devices, from sequence number `start` on; this process makes only the rows it needs.

        `batch_size` sequences each, 0: a micro-batch; cut into rows of `length`, 0: whole.
        """
        batch_size = batch_size or self.batch.micro_batch_size
        pieces = self.batch.seq_len // (length or self.batch.seq_len)
        rows = local_batch_rows(self.batch_sharding("tokens"), batch_size)
        host = make_batches(
            source,
            start=start,
            stop=stop,
            batch_size=batch_size,
            local_rows=rows,
            prefetch=self.config.data.prefetch,
            layout=self.row_layout,
            length=length,
        )
        # The pieces of a row follow each other, so they lie on the devices that the row would lie on.
        rows = (rows[:, None] * pieces + np.arange(pieces)).reshape(-1)
        return Feed(self, host, batch_size * pieces, rows)


@dataclasses.dataclass(frozen=True)
class Feed:
    """An iterator of `Batch` on the devices over one of numpy arrays; to be closed."""

    program: Program
    host: Batches
    batch_size: int
    rows: np.ndarray

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._place(next(self.host))

    def take(self, count: int) -> Batch:
        """`count` micro-batches in one, [K, B, T], for a fused step; what is left of K is 0."""
        micro_batches = [next(self.host) for _ in range(count)]
        shape = (self.program.steering.max_steps,)
        arrays = {}
        for name, first in micro_batches[0].items():
            arrays[name] = np.zeros((*shape, *first.shape), first.dtype)
            np.stack([arrays_of_one[name] for arrays_of_one in micro_batches], out=arrays[name][:count])
        return self._place(arrays, *shape)

    def _place(self, arrays: dict[str, np.ndarray], *lead: int) -> Batch:
        fields = {}
        for name, array in arrays.items():
            sharding = self.program.batch_sharding(name, *[None] * len(lead))
            shape = (*lead, self.batch_size, *array.shape[len(lead) + 1 :])
            fields[name] = make_global(sharding, shape, self.rows, array, axis=len(lead))
        return Batch(**fields)

    def close(self) -> None:
        """Ends the thread that makes batches."""
        self.host.close()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_program(
    config: Config,
    batch: BatchArithmetic,
    vocab_size: int,
    devices: Sequence[jax.Device] | None = None,
    *,
    accumulates: bool = False,
) -> Program:
    """The program of a checked `config` on `devices` (default: all there are). Nothing is compiled or allocated yet.

    `accumulates`: the state can hold an update under way even if no update of `config` has more than one micro-step.
    """
    mesh = make_mesh(config.mesh, devices)
    if vocab_size % mesh.shape["tensor"]:
        raise UserError(
            f"the tokenizer's {vocab_size} ids are not divisible by mesh.tensor={mesh.shape['tensor']}; "
            "change mesh.tensor"
        )
    _check_host_memory(config, mesh)
    model = make_model(config, vocab_size, Layout(mesh))
    steering = make_steering(config, batch, mesh)
    fused = config.train.accumulation == "fused"
    engine = ENGINES[config.train.accumulation]
    accumulator = engine(steering.optimizer, max(steering.max_steps, 1 + accumulates))
    loss = make_task_loss(config, model, model.layout, training=True)
    held_out_loss = make_task_loss(config, model, model.layout, training=False)
    token_losses = make_token_losses(
        model, logit_softcap=config.model.logit_softcap, shards=batch_shards(model.layout)
    )
    param_specs = jax.tree.map(partition_spec, model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    state = abstract_state(model.init, accumulator, param_specs, mesh)
    if fused:
        # Each device sums the gradients of its own sequences, with a model that sees no more than those.
        local = make_model(config, vocab_size, Layout(mesh, MANUAL[config.train.fused_gather]))
        local_loss = make_task_loss(config, local, local.layout, training=True)
        window = make_window(
            local_loss, mesh, param_specs, gather=config.train.fused_gather, compute_dtype=config.model.dtype
        )
        step = make_fused_step(window, steering.optimizer)
    else:
        step = make_train_step(loss, accumulator)
    return Program(
        config=config,
        batch=batch,
        mesh=mesh,
        model=model,
        accumulator=accumulator,
        steering=steering,
        param_specs=param_specs,
        train_step=jax.jit(
            step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None)
        ),
        eval_step=jax.jit(make_eval_step(held_out_loss)),
        statistics=jax.jit(make_statistics(model, loss)),
        token_losses=jax.jit(token_losses, out_shardings=Layout(mesh).sharding(None, None)),
    )


def _check_host_memory(config: Config, mesh: Mesh) -> None:
    """UserError where something is to lie in a host's memory that its devices cannot reach."""
    device = mesh.devices.flat[0]
    key = "optimizer.offload" if config.optimizer.offload else "model.offload" if config.model.offload else ""
    if key and HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"{key} needs memory of the kind {HOST!r}, which {device.platform.upper()} devices do not have here; "
            f"turn {key} off"
        )


def make_steering(config: Config, batch: BatchArithmetic, mesh: Mesh) -> Steering:
    """What decides about each update of the run."""
    train, parts = config.train, 1
    if train.accumulation == "fused":
        parts = math.prod(mesh.shape[axis] for axis in MANUAL[train.fused_gather])
    return Steering(
        schedule=make_batch_schedule(train.batch_schedule, train.batch_points, batch),
        lengths=make_length_schedule(config.data.length_points, batch.seq_len, mesh.shape["seq"]),
        optimizer=make_optimizer(config.optimizer, train.num_updates),
        controller=config.controller,
        stability=config.stability,
        tokens_per_update=batch.tokens_per_update,
        num_tokens=train.num_updates * batch.tokens_per_update,
        parts_per_micro_step=parts,
    )


def make_task_loss(
    config: Config, model: Model, layout: Layout, *, training: bool
) -> Callable[..., LossSums]:
    """The loss of the config's task on a model laid out by `layout`: of training, with all terms, or of evaluation."""
    softcap, z_loss = config.model.logit_softcap, config.train.z_loss if training else 0.0
    return make_loss(
        model,
        logit_softcap=softcap,
        z_loss=z_loss,
        shards=batch_shards(layout),
        vocab_shards=layout.axis_size("tensor"),
    )


def batch_shards(layout: Layout) -> tuple[int, int]:
    """Over how many devices the sequences and the positions of a batch are split."""
    return layout.axis_size("data") * layout.axis_size("fsdp"), layout.axis_size("seq")


def make_model(config: Config, vocab_size: int, layout: Layout) -> Model:
    """The model of a checked `config`."""
    kernel, _ = choose_kernel(config.model, layout.mesh.devices.flat[0].platform)
    sharing, _ = choose_sharing(config.model, config.mesh, layout.mesh.shape)
    family = FAMILIES[config.model.family]
    return family(config.model, vocab_size, config.data.seq_len, layout, make_attend(kernel, sharing))

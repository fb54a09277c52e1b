"""All micro-steps of an update in one compiled function: each device sums its own gradients, reduced once in the end.

Where the compiler alone divides the work, it reduces gradients over the devices in every micro-step, because the
parameters are replicated and the batch is split. Here the axes of the batch are manual (`jax.shard_map`): each device
keeps its own gradients until one reduction after the loop. The bytes of that reduction do not grow with the number of
micro-steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from llmjax.parallel.rules import without_axes
from llmjax.train.optim.param_roles import Role, Roles
from llmjax.train.tuning.tuning import WHOLE, Tuning
from llmjax.train.update.engine import WholeUpdate
from llmjax.train.update.gradients import (
    MAIN,
    LossFn,
    Terms,
    TermSums,
    add_terms,
    empty_terms,
    micro_gradients,
)
from llmjax.train.update.step import TrainStep, make_fused_step
from llmjax.types import Array, Batch, LossSums, Params

# `compute.gather` -> the mesh axes along which each device keeps gradients of its own until the update ends.
MANUAL = {"update": ("data", "fsdp"), "micro_step": ("data",)}

Sums = dict[str, Array]
UpdateSums = Callable[..., tuple[Terms, Sums]]


@dataclasses.dataclass(frozen=True)
class Fused(WholeUpdate):
    """One compiled call for each update, in which every device sums its own gradients and they are reduced once."""

    @property
    def manual(self) -> tuple[str, ...]:
        return MANUAL[self.options.gather]

    def make_step(
        self, loss_fn: LossFn, mesh: Mesh, param_specs: Params, roles: Roles, tuning: Tuning = WHOLE
    ) -> TrainStep:
        options = dataclasses.asdict(self.options)
        sum_update = make_update_sums(loss_fn, mesh, param_specs, roles, tuning=tuning, **options)
        return make_fused_step(sum_update, self.optimizer)


def make_update_sums(
    loss_fn: LossFn,
    mesh: Mesh,
    param_specs: Params,
    roles: Roles,
    *,
    gather: str,
    compute_dtype: str,
    tuning: Tuning = WHOLE,
) -> UpdateSums:
    """`sum_update(params, batch, steps, rng, frozen={}) -> (Terms, sums)`, for jit: the first `steps` micro-steps.

    params  those that train, float32, laid out on `mesh` by `param_specs`; the summed gradients come out alike
    batch   fields with a leading dimension K, the most micro-steps there can be: [K, M, T], and `index` [K, M],
            laid out (None, ("data", "fsdp"), "seq")
    steps   int32 [], traced: one compile serves 1 to K
    rng     one key for all micro-steps, or None
    frozen  the parameters that do not train, which `tuning` joins with the others to those of the model

    The M sequences are cut into parts, and each part sums its own gradients. A part that is not finite is left out
    alone, because devices learn of each other only after the loop. `loss_fn` is given the M / parts sequences of one
    part; its model must be built with a `Layout` whose `manual` is MANUAL[gather].

    gather  "update": a part for each device along data and fsdp. Weights are gathered over fsdp once, in
            `compute_dtype` where the model casts them anyway, and each device sums whole gradients.
            "micro_step": a part for each index of `data`. Weights are gathered over fsdp where they are used, and
            gradients are reduced over fsdp in each micro-step and summed in shards.

    A micro-step's gradient of a cast weight is rounded to `compute_dtype`, and so is its reduction over fsdp
    within a micro-step; all sums over micro-steps and parts are float32.

    sums, float32 [K], 0 from element `steps` on:
      each value of `micro_gradients`, added up over the parts, each of which has a `square_norm` and a `weight_square`
      of its own; `dropped` counts parts
      parts  how many parts hold any weight
    """
    return _UpdateSums(loss_fn, mesh, param_specs, roles, gather, compute_dtype, tuning)


# eq=False: jax.jit looks functions up by their hash, which a dataclass would make of its fields, and dicts have none.
@dataclasses.dataclass(frozen=True, eq=False)
class _UpdateSums:
    """The function that `make_update_sums` makes; the fields are its arguments."""

    loss_fn: LossFn
    mesh: Mesh
    param_specs: Params
    roles: Roles
    gather: str
    compute_dtype: str
    tuning: Tuning

    def __call__(
        self, params: Params, batch: Batch, steps: ArrayLike, rng: Array | None, frozen: Params | None = None
    ) -> tuple[Terms, Sums]:
        frozen = frozen or {}
        # shard_map wants the specs of what comes out, which depend on the names of the loss terms and metrics.
        names = self._shard_map(self._names, PartitionSpec())
        terms, values = jax.eval_shape(names, params, batch, steps, rng, frozen)

        def part(
            params: Params, batch: Batch, steps: Array, rng: Array | None, frozen: Params
        ) -> tuple[Terms, Sums]:
            return self._sum_part(params, batch, steps, rng, frozen, tuple(terms), tuple(values))

        # A PartitionSpec stands in the place of an array.
        whole: Any = PartitionSpec()
        specs = {name: TermSums(self._outer, whole) for name in terms}, whole
        return self._shard_map(part, specs)(params, batch, steps, rng, frozen)

    @property
    def _manual(self) -> tuple[str, ...]:
        return MANUAL[self.gather]

    @property
    def _reduced_axes(self) -> tuple[str, ...]:
        # XLA fails at sums over a mesh axis of size 1.
        return tuple(axis for axis in self._manual if self.mesh.shape[axis] > 1)

    @property
    def _outer(self) -> Params:
        """The specs of the parameters over the manual axes, as shard_map wants them."""
        return self._over_manual(self.param_specs)

    @property
    def _inner(self) -> Params:
        """The specs of the parameters over the other axes, as the compiler is told them inside shard_map."""
        return self._over_others(self.param_specs)

    def _over_manual(self, specs: Params) -> Params:
        automatic = tuple(axis for axis in self.mesh.axis_names if axis not in self._manual)
        return jax.tree.map(lambda spec: without_axes(spec, automatic), specs)

    def _over_others(self, specs: Params) -> Params:
        return jax.tree.map(lambda spec: without_axes(spec, self._manual), specs)

    def _shard_map(self, function: Callable, out_specs: Any) -> Callable:
        """`function(params, batch, steps, rng, frozen)` on each part: the manual axes cut parameters and sequences."""
        frozen_specs, batch_specs = (
            self._over_manual(self.tuning.frozen_specs),
            PartitionSpec(None, self._manual),
        )
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(self._outer, batch_specs, PartitionSpec(), PartitionSpec(), frozen_specs),
            out_specs=out_specs,
            axis_names={*self._manual},
            # With the check on, jax sums the gradient of a replicated weight over the devices in every micro-step.
            check_vma=False,
        )

    def _names(
        self, params: Params, batch: Batch, steps: Array, rng: Array | None, frozen: Params
    ) -> tuple[Sums, Sums]:
        """The loss terms and the metrics of one micro-step, traced for their names alone."""
        weights = _gathered(params, self._outer, self.compute_dtype, self.roles)
        terms, values = self._micro_step(weights, batch, 0, rng, self._gathered_frozen(frozen))
        return {name: term.weight for name, term in terms.items()}, values

    def _gathered_frozen(self, frozen: Params) -> Params:
        """The frozen weights that the micro-steps compute with, as `_gathered` says."""
        tuning = self.tuning
        specs = tuning.frozen_specs
        weights = _gathered(frozen, self._over_manual(specs), self.compute_dtype, tuning.frozen_roles)
        return jax.tree.map(jax.lax.with_sharding_constraint, weights, self._over_others(specs))

    def _micro_step(
        self, weights: Params, batch: Batch, i: Array | int, rng: Array | None, frozen: Params
    ) -> tuple[Terms, Sums]:
        """The gradient sums and metrics of micro-step `i` of this part."""
        tuning = self.tuning
        frozen = _whole_tables(frozen, self._over_others(tuning.frozen_specs), tuning.frozen_roles)

        def loss(weights: Params, batch: Batch, rng: Array | None) -> LossSums:
            trained = _whole_tables(weights, self._inner, self.roles)
            return self.loss_fn(tuning.join(trained, frozen), batch, rng)

        terms, values = micro_gradients(loss, weights, jax.tree.map(lambda x: x[i], batch), rng)
        return terms, {**values, "parts": (values["weight"] > 0).astype(jnp.float32)}

    def _sum_part(
        self,
        params: Params,
        batch: Batch,
        steps: Array,
        rng: Array | None,
        frozen: Params,
        terms: tuple[str, ...],
        values: tuple[str, ...],
    ) -> tuple[Terms, Sums]:
        """Sums the micro-steps of this part in a loop, and then reduces the sums over the parts, once."""
        weights = self._constrain(_gathered(params, self._outer, self.compute_dtype, self.roles))
        frozen = self._gathered_frozen(frozen)

        def body(i: Array, sums: tuple[Terms, Sums]) -> tuple[Terms, Sums]:
            micro_terms, micro_values = self._micro_step(weights, batch, i, rng, frozen)
            total = self._constrain_terms(add_terms(sums[0], micro_terms))
            return total, jax.tree.map(lambda row, value: row.at[i].set(value), sums[1], micro_values)

        rows = {name: jnp.zeros(jax.tree.leaves(batch)[0].shape[:1], jnp.float32) for name in values}
        start = empty_terms(weights, tuple(name for name in terms if name != MAIN)), rows
        total, rows = jax.lax.fori_loop(0, steps, body, start)
        # The one reduction of the gradients in an update: everything before it stayed on its device.
        axes = self._reduced_axes
        total = {name: _reduced(term, self._outer, axes) for name, term in total.items()}
        return self._constrain_terms(total), jax.lax.psum(rows, axes)

    def _constrain(self, tree: Params) -> Params:
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, self._inner)

    def _constrain_terms(self, terms: Terms) -> Terms:
        # Without it the compiler may lay the carry of the loop out otherwise than the gradients that are added to it.
        return {name: TermSums(self._constrain(term.grads), term.weight) for name, term in terms.items()}


def _gathered(params: Params, specs: Params, compute_dtype: str, roles: Roles) -> Params:
    """The weights that the micro-steps compute with: gathered over fsdp where `specs` shard them, and cast."""

    def gathered(role: Role, x: Array, spec: PartitionSpec) -> Array:
        # Vectors are used in float32, and the gradient of a table adds up many tokens in the dtype of the table.
        x = x if role.is_vector or role.is_table else x.astype(compute_dtype)
        return jax.lax.all_gather(x, "fsdp", axis=spec.index("fsdp"), tiled=True) if "fsdp" in spec else x

    return roles.map(gathered, params, specs)


def _whole_tables(weights: Params, specs: Params, roles: Roles) -> Params:
    """`weights` with the tables whole over fsdp and seq: XLA fails to partition a lookup in a table cut both ways."""

    def whole(role: Role, x: Array, spec: PartitionSpec) -> Array:
        wider = without_axes(spec, ("fsdp", "seq"))
        is_cut = role.is_table and wider != spec
        return jax.lax.with_sharding_constraint(x, wider) if is_cut else x

    return roles.map(whole, weights, specs)


def _reduced(term: TermSums, specs: Params, axes: tuple[str, ...]) -> TermSums:
    """The sum over the parts, which lie along the mesh axes `axes`; sharded over fsdp where `specs` say so."""

    def reduced(x: Array, spec: PartitionSpec) -> Array:
        if "fsdp" not in axes or "fsdp" not in spec:
            return jax.lax.psum(x, axes)
        shard = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
        return jax.lax.psum(shard, tuple(axis for axis in axes if axis != "fsdp"))

    return TermSums(jax.tree.map(reduced, term.grads, specs), jax.lax.psum(term.weight, axes))

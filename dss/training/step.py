"""The jitted train step and validation step, for any mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dss.batches.batch import Batch
from dss.errors import DssError
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import (
    batch_sharding,
    check_split,
    opt_state_shardings,
    param_shardings,
    place,
    replicated,
)
from dss.student.config import T5Config
from dss.student.cpu import COMPILER_OPTIONS, CPU, ops_for
from dss.student.network import abstract_params, bind, logical_axes
from dss.student.ops import dropout_seeds
from dss.training.loss import (
    LossConfig,
    head_loss,
    head_scores,
    mixture_loss,
    token_counts,
    token_weights,
)

__all__ = [
    "GradDtype",
    "Metrics",
    "TrainState",
    "init_state",
    "make_eval_step",
    "make_train_step",
    "place_state",
    "state_shardings",
]

Params = Any
Metrics = dict[str, jax.Array]
GradDtype = Literal["float32", "bfloat16"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a train step updates and a checkpoint stores."""

    step: Any  # [] int32, number of steps done
    params: Params
    opt_state: optax.OptState


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def place_state(
    params: Params, optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """Returns the state before the first step, sharded over the mesh. `params` are donated.

    Args:
      params: the initial parameters, as `jax.Array`s or as host arrays in every process.
      optimizer: the optimizer, whose state is created sharded.
      shardings: shardings of the state, see `state_shardings`.
    """
    params = jax.tree.map(place, params, shardings.params)
    create = functools.partial(init_state, optimizer=optimizer)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)


def state_shardings(
    config: T5Config, optimizer: optax.GradientTransformation, mesh: Mesh, mesh_config: MeshConfig
) -> TrainState:
    """Returns the shardings of the state, as a `TrainState`.

    Raises:
      DssError: if a sharded dimension is not divisible by its number of shards.
    """
    heads_axis = dict(reversed(mesh_config.rules)).get("heads")
    if heads_axis is not None:  # its dimension has H * K elements; shards need whole heads
        check_split("num_heads", config.num_heads, mesh, heads_axis)
    shapes = abstract_params(config)
    params = param_shardings(mesh, mesh_config, logical_axes(config), shapes)
    opt_state = jax.eval_shape(optimizer.init, shapes)
    return TrainState(
        replicated(mesh), params, opt_state_shardings(mesh, opt_state, shapes, params)
    )


def _head_inputs(
    config: T5Config, mesh: Mesh, params: Params, batch: Batch, seed: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the input of the LM head [G, M, D] and the LM head [D, V]."""
    network = bind(config, params, ops_for(mesh))
    hidden = network.hidden(
        batch.encoder_input_tokens,
        batch.decoder_input_tokens,
        batch.encoder_segment_ids,
        batch.decoder_segment_ids,
        seed,
        (batch.encoder_rows, batch.decoder_rows, batch.cross_rows),
        batch.decoder_reads,
    )
    return network.head_inputs(hidden)


def _split(batch: Batch, microbatches: int) -> Batch:
    """Returns the batch as [microbatches, G / microbatches, ...].

    Adjacent groups go to different microbatches, so that each device keeps its groups.
    """

    def split(array: jax.Array) -> jax.Array:
        return array.reshape(-1, microbatches, *array.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def _gradients(
    config: T5Config,
    loss: LossConfig,
    mesh: Mesh,
    microbatches: int,
    params: Params,
    batch: Batch,
    rates: jax.Array | None,
    seed: jax.Array | None,
) -> tuple[Params, jax.Array]:
    """Returns the gradient of the loss, and each task's summed cross entropy [K].

    Token weights are computed from the token counts of the whole batch, so the gradients of the
    microbatches add up to that of the batch. They are summed in float32.
    """
    weights = token_weights(token_counts(batch.decoder_task_ids, loss.num_tasks), rates)

    def weighted_loss(
        params: Params, batch: Batch, seed: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        hidden, kernel = _head_inputs(config, mesh, params, batch, seed)
        targets, ids = batch.decoder_target_tokens, batch.decoder_task_ids
        return head_loss(loss, mesh, hidden, kernel, weights, targets, ids)

    gradient = jax.grad(weighted_loss, has_aux=True)
    if microbatches == 1:
        return gradient(params, batch, seed)

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, gradient(params, *microbatch)), None

    zeros = jax.tree.map(functools.partial(jnp.zeros_like, dtype=jnp.float32), params)
    zeros = (zeros, jnp.zeros(loss.num_tasks))
    parts = (_split(batch, microbatches), dropout_seeds(seed, microbatches))
    return jax.lax.scan(add, zeros, parts)[0]


def make_train_step(
    config: T5Config,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    *,
    mesh: Mesh,
    shardings: TrainState,
    microbatches: int = 1,
    grad_dtype: GradDtype = "float32",
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted train step. `state` is donated.

    Args:
      config: the student's configuration.
      optimizer: the optimizer, see `make_optimizer`.
      loss: the mixture's loss.
      mesh: the mesh.
      shardings: shardings of the state, see `state_shardings`.
      microbatches: number of sequential parts for gradient accumulation; the number of groups must
        be divisible by this times the mesh's `data`.
      grad_dtype: dtype of the gradients. "bfloat16" differentiates with respect to a bfloat16 copy
        of the parameters, which halves the memory and the communication of gradients. Microbatches
        are summed, and the optimizer computes, in float32 in both cases.
      seed: dropout seed; a dropout mask is a function of (seed, step, microbatch).

    Returns:
      `step(state, batch) -> (state, metrics)`, with metrics `loss` [], `task_loss` [K],
      `task_tokens` [K], `grad_norm` [] (before clipping) and, if they vary by step, `rates` [K].

    Raises:
      DssError: if `grad_dtype` is bfloat16 and the student computes in float32.
    """
    if grad_dtype == "bfloat16" and config.dtype != "bfloat16":
        raise DssError(
            "Experiment.grad_dtype is 'bfloat16', but the student computes in float32; set "
            "Experiment.dtype to 'bfloat16' too"
        )

    root = np.random.SeedSequence(seed).generate_state(2)  # [2] uint32

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        step_seed = root + jnp.uint32([0, state.step]) if config.dropout_rate > 0 else None
        params = optax.tree.cast(state.params, grad_dtype)
        rates = loss.rates_at(state.step)
        grads, sums = _gradients(config, loss, mesh, microbatches, params, batch, rates, step_seed)
        grads = optax.tree.cast(grads, jnp.float32)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        counts = token_counts(batch.decoder_task_ids, loss.num_tasks)
        metrics = {
            "loss": mixture_loss(sums, counts, rates),
            "task_loss": sums / jnp.maximum(counts, 1),
            "task_tokens": counts,
            "grad_norm": optax.tree.norm(grads),
        }
        if loss.last_rates is not None:
            metrics["rates"] = rates
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=COMPILER_OPTIONS if ops_for(mesh) is CPU else None,
    )


def make_eval_step(
    config: T5Config, loss: LossConfig, *, mesh: Mesh, shardings: TrainState
) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """Returns the jitted validation step, without dropout.

    Args:
      config: the student's configuration.
      loss: the mixture's loss.
      mesh: the mesh.
      shardings: shardings of the state, see `state_shardings`.

    Returns:
      `step(params, batch) -> {"sums", "counts", "correct"}`, each [K]: per task the summed cross
      entropy, the number of target tokens and the number of correct ones, by argmax. Results of
      batches can be summed.
    """

    @functools.partial(
        jax.jit,
        in_shardings=(shardings.params, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=COMPILER_OPTIONS if ops_for(mesh) is CPU else None,
    )
    def eval_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
        hidden, kernel = _head_inputs(config, mesh, params, batch, None)
        targets, ids = batch.decoder_target_tokens, batch.decoder_task_ids
        sums, correct = head_scores(loss, mesh, hidden, kernel, targets, ids)
        return {"sums": sums, "counts": token_counts(ids, loss.num_tasks), "correct": correct}

    return eval_step

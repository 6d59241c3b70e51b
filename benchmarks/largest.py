"""The planned step of the largest batch shape; shared by plan.py and mesh_step.py."""

from typing import Any

import jax

from dss.batches.batch import Batch
from dss.parallel.mesh import put_batch
from dss.planning.plan import Planner, abstract_batch
from dss.student.network import init_params
from dss.training.step import place_state


def compile_largest(planner: Planner, batch_size: int) -> tuple[Any, Batch]:
    """Returns the compiled step and a batch, both of the largest shape of the planned steps."""
    batches = planner.batches(batch_size)
    wanted = abstract_batch(batches, planner.mesh)
    found = (batches[step] for step in range(planner.num_steps))
    batch = next(b for b in found if b.shapes == wanted.shapes)
    return planner.lower(wanted).compile(), batch


def place(planner: Planner, batch: Batch) -> tuple[Any, Any]:
    """Returns the initial state and the batch, placed on the mesh."""
    params = init_params(planner.config, 0, planner.shardings.params)
    state = place_state(params, planner.optimizer, planner.shardings)
    placed = put_batch(planner.mesh, batch)
    jax.block_until_ready((state, placed))
    return state, placed

"""Orbax checkpoints of a run: written in the background, the latest two and the best kept."""

import math
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dss.errors import UserError, first_line
from dss.parallel.memory import trim_freed_memory
from dss.parallel.mesh import place
from dss.parallel.processes import all_agree, is_leader, wait_for_all
from dss.paths import absolute, check_no_pipes
from dss.training.checksums import check_sums, checksums, path_names
from dss.training.leaves import Leaves, is_passing, reading
from dss.training.step import TrainState

__all__ = ["Checkpoints", "abstract_like", "largest_part"]

# Orbax counts the seconds of a save by the wall clock, which may jump.
SAVE_TIMEOUT = 7 * 24 * 3600
# Bytes of a checkpoint's file, and of what is compressed at once. What is to be written stays in
# memory until a file is full, and without a size all of a process's parameters are one file.
FILE_SIZE = 16 * 2**20
CHUNK_SIZE = 4 * 2**20
SCORE = "score"  # the metric that decides which checkpoint is the best; more is better


def largest_part(tree: Any) -> int:
    """Returns the bytes of the largest part of an array that one device holds."""
    parts = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree)]
    return max(math.prod(shape) * size for shape, size in parts)


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Returns the `ShapeDtypeStruct`s of a tree, placed by a tree of shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


class _Manager(ocp.CheckpointManager):
    """Orbax's, which would open no checkpoint of a folder where one's score cannot be read."""

    def __init__(self, folder: epath.Path, **options: Any):
        with reading(folder):
            super().__init__(folder, **options)

    def metrics(self, step: int) -> dict[str, float] | None:
        try:
            found = super().metrics(step)
        except (ValueError, RecursionError):  # not JSON
            return None
        names = (SCORE, "step")
        has_all = isinstance(found, dict) and all(
            isinstance(found.get(n), int | float) for n in names
        )
        return found if has_all else None


def _writer(largest: int | None, frozen: bool) -> ocp.BasePyTreeCheckpointHandler:
    """Returns what writes an item; see `Checkpoints`."""
    limits: dict[str, Any] = {}
    if largest is not None:
        limits["save_concurrent_bytes"] = largest + 1  # Orbax waits for fewer bytes than the limit
    if frozen:
        # The public ArrayHandler takes a callback that returns a TransferPriority, but Orbax (0.12)
        # has no public name for either; its own docstring imports this module.
        from orbax.checkpoint._src.serialization import types

        class WhenDue(types.DefaultSerializationStatusCallback):
            def key_priority(self, _: Any) -> types.TransferPriority:
                return types.TransferPriority.ASYNCHRONOUS_DEPRIORITIZED

        handler = ocp.type_handlers.ArrayHandler(callback=WhenDue())
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
        limits["type_handler_registry"] = registry
        limits["save_device_host_concurrent_bytes"] = 1  # and at least one array at a time
    return ocp.BasePyTreeCheckpointHandler(**limits)


class Checkpoints:
    """The folder `<run>/checkpoints`.

    Each checkpoint is a folder named by its step, with the parameters and the optimizer's state as
    separate items, so that evaluation reads parameters alone. It appears under its name only when
    it is whole.

    Args:
      folder: where the checkpoints are.
      largest: bytes of the largest part of an array to be saved, see `largest_part`; no more are
        on their way to the disk at once. None: all are.
      frozen: what is saved does not change before `wait`, so that an array is copied from its
        devices to the host when it is due. Else all are at once, before `save` returns.
      read_only: for evaluation; nothing is created or removed.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        largest: int | None = None,
        frozen: bool = False,
        read_only: bool = False,
    ):
        self.folder = absolute(folder)
        if read_only and not self.folder.is_dir():
            raise UserError(f"{folder}: no checkpoints; is it a run directory of `dss train`?")
        self._saved: int | None = None  # the step being written; disk does not show it yet
        self._manager = _Manager(
            self.folder,
            item_handlers={
                name: ocp.PyTreeCheckpointHandler(handler_impl=_writer(largest, frozen))
                for name in ("params", "opt_state")
            },
            options=ocp.CheckpointManagerOptions(
                # Without best_fn Orbax keeps no metrics; with max_to_keep it would delete the
                # newest checkpoint. The policy keeps both.
                best_fn=lambda metrics: metrics[SCORE],
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(2),
                        policies.BestN(
                            get_metric_fn=_rank,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                async_options=ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT),
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The last step that has a checkpoint."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The step with the highest score, the earlier one on a tie; the latest if none has any."""
        found = {step: self._manager.metrics(step) for step in self.steps}
        ranks = {step: _rank(metrics) for step, metrics in found.items() if metrics}
        return max(ranks, key=lambda step: ranks[step]) if ranks else self.latest

    def find(self, which: str) -> int:
        """Returns the step that "latest", "best" or a number names.

        Raises:
          UserError: there is no such checkpoint.
        """
        named = {"latest": self.latest, "best": self.best}
        step = named[which] if which in named else int(which) if which.isdecimal() else None
        if step is None or step not in self.steps:
            have = ", ".join(map(str, self.steps)) or "none"
            raise UserError(f"{self.folder}: no checkpoint {which!r}; have: {have}, latest, best")
        return step

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Starts writing the state of its step; waits for the checkpoint before it, if unfinished.

        Args:
          state: what to save.
          score: decides which checkpoint is the best; None where nothing was evaluated.
        """
        step = int(state.step)
        # Not `self.steps`: read from the disk while one is being written, it would lack that one,
        # and the manager would not know of it when it decides what to keep.
        if step == self._saved or step in self._manager.all_steps():
            return
        # A process whose write has failed says so now; in `save` it would wait for the others,
        # which wait for what it has not written.
        self._manager.check_for_errors()
        trees = {"params": state.params}
        if jax.tree.leaves(state.opt_state):  # an imported checkpoint has none
            trees["opt_state"] = state.opt_state
        items = {
            name: ocp.args.PyTreeSave(
                tree,
                save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_SIZE), tree),
                ocdbt_target_data_file_size=FILE_SIZE,
                custom_metadata=checksums(tree),
            )
            for name, tree in trees.items()
        }
        metrics = None if score is None else {SCORE: score, "step": step}
        self._saved = step
        trim_freed_memory()  # the state's copy on the host is written while the next steps go on
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state of a step, placed as the abstract state's shardings say.

        Raises:
          UserError: the checkpoint is of a student of another size, or of another optimizer, or an
            array is not what was saved.
        """
        state, saved = self._read_state(step, abstract)
        self._check(step, state, saved)
        return state

    def _read_state(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state of a step and the checksums that it was saved with, an item each."""
        params, of_params = self._read_params(step, abstract.params)
        args = ocp.args.PyTreeRestore(
            abstract.opt_state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract.opt_state),
        )
        try:
            read = self._read(step, "opt_state", ocp.PyTreeCheckpointHandler(), args)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.folder / str(step)}: its optimizer state does not fit; was the run started "
                f"with another optimizer? ({first_line(error)})"
            ) from error
        step_array = place(np.array(step, abstract.step.dtype), abstract.step.sharding)
        saved = {"params": of_params, "opt_state": read[1]}
        return TrainState(step_array, params, read[0]), saved

    def _check(self, step: int, state: Any, saved: dict[str, Any]) -> None:
        """Raises UserError if an array is not what was saved. Every process must call it."""
        for item, sums in saved.items():
            check_sums(self.folder / str(step) / item, checksums(getattr(state, item)), sums)

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, dict[int, str]]:
        """Returns the state of the newest checkpoint that can be read.

        Those that are newer are damaged, and renamed to `<step>.damaged`, for their steps will be
        saved again. A checkpoint that one of several processes cannot read is damaged for all.

        Returns:
          The state, and why each damaged step cannot be read.

        Raises:
          UserError: none can be read; why the newest cannot.
          Exception: what keeps from reading is not in the files, such as a bucket out of reach.
        """
        damaged: dict[int, Exception] = {}
        for step in reversed(self.steps):
            try:
                state, saved = self._read_state(step, abstract)
            except Exception as error:  # whatever a broken file makes Orbax raise
                if is_passing(error):
                    raise
                damaged[step] = error
            if not all_agree(step not in damaged):
                damaged.setdefault(step, UserError("another process cannot read it"))
                continue
            try:
                self._check(step, state, saved)
            except UserError as error:  # in every process
                damaged[step] = error
                continue
            if is_leader():
                for bad in damaged:
                    (self.folder / str(bad)).rename(self.folder / f"{bad}.damaged")
            wait_for_all("damaged checkpoints are set aside")
            self._manager.reload()
            return state, {bad: first_line(error) for bad, error in damaged.items()}
        step, newest = next(iter(damaged.items()))
        if isinstance(newest, UserError):
            raise newest
        where = self.folder / str(step)
        raise UserError(f"{where}: cannot be read: {first_line(newest)}") from newest

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Returns the parameters of a step, placed as the abstract tree's shardings say.

        Raises:
          UserError: the checkpoint is of a student of another size, or an array is not what was
            saved.
        """
        problem = None
        try:
            with reading(self.folder / str(step)):
                params, saved = self._read_params(step, abstract)
        except UserError as error:
            problem = error
        if not all_agree(problem is None):
            where = self.folder / str(step)
            raise problem or UserError(f"{where}: another process cannot read its part")
        check_sums(self.folder / str(step) / "params", checksums(params), saved)
        return params

    def _read_params(self, step: int, abstract: Any) -> tuple[Any, Any]:
        self.check_shapes(step, abstract)
        args = ocp.args.StandardRestore(abstract)
        return self._read(step, "params", ocp.StandardCheckpointHandler(), args)

    def leaves(self, step: int, item: str) -> Leaves:
        """Returns the arrays of a step's "params" or "opt_state", to be read one at a time."""
        return Leaves(self.folder / str(step) / item)

    def _read(
        self, step: int, item: str, handler: ocp.CheckpointHandler, args: Any
    ) -> tuple[Any, Any]:
        """Returns an item and the checksums that it was saved with. Not through the manager, in
        which a process would wait for the others: one that cannot read its part must be able to
        tell them. So nothing is checked here, for which all must have read theirs.
        """
        where = self.folder / str(step) / item
        check_no_pipes(where)
        saved: Any = ocp.PyTreeCheckpointHandler().metadata(where)
        return handler.restore(where, args=args), saved.custom_metadata

    def check_shapes(self, step: int, abstract: Any) -> None:
        """Raises the user's error where a step's parameters are not of the abstract's shapes."""
        with reading(self.folder / str(step)):
            where = self.folder / str(step) / "params"
            metadata: Any = ocp.PyTreeCheckpointHandler().metadata(where)
        found = {"/".join(path_names(p)): tuple(x.shape) for p, x in _leaves(metadata.tree)}
        wanted = {"/".join(path_names(p)): tuple(x.shape) for p, x in _leaves(abstract)}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise UserError(
                    f"{self.folder / str(step)}: a checkpoint of another size: {name} is "
                    f"{found.get(name, 'missing')}, the student's is {wanted.get(name, 'missing')}"
                )

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the threads."""
        self._manager.close()


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
    """Orders checkpoints: the higher score, on a tie the earlier step."""
    return metrics[SCORE], -metrics["step"]


def _leaves(tree: Any) -> list[tuple[tuple, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]

"""Orbax checkpoints of a run: saved asynchronously, keeping the latest two and the best."""

import math
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dss.errors import CheckpointError, DssError, first_line
from dss.parallel.memory import trim_freed_memory
from dss.parallel.mesh import place
from dss.parallel.processes import all_agree, is_leader, wait_for_all
from dss.paths import absolute, check_no_pipes
from dss.training.checksums import check_sums, checksums, path_names
from dss.training.leaves import Leaves, is_transient, reading
from dss.training.step import TrainState

__all__ = ["Checkpoints", "abstract_like", "largest_part"]

SAVE_TIMEOUT = 7 * 24 * 3600  # seconds; Orbax measures it by the wall clock, which can jump
# Data are buffered in memory until a file is full. Without a file size, Orbax would buffer all
# parameters of a process for a single file.
FILE_SIZE = 16 * 2**20  # bytes
CHUNK_SIZE = 4 * 2**20  # bytes, compressed at once
SCORE = "score"  # metric that selects the best checkpoint; higher is better


def largest_part(tree: Any) -> int:
    """Returns the size in bytes of the largest shard of a tree of arrays."""
    parts = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree)]
    return max(math.prod(shape) * size for shape, size in parts)


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Returns the `ShapeDtypeStruct`s of a tree of arrays, with the given tree of shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, but unreadable scores are ignored; Orbax's would fail to open the folder."""

    def __init__(self, folder: epath.Path, **options: Any):
        with reading(folder):
            super().__init__(folder, **options)

    def metrics(self, step: int) -> dict[str, float] | None:
        try:
            metrics = super().metrics(step)
        except (ValueError, RecursionError):  # not JSON
            return None
        names = (SCORE, "step")
        has_all = isinstance(metrics, dict) and all(
            isinstance(metrics.get(n), int | float) for n in names
        )
        return metrics if has_all else None


def _item_handler(max_shard_bytes: int | None, frozen: bool) -> ocp.BasePyTreeCheckpointHandler:
    """Returns the handler that saves an item; arguments as of `Checkpoints`."""
    options: dict[str, Any] = {}
    if max_shard_bytes is not None:
        # The bytes in flight must be fewer than Orbax's limit.
        options["save_concurrent_bytes"] = max_shard_bytes + 1
    if frozen:
        # The public ArrayHandler takes a callback that returns a TransferPriority, but Orbax (0.12)
        # has no public name for either; its own docstring imports this module.
        from orbax.checkpoint._src.serialization import types

        class DeferredTransfer(types.DefaultSerializationStatusCallback):
            def key_priority(self, _: Any) -> types.TransferPriority:
                return types.TransferPriority.ASYNCHRONOUS_DEPRIORITIZED

        handler = ocp.type_handlers.ArrayHandler(callback=DeferredTransfer())
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
        options["type_handler_registry"] = registry
        options["save_device_host_concurrent_bytes"] = 1  # copies one array at a time
    return ocp.BasePyTreeCheckpointHandler(**options)


class Checkpoints:
    """The checkpoints of a run, in the folder `<run>/checkpoints`.

    Each checkpoint is a folder named by its step. Parameters and optimizer state are separate
    items, so that evaluation reads parameters only. A checkpoint appears under its name only when
    it is complete.

    Args:
      folder: folder of the checkpoints.
      largest: size in bytes of the largest shard to be saved, see `largest_part`, to which writes
        in flight are limited; None: no limit.
      frozen: whether saved states stay unchanged until `wait`. If so, each array is copied from its
        devices to the host just before it is written; otherwise all are copied within `save`.
      read_only: whether only to read; nothing is created or removed.

    Raises:
      CheckpointError: if `read_only` is true and the folder does not exist.
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
            raise CheckpointError(
                f"{folder}: no checkpoints; is it a run directory of `dss train`?"
            )
        self._saved: int | None = None  # last step saved; possibly not on disk yet
        self._manager = _Manager(
            self.folder,
            item_handlers={
                name: ocp.PyTreeCheckpointHandler(handler_impl=_item_handler(largest, frozen))
                for name in ("params", "opt_state")
            },
            options=ocp.CheckpointManagerOptions(
                # Without best_fn Orbax saves no metrics. With max_to_keep it would delete the
                # newest checkpoint; this policy keeps the newest two and the best.
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
        """The steps of all checkpoints, ascending."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The step of the latest checkpoint; None if there is none."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The step with the highest score, the earlier on a tie; the latest if none has a score."""
        scores = {step: self._manager.metrics(step) for step in self.steps}
        ranks = {step: _rank(metrics) for step, metrics in scores.items() if metrics}
        return max(ranks, key=lambda step: ranks[step]) if ranks else self.latest

    def find(self, name: str) -> int:
        """Returns the step of the checkpoint `name`: "latest", "best" or a step number.

        Raises:
          CheckpointError: if there is no such checkpoint.
        """
        named = {"latest": self.latest, "best": self.best}
        step = named[name] if name in named else int(name) if name.isdecimal() else None
        if step is None or step not in self.steps:
            steps = ", ".join(map(str, self.steps)) or "none"
            raise CheckpointError(
                f"{self.folder}: no checkpoint {name!r}; available: {steps}, latest, best"
            )
        return step

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Starts saving a state, after waiting for the previous save.

        Does nothing if the state's step is already saved.

        Args:
          state: the state; its step names the checkpoint.
          score: score that selects the best checkpoint; None without an evaluation.
        """
        step = int(state.step)
        # Not `self.steps`: it reloads from disk, where a checkpoint being written is missing, and
        # the manager would then ignore that checkpoint when it decides which ones to keep.
        if step == self._saved or step in self._manager.all_steps():
            return
        # If the previous write failed in this process, raise now: in `save` it would wait for the
        # other processes, which wait for the missing write.
        self._manager.check_for_errors()
        trees = {"params": state.params}
        if jax.tree.leaves(state.opt_state):  # empty in imported checkpoints
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
        trim_freed_memory()  # the state's copy on the host outlives the next training steps
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state of a step.

        Args:
          step: step of the checkpoint.
          abstract: shapes, dtypes and shardings of the state.

        Raises:
          CheckpointError: if the student's size or the optimizer differs, or the checkpoint is
            corrupt.
        """
        state, saved = self._read_state(step, abstract)
        self._check(step, state, saved)
        return state

    def _read_state(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state of a step and the saved checksums of each item."""
        params, params_checksums = self._read_params(step, abstract.params)
        args = ocp.args.PyTreeRestore(
            abstract.opt_state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract.opt_state),
        )
        try:
            opt_state, opt_state_checksums = self._read(
                step, "opt_state", ocp.PyTreeCheckpointHandler(), args
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder / str(step)}: the optimizer state does not match; was the run "
                f"started with another optimizer? ({first_line(error)})"
            ) from error
        step_array = place(np.array(step, abstract.step.dtype), abstract.step.sharding)
        saved = {"params": params_checksums, "opt_state": opt_state_checksums}
        return TrainState(step_array, params, opt_state), saved

    def _check(self, step: int, state: Any, saved: dict[str, Any]) -> None:
        """Checks a state against its saved checksums. Every process must call it.

        Raises:
          CheckpointError: if a checksum differs.
        """
        for item, sums in saved.items():
            check_sums(self.folder / str(step) / item, checksums(getattr(state, item)), sums)

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, dict[int, str]]:
        """Returns the state of the newest checkpoint that can be read.

        Newer checkpoints are corrupt; they are quarantined by renaming them to `<step>.damaged`, as
        their steps will be saved again. A checkpoint that one process cannot read is corrupt for
        all.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Returns:
          The state, and the error message of each corrupt step.

        Raises:
          CheckpointError: if no checkpoint can be read; the message has the newest one's error.
          Exception: if an error has another cause than the files, such as an unreachable bucket.
        """
        corrupt: dict[int, Exception] = {}
        for step in reversed(self.steps):
            try:
                state, saved = self._read_state(step, abstract)
            except Exception as error:  # a corrupt file can make Orbax raise any exception
                if is_transient(error):
                    raise
                corrupt[step] = error
            if not all_agree(step not in corrupt):
                corrupt.setdefault(step, CheckpointError("another process cannot read it"))
                continue
            try:
                self._check(step, state, saved)
            except DssError as error:  # raised in every process
                corrupt[step] = error
                continue
            if is_leader():
                for bad in corrupt:
                    (self.folder / str(bad)).rename(self.folder / f"{bad}.damaged")
            wait_for_all("corrupt checkpoints are quarantined")
            self._manager.reload()
            return state, {bad: first_line(error) for bad, error in corrupt.items()}
        step, newest = next(iter(corrupt.items()))
        if isinstance(newest, DssError):
            raise newest
        path = self.folder / str(step)
        raise CheckpointError(f"{path}: cannot be read: {first_line(newest)}") from newest

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Returns the parameters of a step.

        Args:
          step: step of the checkpoint.
          abstract: tree of the parameters' shapes, dtypes and shardings.

        Raises:
          CheckpointError: if the student's size differs, or the checkpoint is corrupt.
        """
        path = self.folder / str(step)
        failure = None
        try:
            with reading(path):
                params, saved = self._read_params(step, abstract)
        except DssError as error:
            failure = error
        if not all_agree(failure is None):
            raise failure or CheckpointError(f"{path}: another process cannot read its part")
        check_sums(path / "params", checksums(params), saved)
        return params

    def _read_params(self, step: int, abstract: Any) -> tuple[Any, Any]:
        self.check_shapes(step, abstract)
        args = ocp.args.StandardRestore(abstract)
        return self._read(step, "params", ocp.StandardCheckpointHandler(), args)

    def leaves(self, step: int, item: str) -> Leaves:
        """Returns the arrays of a step's "params" or "opt_state", each read when accessed."""
        return Leaves(self.folder / str(step) / item)

    def _read(
        self, step: int, item: str, handler: ocp.CheckpointHandler, args: Any
    ) -> tuple[Any, Any]:
        """Returns an item and its saved checksums, which are not checked.

        Orbax's manager is not used, because it would wait for all processes, and a process that
        fails to read must still be able to report it to the others. Computing checksums needs all
        processes, so that is left to the caller.
        """
        path = self.folder / str(step) / item
        check_no_pipes(path)
        saved: Any = ocp.PyTreeCheckpointHandler().metadata(path)
        return handler.restore(path, args=args), saved.custom_metadata

    def check_shapes(self, step: int, abstract: Any) -> None:
        """Checks that the saved parameters of a step have the shapes of the abstract tree.

        Raises:
          CheckpointError: if a parameter is missing, unexpected or of another shape.
        """
        path = self.folder / str(step)
        with reading(path):
            metadata: Any = ocp.PyTreeCheckpointHandler().metadata(path / "params")
        saved, expected = (
            {"/".join(path_names(p)): tuple(x.shape) for p, x in _leaves(tree)}
            for tree in (metadata.tree, abstract)
        )
        for name in sorted(saved.keys() | expected.keys()):
            if saved.get(name) != expected.get(name):
                raise CheckpointError(
                    f"{path}: a checkpoint of another size: {name} is "
                    f"{saved.get(name, 'missing')}, the student's is "
                    f"{expected.get(name, 'missing')}"
                )

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all saves are on disk, then stops the background threads."""
        self._manager.close()


def _rank(metrics: dict[str, float]) -> tuple[float, float]:
    """Returns a checkpoint's sort key: higher scores, then earlier steps, rank higher."""
    return metrics[SCORE], -metrics["step"]


def _leaves(tree: Any) -> list[tuple[tuple, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]

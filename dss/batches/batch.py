"""The token arrays of one step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dss.batches.packing import PackedShape

__all__ = ["Batch"]

Array = Any  # numpy.ndarray on the host, jax.Array on the mesh, jax.ShapeDtypeStruct in a plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """The int32 token arrays of one step.

    A sequence is an example in one task, and a segment of the batch. Packed sequences follow each
    other in G groups of N encoder and M decoder slots, and three arrays list the slots of each
    attention row (see `dss.student.ops.Rows`). For example, a group with the two segments
    `predict: a` -> `x` and `explain: b` -> `y z` (1 is EOS, 0 padding):

        encoder_input_tokens   predict : a 1 explain : b 1 0 0
        encoder_segment_ids          1 1 1 1       2 2 2 2 0 0
        decoder_target_tokens  x 1 y z 1 0
        decoder_input_tokens   0 x 0 y z 0
        decoder_segment_ids    1 1 2 2 2 0
        decoder_task_ids       1 1 2 2 2 0
        encoder_rows           (0 1 2 3), (4 5 6 7)
        decoder_rows           (0 1 2 3 4)
        cross_rows             (0 1 2 3 4 5 6 7)

    Unpacked, every group is one sequence, and there are no row arrays. With one encoder pass, the
    tasks of an example share an input, which is encoded once; an example is then packed as a unit.
    Each of its targets is a segment, starts from the start id of its task, and attends to the
    segment of the input.

    Attributes:
      encoder_input_tokens: input token ids, [G, N].
      encoder_segment_ids: segment of each input token, 0 for padding, [G, N].
      decoder_target_tokens: target token ids, [G, M].
      decoder_input_tokens: targets, shifted right in each segment, [G, M].
      decoder_segment_ids: segment of each target token, 0 for padding, [G, M].
      decoder_task_ids: 1 + the target's task in the mixture, 0 for padding, [G, M].
      encoder_rows: slots of each row of encoder self-attention, [G, R, S]; N for none.
      decoder_rows: slots of each row of decoder self-attention, [G, Q, T]; M for none.
      cross_rows: encoder slots that each row of `decoder_rows` attends to, [G, Q, C]; N for none.
      decoder_reads: encoder segment that each target token attends to, [G, M]; None: its own.
    """

    encoder_input_tokens: Array
    encoder_segment_ids: Array
    decoder_target_tokens: Array
    decoder_input_tokens: Array
    decoder_segment_ids: Array
    decoder_task_ids: Array
    encoder_rows: Array | None = None
    decoder_rows: Array | None = None
    cross_rows: Array | None = None
    decoder_reads: Array | None = None

    @classmethod
    def abstract(
        cls, shape: PackedShape, groups: int, *, packed: bool = True, reads: bool = False
    ) -> "Batch":
        """Returns a batch of `jax.ShapeDtypeStruct`.

        Args:
          shape: the shape of a group.
          groups: G, the number of groups.
          packed: whether there are row arrays.
          reads: whether there is `decoder_reads`.
        """

        def array(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((groups, *dims), jnp.int32)

        inputs, targets, widths = array(shape.inputs), array(shape.targets), shape.widths
        return cls(
            encoder_input_tokens=inputs,
            encoder_segment_ids=inputs,
            decoder_target_tokens=targets,
            decoder_input_tokens=targets,
            decoder_segment_ids=targets,
            decoder_task_ids=targets,
            encoder_rows=array(shape.input_rows, widths.inputs) if packed else None,
            decoder_rows=array(shape.target_rows, widths.targets) if packed else None,
            cross_rows=array(shape.target_rows, widths.cross) if packed else None,
            decoder_reads=targets if reads else None,
        )

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the arrays that there are; a step is compiled once for each value."""
        return tuple(array.shape for array in jax.tree.leaves(self))

    @property
    def fill(self) -> tuple[float, float]:
        """The packing density: the fraction of encoder slots and of decoder slots with a token."""
        return (
            float((self.encoder_segment_ids > 0).mean()),
            float((self.decoder_segment_ids > 0).mean()),
        )

    def as_dict(self) -> dict[str, Array]:
        """Returns the arrays that there are, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

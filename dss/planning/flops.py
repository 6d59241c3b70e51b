"""How many operations a student takes: a multiplication and an addition are two."""

import dataclasses

import numpy as np

from dss.student.config import T5Config

__all__ = ["Forward", "computed_flops", "forward_flops", "useful_flops"]


@dataclasses.dataclass(frozen=True)
class Forward:
    """The operations of a forward pass."""

    layers: float  # products with parameters
    attention: float  # scores, and what they weigh
    head: float  # logits


def forward_flops(
    config: T5Config,
    source: float,
    target: float,
    encoder_scores: float,
    decoder_scores: float,
    cross_scores: float,
) -> Forward:
    """Returns the operations of a forward pass.

    Args:
      config: the student.
      source: tokens that the encoder reads.
      target: tokens that the decoder reads.
      encoder_scores: pairs of positions of the encoder's self-attention, in one head.
      decoder_scores: the same for the decoder's self-attention.
      cross_scores: the same for cross-attention.
    """
    D, heads = config.d_model, config.num_heads * config.d_kv
    mlp = 2 * (3 if config.gated else 2) * D * config.d_ff
    square, scores = 2 * D * heads, 4 * heads
    encoder = source * (4 * square + mlp)
    decoder = target * (6 * square + mlp) + source * 2 * square
    return Forward(
        config.num_encoder_layers * encoder + config.num_decoder_layers * decoder,
        config.num_encoder_layers * scores * encoder_scores
        + config.num_decoder_layers * scores * (decoder_scores + cross_scores),
        2 * target * D * config.vocab_size,
    )


def useful_flops(
    config: T5Config, inputs: np.ndarray, targets: np.ndarray, reads: np.ndarray | None = None
) -> float:
    """Returns the operations of a training step that its tokens need: three forward passes'.

    Args:
      config: the student.
      inputs: lengths of the inputs in tokens, [I].
      targets: lengths of the targets, [N].
      reads: which input each target reads, [N]; None: each its own.
    """
    source, target = inputs.astype(float), targets.astype(float)
    forward = forward_flops(
        config,
        source.sum(),
        target.sum(),
        (source**2).sum(),
        (target**2).sum() / 2,
        ((source if reads is None else source[reads]) * target).sum(),
    )
    return 3 * (forward.layers + forward.attention + forward.head)


def computed_flops(
    config: T5Config,
    slots: tuple[int, int],
    encoder_rows: tuple[int, int],
    decoder_rows: tuple[int, int],
    cross_width: int,
) -> float:
    """Returns the operations of a training step as it is computed: padding, rows of attention and
    what the backward pass computes again counted.

    Args:
      config: the student, with its `remat`.
      slots: of encoder and decoder.
      encoder_rows: rows of the encoder's self-attention, and their width.
      decoder_rows: the same for the decoder's.
      cross_width: how many encoder slots a decoder's row attends to.
    """
    (R, S), (Q, T) = encoder_rows, decoder_rows
    forward = forward_flops(config, *slots, R * S * S, Q * T * T, Q * T * cross_width)
    scores = forward.attention / 2
    again = {
        "none": scores,
        "dots": scores + forward.attention,
        "full": scores + forward.attention + forward.layers,
    }[config.remat]
    return 3 * (forward.layers + forward.attention + forward.head) + again

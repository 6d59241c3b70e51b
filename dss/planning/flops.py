"""FLOPs of a student; a multiplication and an addition are two FLOPs."""

import dataclasses

import numpy as np

from dss.student.config import T5Config

__all__ = ["Forward", "computed_flops", "forward_flops", "useful_flops"]


@dataclasses.dataclass(frozen=True)
class Forward:
    """FLOPs of a forward pass."""

    layers: float  # products with the parameters of layers
    attention: float  # attention scores and weighted sums of values
    head: float  # LM head


def forward_flops(
    config: T5Config,
    source: float,
    target: float,
    encoder_scores: float,
    decoder_scores: float,
    cross_scores: float,
) -> Forward:
    """Returns the FLOPs of a forward pass.

    Args:
      config: the student's configuration.
      source: number of encoder tokens.
      target: number of decoder tokens.
      encoder_scores: number of query-key pairs of encoder self-attention, per head.
      decoder_scores: number of query-key pairs of decoder self-attention, per head.
      cross_scores: number of query-key pairs of cross-attention, per head.
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
    """Returns the useful FLOPs of a train step, three times a forward pass without padding.

    Args:
      config: the student's configuration.
      inputs: input lengths in tokens, [I].
      targets: target lengths in tokens, [N].
      reads: index of each target's input, [N]; None: target i has input i.
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
    """Returns the computed FLOPs of a train step, including padding and rematerialization.

    Args:
      config: the student's configuration, including `remat`.
      slots: number of encoder slots and of decoder slots.
      encoder_rows: number and width of the encoder's self-attention rows.
      decoder_rows: number and width of the decoder's self-attention rows.
      cross_width: number of encoder slots that a decoder row attends to.
    """
    (R, S), (Q, T) = encoder_rows, decoder_rows
    forward = forward_flops(config, *slots, R * S * S, Q * T * T, Q * T * cross_width)
    scores = forward.attention / 2
    rematerialized = {
        "none": scores,
        "dots": scores + forward.attention,
        "full": scores + forward.attention + forward.layers,
    }[config.remat]
    return 3 * (forward.layers + forward.attention + forward.head) + rematerialized

"""Configurations of a student, its decoding, and the logical axes of its parameters."""

import dataclasses
from typing import Literal

from dss.fields import check_at_least, check_rate, check_types

__all__ = ["AXES", "DecodingConfig", "T5Config"]

AXES = {  # logical axes of each parameter; a layer's have "layers" before them
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "query": ("embed", "heads"),
    "key": ("embed", "heads"),
    "value": ("embed", "heads"),
    "out": ("heads", "embed"),
    "wi_0": ("embed", "mlp"),
    "wi_1": ("embed", "mlp"),
    "wo": ("mlp", "embed"),
    "relative_bias": ("buckets", "heads"),
    "norm": ("embed",),
    "attention_norm": ("embed",),
    "cross_norm": ("embed",),
    "mlp_norm": ("embed",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes and kind of a T5 encoder-decoder (Raffel et al., 2020; Shazeer, 2020 for the gate).

    T5 1.0 has `activation="relu", gated=False, tied_embeddings=True, scaled_logits=True`; T5 1.1,
    Flan-T5, mT5 and ByT5 have `"gelu", True, False, False`.
    """

    vocab_size: int  # V, ids of tokens are below it
    d_model: int  # D, width of the residual stream
    d_kv: int  # K, width of one attention head
    d_ff: int  # width of the feed-forward layer
    num_heads: int  # H
    num_encoder_layers: int
    num_decoder_layers: int
    activation: Literal["relu", "gelu", "silu"] = "gelu"  # gelu is the tanh approximation
    gated: bool = True  # activation(x W0) * (x W1) instead of activation(x W)
    tied_embeddings: bool = False  # logits through the embedding, without a head of their own
    scaled_logits: bool = False  # hidden states times 1 / sqrt(D) before the logits
    relative_buckets: int = 32  # of relative positions
    relative_max_distance: int = 128  # tokens; all distances from here on share a bucket
    dropout_rate: float = 0.1  # in [0, 1)
    layer_norm_epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    remat: Literal["none", "full", "dots"] = "none"  # what of a layer is recomputed backward

    def __post_init__(self):
        check_types(self)
        sizes = [field.name for field in dataclasses.fields(self) if field.type is int]
        check_at_least(self, 1, *sizes)
        check_rate(self, "dropout_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How a student's text is read off it."""

    max_length: int = 64  # tokens of a label, EOS counted; the reference's generation length
    rationale_length: int = 256  # tokens of a rationale, EOS counted
    num_beams: int = 1  # 1 is greedy
    closed: bool = True  # choose among the possible labels, where a task says what they are
    batch_size: int = 64  # inputs decoded together
    length_multiple: int = 16  # inputs are padded to a multiple of this, for few compiled shapes

    def __post_init__(self):
        check_types(self)
        numbers = [field.name for field in dataclasses.fields(self) if field.type is int]
        check_at_least(self, 1, *numbers)

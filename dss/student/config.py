"""Configurations of a student and of decoding, and the logical axes of a student's parameters."""

import dataclasses
from typing import Literal

from dss.fields import check_at_least, check_rate, check_types

__all__ = ["AXES", "DecodingConfig", "T5Config"]

AXES = {  # logical axes by parameter name; stacked layers have a leading "layers" axis
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
    """Sizes and variant of a T5 encoder-decoder (Raffel et al., 2020; gating: Shazeer, 2020).

    T5 1.0 has `activation="relu", gated=False, tied_embeddings=True, scaled_logits=True`; T5 1.1,
    Flan-T5, mT5 and ByT5 have `"gelu", True, False, False`.
    """

    vocab_size: int  # V, number of token ids
    d_model: int  # D, width of the residual stream
    d_kv: int  # K, width of one attention head
    d_ff: int  # width of the feed-forward layer
    num_heads: int  # H
    num_encoder_layers: int
    num_decoder_layers: int
    activation: Literal["relu", "gelu", "silu"] = "gelu"  # gelu: the tanh approximation
    gated: bool = True  # activation(x W0) * (x W1) instead of activation(x W)
    tied_embeddings: bool = False  # the embedding is also the LM head
    scaled_logits: bool = False  # scale hidden states by 1 / sqrt(D) before the LM head
    relative_buckets: int = 32  # number of relative position buckets
    relative_max_distance: int = 128  # tokens; larger distances share the last bucket
    dropout_rate: float = 0.1  # in [0, 1)
    layer_norm_epsilon: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"  # compute dtype; parameters are float32
    # Rematerialized parts of a layer; "dots": all but products with parameters.
    remat: Literal["none", "full", "dots"] = "none"

    def __post_init__(self) -> None:
        check_types(self)
        sizes = [field.name for field in dataclasses.fields(self) if field.type is int]
        check_at_least(self, 1, *sizes)
        check_rate(self, "dropout_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """Hyperparameters of decoding."""

    max_length: int = 64  # label tokens, EOS included; the reference's generation length
    rationale_length: int = 256  # rationale tokens, EOS included
    num_beams: int = 1  # beam width; 1 is greedy decoding
    closed: bool = True  # choose among the task's labels, if it lists them
    batch_size: int = 64  # inputs per batch
    length_multiple: int = 16  # input lengths are padded to a multiple of this; fewer compilations

    def __post_init__(self) -> None:
        check_types(self)
        numbers = [field.name for field in dataclasses.fields(self) if field.type is int]
        check_at_least(self, 1, *numbers)

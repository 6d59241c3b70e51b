"""Compares the network with T5X's outputs on a small T5X checkpoint.

    python benchmarks/network_parity.py --fixture DIR

DIR has `config.json`, `expected.npz` and a checkpoint in `legacy/` or `orbax/` or both. Prints the
largest error of each check, relative to the largest expected value. Exit status 1 above 1e-4.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dss.cli.options import quiet_tpu
from dss.errors import DssError
from dss.interop import t5x_checkpoint
from dss.student.config import T5Config
from dss.student.decoding import generate
from dss.student.network import bind
from dss.training.loss import cross_entropy

TOLERANCE = 1e-4


def read_config(raw: dict) -> T5Config:
    activations = raw["mlp_activations"]
    return T5Config(
        vocab_size=raw["vocab_size"],
        d_model=raw["emb_dim"],
        d_kv=raw["head_dim"],
        d_ff=raw["mlp_dim"],
        num_heads=raw["num_heads"],
        num_encoder_layers=raw["num_encoder_layers"],
        num_decoder_layers=raw["num_decoder_layers"],
        activation=activations[0],
        gated=len(activations) == 2,
        tied_embeddings=raw["logits_via_embedding"],
        scaled_logits=raw["logits_via_embedding"],
        dropout_rate=0.0,
    )


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(got) - expected).max() / max(np.abs(expected).max(), 1e-30))


def compare(config: T5Config, params, expected: dict, z_loss: float) -> dict[str, float]:
    """Returns the error of each check; for greedy tokens, the fraction that differs."""
    model = jax.jit(lambda p, *args: bind(config, p)(*args))
    inputs = jnp.asarray(expected["encoder_input_tokens"])
    logits = model(params, inputs, jnp.asarray(expected["decoder_input_tokens"]))
    targets = expected["decoder_target_tokens"]
    losses = cross_entropy(logits, jnp.asarray(targets), z_loss=z_loss)
    packed = model(
        params,
        inputs,
        jnp.asarray(expected["packed_decoder_input_tokens"]),
        jnp.asarray(expected["encoder_segment_ids"]),
        jnp.asarray(expected["decoder_segment_ids"]),
    )
    real = targets != 0
    packed_real = expected["decoder_segment_ids"] != 0
    greedy = expected["greedy_tokens"]
    tokens, _ = generate(config, params, inputs, max_length=greedy.shape[1])
    return {
        "logits": relative_error(np.asarray(logits)[real], expected["logits"][real]),
        "packed logits": relative_error(
            np.asarray(packed)[packed_real], expected["packed_logits"][packed_real]
        ),
        "summed loss": relative_error((losses * real).sum(), expected["sum_loss"]),
        "greedy tokens": float((np.asarray(tokens) != greedy).mean()),
    }


def main() -> int:
    quiet_tpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--fixture", type=Path, required=True, help="folder of the checkpoint and T5X's outputs"
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    try:
        raw = json.loads((args.fixture / "config.json").read_text())
        expected = dict(np.load(args.fixture / "expected.npz"))
        config = read_config(raw)
        found = [f for name in ("legacy", "orbax") for f in (args.fixture / name).glob("check*_*")]
        if not found:
            raise DssError(f"{args.fixture}: no legacy/checkpoint_N and no orbax/checkpoint_N")
        rows = []
        for folder in found:
            params = t5x_checkpoint.load_params(folder, config)
            errors = compare(config, params, expected, raw.get("z_loss", 0.0))
            rows += [(folder.parent.name, check, error) for check, error in errors.items()]
    except (DssError, OSError, KeyError, ValueError) as error:
        print(f"network_parity: {error}", file=sys.stderr)
        return 2
    print(f"{'format':<8} {'check':<14} {'error':>9}")
    for form, check, error in rows:
        verdict = "ok" if error <= TOLERANCE else f"above {TOLERANCE}"
        print(f"{form:<8} {check:<14} {error:9.1e}  {verdict}")
    if args.json:
        columns = ("format", "check", "error")
        args.json.write_text(json.dumps([dict(zip(columns, r, strict=True)) for r in rows]))
    return int(not all(error <= TOLERANCE for *_, error in rows))


if __name__ == "__main__":
    sys.exit(main())

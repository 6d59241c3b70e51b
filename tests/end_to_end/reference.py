"""A run of the reference, recorded: what `benchmarks/fidelity.py` replays.

The reference trains transformers' T5 with the two losses of Hsieh et al. (2023), AdamW at a rate
that falls linearly, and clipping by global norm. This does the same for any dataset and kind of T5,
and writes it in the layout that the benchmark reads.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
import transformers

from dss.data.datasets import Dataset

ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
KINDS = {
    "1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
MAX_STEPS = 200  # where the rate would reach 0
IGNORED = -100  # the target that the loss leaves out
ROUNDING = 5e-7  # of what a relu is given: over twice the float32 error that was measured, 2e-7


def _model(kind: str, seed: int) -> transformers.T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=32128,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **KINDS[kind],
    )
    return transformers.T5ForConditionalGeneration(config)


def _nearest_to_zero(model: transformers.T5ForConditionalGeneration) -> list[float]:
    """Returns a list to which each pass of each relu adds the least magnitude it is given."""
    nearest: list[float] = []
    for name, module in model.named_modules():
        if name.endswith("DenseReluDense.wi"):  # gated layers have wi_0 and wi_1
            module.register_forward_hook(lambda _, __, x: nearest.append(x.abs().min().item()))
    return nearest


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def record(
    folder: Path,
    *,
    dataset: str,
    split: str,
    kind: str,
    label_type: str,
    alpha: float,
    vocabulary: Path,
    steps: int = 6,
    batch: int = 8,
    learning_rate: float = 3e-3,
) -> None:
    """Writes `model/` and `trajectory.json` of a short run.

    A relu's gradient jumps at 0: where one is given less than `ROUNDING`, the gradient is decided
    by how a machine adds up, and a run begins anew from other parameters.

    Args:
      folder: where.
      dataset: a released one; the data root is set.
      split: of its files.
      kind: "1.0" or "1.1".
      label_type: "gt" for gold labels, "llm" for the teacher's.
      alpha: weight of the label loss.
      vocabulary: T5's SentencePiece model.
      steps: how many.
      batch: examples a step.
      learning_rate: of the first step.
    """
    (folder / "spiece.model").write_bytes(vocabulary.read_bytes())
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
    source = Dataset.released(dataset).source
    examples, outputs = source.examples(split), source.outputs(split, "palm")
    labels = [
        o.label if label_type == "llm" else e.label for e, o in zip(examples, outputs, strict=True)
    ]

    def ids(texts: list[str], length: int) -> list[list[int]]:
        return tokenizer(texts, max_length=length, truncation=True).input_ids

    order = np.random.default_rng(0).permutation(len(examples))[: steps * batch]

    def train(model: transformers.T5ForConditionalGeneration) -> list[dict[str, float]]:
        def loss(prefix: str, rows: list[int], targets: list[str]) -> torch.Tensor:
            inputs = _padded(ids([prefix + examples[i].input for i in rows], 1024), 0)
            return model(
                input_ids=inputs,
                attention_mask=(inputs != 0).long(),
                labels=_padded(ids(targets, 256), IGNORED),
            ).loss

        adam = torch.optim.AdamW(
            model.parameters(),
            lr=learning_rate,
            betas=(ADAM["b1"], ADAM["b2"]),
            eps=ADAM["eps"],
            weight_decay=ADAM["weight_decay"],
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / MAX_STEPS)
        log = []
        for rows in order.reshape(steps, batch).tolist():
            label_loss = loss("predict: ", rows, [labels[i] for i in rows])
            rationale_loss = loss("explain: ", rows, [outputs[i].rationale for i in rows])
            total = alpha * label_loss + (1 - alpha) * rationale_loss
            adam.zero_grad()
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            schedule.step()
            values = (label_loss, rationale_loss, total, norm)
            names = ("label_loss", "rationale_loss", "loss", "grad_norm")
            log.append({n: float(v.detach()) for n, v in zip(names, values, strict=True)})
        return log

    for seed in itertools.count():
        model = _model(kind, seed)
        model.save_pretrained(folder / "model")
        nearest = _nearest_to_zero(model)
        log = train(model)
        if min(nearest, default=1.0) > ROUNDING:
            break

    asked = order[:4].tolist()
    inputs = _padded(ids([f"predict: {examples[i].input}" for i in asked], 1024), 0)
    with torch.no_grad():
        tokens = model.generate(
            inputs, attention_mask=(inputs != 0).long(), max_new_tokens=12, do_sample=False
        )
    trajectory = {
        "dataset": dataset,
        "split": split,
        "label_type": label_type,
        "alpha": alpha,
        "batch": batch,
        "steps": steps,
        "max_steps": MAX_STEPS,
        "lr": learning_rate,
        "dropout": 0.0,
        "adam": ADAM,
        "clip_global_norm": 1.0,
        "order": order.reshape(steps, batch).tolist(),
        "log": log,
        "final_greedy": {"indices": asked, "tokens": tokens.tolist()},
    }
    (folder / "trajectory.json").write_text(json.dumps(trajectory))

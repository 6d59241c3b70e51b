"""Times generation by dss, transformers' `generate` and CTranslate2 on the same inputs.

    python benchmarks/decode.py --student small [--batch 1 32 64] [--beams 1 4] [--length 32]
        [--repeats 5] [--threads N] [--sides dss transformers ctranslate2] [--json FILE]

Inputs of a batch have similar lengths, as in the batches of dss and CTranslate2. The weights are
random float32, in one Hugging Face folder that all sides read. Modes: `forced`, every output has
exactly --length tokens (EOS is never likely); `natural`, an output ends at EOS, whose column of the
head is scaled so that lengths vary, or at --length. The modes differ in that column only. Each side
keeps its model in its own process; sides take turns, and medians exclude the first call. Columns:
`dss is`, the speed of dss in multiples of the side's; `agree`, the fraction of sequences with the
tokens of dss up to EOS; `of peak` (forced mode), FLOPs of the tokens over those of the machine's
float32 matrix product.

Also times label scoring: `score_candidates` with the numbers of labels and tokens of CQA and NLI,
against greedy generation of as many tokens (forced) and of up to a label's maximum (natural).
CTranslate2 needs `pip install ctranslate2`; sides that are not installed are skipped.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dss.cli.options import quiet_tpu
from dss.config.gin_files import parse_gin
from dss.errors import DssError
from dss.planning.flops import forward_flops
from dss.student.config import DecodingConfig, T5Config

EOS = 1
SIDES = {  # required packages
    "dss": ("jax", "numpy"),
    "transformers": ("transformers", "torch"),
    "ctranslate2": ("ctranslate2", "transformers", "torch"),
}
MODES = {"forced": 0.0, "natural": 2.5}  # scale of EOS's column of the head
LABELS = {"CQA": (5, 4), "NLI": (3, 2)}  # number of labels, tokens of each
POOL = 16  # batches of inputs, sorted by length; the middle one is decoded
PAUSE = 0.05  # seconds between turns, until idle threads stop spinning


@dataclasses.dataclass(frozen=True)
class Job:
    """A timed call."""

    mode: str  # a name of MODES
    batch: int
    beams: int
    length: int  # maximum output or label length, tokens
    labels: int = 0  # number of labels to score; 0 to generate

    @property
    def name(self) -> str:
        search = "greedy" if self.beams == 1 else f"beam {self.beams}"
        return f"{search} {self.mode} b{self.batch}"


class DssSide:
    """dss; inputs padded as by `Predictor`."""

    def __init__(self, folder: Path, threads: int):
        import jax

        from dss.interop.huggingface import load_params, read_config
        from dss.parallel.memory import keep_freed_memory
        from dss.student import decoding

        keep_freed_memory()  # as in the command line
        self.config, self.decoding = read_config(folder), decoding
        self.params = jax.device_put(load_params(folder, self.config))
        self.put, self.device = jax.device_put, jax.devices()[0].platform

    def prepare(self, rows: list[list[int]], job: Job) -> tuple:
        draw = np.random.default_rng(0)
        shape = (job.batch, job.labels, job.length)
        labels = draw.integers(3, self.config.vocab_size, shape, np.int32)
        labels[:, :, -1] = EOS
        return self.put(padded(rows, DecodingConfig().length_multiple)), labels

    def decode(self, job: Job, inputs: Any, labels: np.ndarray) -> np.ndarray:
        if job.labels:
            scores = self.decoding.score_candidates(self.config, self.params, inputs, labels)
            return labels[np.arange(job.batch), np.asarray(scores).argmax(axis=1)]
        tokens, _ = self.decoding.generate(
            self.config,
            self.params,
            inputs,
            max_length=job.length,
            num_beams=job.beams,
            stop=job.mode == "natural",
        )
        return np.asarray(tokens)


class TransformersSide:
    """transformers' `generate` with its key-value cache; inputs padded to the longest."""

    def __init__(self, folder: Path, threads: int):
        import torch
        import transformers

        silence(transformers)
        torch.set_num_threads(threads)
        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        model = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(self.device).eval()

    def prepare(self, rows: list[list[int]], job: Job) -> tuple:
        return (self.torch.from_numpy(padded(rows).astype(np.int64)).to(self.device),)

    def decode(self, job: Job, inputs: Any) -> np.ndarray:
        least = {"min_new_tokens": job.length} if job.mode == "forced" else {}
        with self.torch.inference_mode():
            tokens = self.model.generate(
                inputs,
                attention_mask=(inputs != 0).long(),
                max_new_tokens=job.length,
                num_beams=job.beams,
                do_sample=False,
                **least,
            )
        return tokens[:, 1:].cpu().numpy()  # without the start token


class CTranslate2Side:
    """CTranslate2's translator on the CPU; its text tokens are the ids."""

    device = "cpu"

    def __init__(self, folder: Path, threads: int):
        import ctranslate2

        self.translator = ctranslate2.Translator(
            str(folder / "ctranslate2"),
            device=self.device,
            compute_type="float32",
            inter_threads=1,
            intra_threads=threads,
        )

    def prepare(self, rows: list[list[int]], job: Job) -> tuple:
        return ([[str(i) for i in row] for row in rows],)

    def decode(self, job: Job, inputs: Any) -> list[list[str]]:
        results = self.translator.translate_batch(
            inputs,
            max_batch_size=0,
            beam_size=job.beams,
            max_decoding_length=job.length,
            min_decoding_length=job.length if job.mode == "forced" else 1,
            return_end_token=True,
        )
        return [result.hypotheses[0] for result in results]


def silence(transformers: Any) -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # no warning about the untied head


def padded(rows: list[list[int]], multiple: int = 1) -> np.ndarray:
    length = -(-max(map(len, rows)) // multiple) * multiple
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


def until_end(row: Any) -> list[int]:
    ids = [int(i) for i in row]
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


def write_weights(root: Path, config: T5Config, convert: bool) -> None:
    """Writes a Hugging Face folder for each mode, with its CTranslate2 conversion."""
    import jax
    from safetensors.numpy import save_file

    from dss.interop.huggingface import tensor_name
    from dss.student.network import init_params

    params = jax.tree.map(np.array, init_params(config, 0))
    eos = params["head"][:, EOS].copy()
    for mode, scale in MODES.items():
        params["head"][:, EOS] = scale * eos
        tensors = {}
        for path, array in jax.tree_util.tree_leaves_with_path(params):
            names = tuple(p.key for p in path)
            layers = range(len(array)) if "layers" in names else [None]
            for layer in layers:
                name, transposed = tensor_name(names, layer, gated=config.gated)
                part = array if layer is None else array[layer]
                tensors[name] = np.ascontiguousarray(part.T if transposed else part)
        (root / mode).mkdir()
        save_file(tensors, root / mode / "model.safetensors", metadata={"format": "pt"})
        (root / mode / "config.json").write_text(json.dumps(hugging_face_config(config)))
        if convert:
            convert_weights(root / mode, config)


def hugging_face_config(config: T5Config) -> dict:
    return {
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": f"gated-{config.activation}" if config.gated else config.activation,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": EOS,  # without it `generate` continues to the maximum length
        "dtype": "float32",
    }


def convert_weights(folder: Path, config: T5Config) -> None:
    import transformers
    from ctranslate2.converters import TransformersConverter

    silence(transformers)

    class Ours(TransformersConverter):
        def load_model(self, *args, **kwargs):
            model = super().load_model(*args, **kwargs)
            # transformers 5 sets True whatever the file has, which would scale the logits.
            model.config.tie_word_embeddings = False
            return model

        def load_tokenizer(self, *args, **kwargs):
            vocabulary = {str(i): i for i in range(config.vocab_size)}
            special = {"pad_token": "0", "eos_token": str(EOS), "unk_token": "2"}
            calls = {"get_vocab": lambda: vocabulary, "convert_ids_to_tokens": str}
            return SimpleNamespace(**special, **calls)

    Ours(str(folder)).convert(str(folder / "ctranslate2"))


def serve(side: str, inputs: list[list[int]], cores: list[int], pipe: Connection) -> None:
    """Serves timed calls over a pipe; for a separate process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before the libraries count cores
    kinds = {"dss": DssSide, "transformers": TransformersSide, "ctranslate2": CTranslate2Side}
    folder, taken = None, None
    while (told := pipe.recv()) is not None:
        if told[0] != folder:
            folder, taken = told[0], None  # frees the old weights first
            taken = kinds[side](folder, len(cores))
        job = told[1]
        prepared = taken.prepare(batch_of(inputs, job.batch), job)
        began = time.perf_counter()
        tokens = taken.decode(job, *prepared)
        pipe.send((time.perf_counter() - began, [until_end(row) for row in tokens]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    pipe.send({"device": taken.device, "peak_gb": round(peak, 2)})


def measure_peak(cores: list[int]) -> float:
    """Returns the FLOP/s of a float32 matrix product on these cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    from dss.planning.hardware import matmul_peak

    return matmul_peak("float32")


def batch_of(inputs: list[list[int]], size: int) -> list[list[int]]:
    """Returns a batch from the middle of the inputs, which are sorted by length."""
    first = (len(inputs) - size) // 2
    return inputs[first : first + size]


def operations(config: T5Config, inputs: list[list[int]], job: Job) -> float:
    """Returns the FLOPs of decoding a batch to the last token."""
    lengths = np.array([len(row) for row in batch_of(inputs, job.batch)], float)
    outputs = job.batch * job.beams
    forward = forward_flops(
        config,
        lengths.sum(),
        outputs * job.length,
        (lengths**2).sum(),
        outputs * job.length**2 / 2,
        lengths.sum() * job.beams * job.length,
    )
    return forward.layers + forward.attention + forward.head


def measure(turns: list[tuple[Connection, Job]], folder: Path, repeats: int) -> list[dict]:
    """Returns the figures of calls that alternate."""
    seconds: list[list[float]] = [[] for _ in turns]
    tokens: list[list[list[int]]] = [[] for _ in turns]
    for _ in range(1 + repeats):
        for i, (pipe, job) in enumerate(turns):
            time.sleep(PAUSE)
            pipe.send((folder, job))
            taken, tokens[i] = pipe.recv()
            seconds[i].append(taken)
    return [
        {
            "seconds": (median := statistics.median(times[1:])),
            "outputs_per_second": job.batch / median,
            "mean_length": statistics.mean(map(len, rows)),
            "first_call_seconds": times[0],
            "all_seconds": times[1:],
            "tokens": rows,
        }
        for (_, job), times, rows in zip(turns, seconds, tokens, strict=True)
    ]


def compare(
    pipes: dict[str, Connection],
    root: Path,
    args: argparse.Namespace,
    student: T5Config,
    inputs: list[list[int]],
) -> dict:
    """Returns the figures of all sides, and the speedup of dss over each other one."""
    rows, ratios = [], {f"ratio_vs_{side}": {} for side in pipes if side != "dss"}
    for mode, batch, beams in itertools.product(MODES, args.batch, args.beams):
        job = Job(mode, batch, beams, args.length)
        measured = measure([(pipe, job) for pipe in pipes.values()], root / mode, args.repeats)
        tokens = [figures.pop("tokens") for figures in measured]
        ours = measured[0]["seconds"]  # dss is first if it is measured
        for side, figures, theirs in zip(pipes, measured, tokens, strict=True):
            row = {"side": side} | dataclasses.asdict(job) | figures
            if mode == "forced":
                row["operations_per_second"] = operations(student, inputs, job) / row["seconds"]
            if side == "dss":
                row["compile_seconds"] = max(figures["first_call_seconds"] - ours, 0.0)
            elif "dss" in pipes:
                row["ratio"] = ratios[f"ratio_vs_{side}"][job.name] = figures["seconds"] / ours
                equal = [a == b for a, b in zip(theirs, tokens[0], strict=True)]
                row["agreement"] = statistics.mean(equal)
            rows.append(row)
    return {"decoding": rows} | (ratios if "dss" in pipes else {})


def compare_scoring(pipe: Connection, root: Path, args: argparse.Namespace) -> list[dict]:
    """Returns the cost of label scoring by dss, against greedy generation."""
    rows = []
    for batch, (name, (labels, length)) in itertools.product(args.batch, LABELS.items()):
        jobs = {
            "scoring": Job("forced", batch, 1, length, labels),
            "greedy_forced": Job("forced", batch, 1, length),
            "greedy_natural": Job("natural", batch, 1, DecodingConfig().max_length),
        }
        turns = [(pipe, job) for job in jobs.values()]
        measured = dict(zip(jobs, measure(turns, root / "natural", args.repeats), strict=True))
        seconds = {f"{what}_seconds": figures["seconds"] for what, figures in measured.items()}
        row = {"labels": name, "candidates": labels, "length": length, "batch": batch} | seconds
        row["outputs_per_second"] = measured["scoring"]["outputs_per_second"]
        row["natural_mean_length"] = measured["greedy_natural"]["mean_length"]
        for what in ("greedy_forced", "greedy_natural"):
            row[f"ratio_vs_{what}"] = seconds[f"{what}_seconds"] / seconds["scoring_seconds"]
        rows.append(row)
    return rows


def show(result: dict) -> None:
    head = f"{'side':<13} {'batch':>5} {'beams':>5} {'mode':<8} {'seconds':>8} {'outputs/s':>9} "
    print(head + f"{'tokens':>6} {'of peak':>7} {'dss is':>7} {'agree':>6} {'compile':>8}")
    for row in result["decoding"]:
        line = f"{row['side']:<13} {row['batch']:>5} {row['beams']:>5} {row['mode']:<8} "
        line += f"{row['seconds']:>8.4f} {row['outputs_per_second']:>9.1f} "
        line += f"{row['mean_length']:>6.1f} "
        share = row.get("share_of_peak")
        line += f"{'':>7} " if share is None else f"{share:>7.0%} "
        if "ratio" in row:
            line += f"{row['ratio']:>6.2f}x {row['agreement']:>6.0%}"
        elif "compile_seconds" in row:
            line += f"{'':>14} {row['compile_seconds']:>7.1f}s"
        print(line.rstrip())
    for row in result.get("scoring", ()):
        print(
            f"{row['labels']}, {row['candidates']} labels of {row['length']} tokens, batch "
            f"{row['batch']}: {row['scoring_seconds']:.4f} s, {row['outputs_per_second']:.1f} "
            f"outputs/s; {row['ratio_vs_greedy_forced']:.2f} times as fast as greedy generation "
            f"of {row['length']} tokens, {row['ratio_vs_greedy_natural']:.2f} times as fast as "
            f"natural greedy generation ({row['natural_mean_length']:.1f} tokens)"
        )
    used = [
        f"{side} on {f['device']}, {f['peak_gb']:.2f} GB" for side, f in result["sides"].items()
    ]
    peak = f"peak {result['peak_gflops']:.0f} GFLOP/s"
    print("; ".join([*used, peak, result["machine"]]))
    print(", ".join(f"{name} {version}" for name, version in result["versions"].items()))


def choose_sides(asked: list[str] | None) -> list[str]:
    """Returns the requested sides, or all whose packages are installed."""
    sides = []
    for side in [side for side in SIDES if side in (asked or SIDES)]:
        missing = [p for p in SIDES[side] if importlib.util.find_spec(p) is None]
        remedy = f"not installed; pip install {' '.join(missing)}"
        if missing and asked:
            raise DssError(f"{side}: {remedy}")
        if missing:
            print(f"{side} is skipped: {remedy}")
        else:
            sides.append(side)
    return sides


def usable_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def check(args: argparse.Namespace) -> T5Config:
    """Returns the student; raises DssError on invalid arguments."""
    least = {"batch": 1, "beams": 1, "inputs": 2, "length": 1, "repeats": 1, "threads": 1}
    for name, bound in least.items():
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < bound:
            raise DssError(f"--{name}: {value}; at least {bound}")
    if args.threads > len(usable_cores()):
        raise DssError(f"--threads: {args.threads}; there are {len(usable_cores())} cores")
    if args.json and not args.json.absolute().parent.is_dir():
        raise DssError(f"--json: no folder {args.json.parent}")
    student = parse_gin([f"students/{args.student}.gin"], []).student
    assert student is not None
    if student.tied_embeddings:
        raise DssError(
            f"--student {args.student}: a T5 1.0, whose tied head has no EOS column to scale"
        )
    return student


def random_inputs(args: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    """Returns random inputs with a spread of lengths as CQA's, shortest first."""
    draw, mean = np.random.default_rng(0), args.inputs
    count = POOL * max(args.batch)
    lengths = np.clip(draw.normal(mean, mean / 5, count), mean / 2, 2 * mean).astype(int)
    return [[*draw.integers(3, vocab_size, n - 1).tolist(), EOS] for n in np.sort(lengths)]


def run(args: argparse.Namespace, student: T5Config, root: Path) -> dict:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, context
    ) as pool:  # in a process of its own, so that this one holds no model
        pool.submit(write_weights, root, student, "ctranslate2" in args.sides).result()
    inputs, cores = random_inputs(args, student.vocab_size), usable_cores()[: args.threads]
    with ProcessPoolExecutor(1, context) as pool:
        before = pool.submit(measure_peak, cores).result()
    pipes, processes = {}, []
    for side in args.sides:
        pipes[side], theirs = context.Pipe()
        target = (side, inputs, cores, theirs)
        processes.append(context.Process(target=serve, args=target, daemon=True))
        processes[-1].start()
        theirs.close()  # so that the pipe closes with the process
    result = compare(pipes, root, args, student, inputs)
    if "dss" in pipes:
        result["scoring"] = compare_scoring(pipes["dss"], root, args)
    result["sides"] = {}
    for side, pipe in pipes.items():
        pipe.send(None)
        result["sides"][side] = pipe.recv()
    for process in processes:
        process.join()
    with ProcessPoolExecutor(1, context) as pool:  # a second time, since speed varies
        peak = max(before, pool.submit(measure_peak, cores).result())
    for row in result["decoding"]:
        if "operations_per_second" in row:
            row["share_of_peak"] = row.pop("operations_per_second") / peak
    result["peak_gflops"] = peak / 1e9
    return result


def main() -> int:
    quiet_tpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--student", default="small", help="name of a file of gin/students/ (default: small)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 64], help="inputs per call")
    parser.add_argument(
        "--beams", type=int, nargs="+", default=[1, 4], help="beam sizes; 1 is greedy"
    )
    parser.add_argument("--inputs", type=int, default=48, help="mean input length, tokens")
    parser.add_argument("--length", type=int, default=32, help="maximum output length, tokens")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls, after a first one")
    parser.add_argument(
        "--threads", type=int, default=len(usable_cores()), help="threads of each side"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default: all that are installed")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    try:
        student = check(args)
        args.sides = choose_sides(args.sides)
    except DssError as error:
        print(f"decode: {error}", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as root:
            result = run(args, student, Path(root))
    except EOFError:
        print("decode: a side has ended; its output is above", file=sys.stderr)
        return 1
    options = ("student", "batch", "beams", "inputs", "length", "repeats", "threads")
    packages = dict.fromkeys(p for side in args.sides for p in SIDES[side])
    result |= {name: getattr(args, name) for name in options} | {
        "machine": f"{args.threads} of {os.cpu_count()} cores, {platform.machine()}",
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

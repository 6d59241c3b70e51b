"""Fixtures: the shared real data, a toy dataset, tiny students, eight simulated devices."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

with contextlib.suppress(ImportError):
    import triton  # noqa: F401  CUDA builds of torch bring it; after TensorFlow it would crash

import jax
import pytest
from xdist.scheduler import LoadScopeScheduling

from dss.cli.options import quiet_tpu
from dss.data.datasets import Dataset
from dss.data.released import RELEASED
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh
from dss.student.config import T5Config

os.environ["HF_HUB_OFFLINE"] = "1"
# Programs of tests run for milliseconds and compile for seconds; train and eval steps are compiled
# with options of their own.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ["DSS_CACHE"] = tempfile.mkdtemp(prefix="dss-test-cache-")
quiet_tpu()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.environ["DSS_CACHE"] + "/compiled")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("DSS_SHARED", ROOT.parent / "shared"))
QUESTIONS = ("sum", "difference")


def pytest_collection_modifyitems(items):
    """Marks end-to-end tests slow, and puts them first.

    So no long one begins while the other process of pytest-xdist has nothing left.
    """
    for item in items:
        if "end_to_end" in item.path.parts:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)


class _Scheduling(LoadScopeScheduling):
    """Deals end-to-end tests to processes function by function, all others file by file.

    Files whose fixtures take long stay whole too.
    """

    WHOLE = ("test_layouts", "test_notebook", "test_readme")

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if "/end_to_end/" not in file or Path(file).stem in self.WHOLE:
            return file
        return nodeid.partition("[")[0]


def pytest_xdist_make_scheduler(config, log):
    return _Scheduling(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The released data, the T5 vocabulary and what the reference computes from them."""
    if not SHARED.is_dir():
        message = f"no shared data at {SHARED}; set DSS_SHARED"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return SHARED


@pytest.fixture
def data_root(shared, monkeypatch):
    """The real data, made the data root for a test."""
    monkeypatch.setenv("DSS_DATA_ROOT", str(shared / "data" / "datasets"))
    return shared / "data" / "datasets"


@pytest.fixture(scope="session")
def vocab_path(shared) -> Path:
    return shared / "data" / "vocab" / "t5_cc_all_32000.model"


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory) -> Path:
    """A user's dataset `toy`: 40 + 8 + 8 examples, labels yes and no, a teacher `rules`."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    for split, count in (("train", 40), ("valid", 8), ("test", 8)):
        examples, outputs = [], []
        for i in range(count):
            label = "yes" if i % 3 else "no"
            examples.append({"id": f"{split}-{i}", "input": f"is {i} good", "label": label})
            outputs.append(
                {"id": f"{split}-{i}", "rationale": f"{i} is {i % 3} mod 3", "label": label}
            )
        write_jsonl(folder / f"{split}.jsonl", examples)
        write_jsonl(folder / f"{split}.rules.jsonl", outputs)
    return folder


@pytest.fixture
def toy(toy_folder):
    """The toy dataset."""
    return Dataset.from_files(toy_folder, name="toy", labels=("yes", "no"))


RELEASED_ROWS = {
    "cqa": lambda i: {"question": f"q{i}?", "choices": list("vwxyz"), "answer": "vwxyz"[i % 5]},
    "svamp": lambda i: {"input": f"{i} and {i}\nSum?", "label": f"( {i}.0 + {i}.0 )"},
    "asdiv": lambda i: {"Body": f"{i} and 1.", "Question": "Sum?", "Answer": f"{i + 1} (apples)"},
    "esnli": lambda i: {"premise": f"p{i}", "hypothesis": "h", "label": i % 3},
    "anli1": lambda i: {"premise": f"p{i}", "hypothesis": "h", "label": i % 3},
}
RELEASED_TEXTS = {
    "cqa": lambda i: (
        f"Reason {i}. So the answer is ({'abcde'[i % 5]}) {'vwxyz'[i % 5]}.\n\nQ: more"
    ),
    "svamp": lambda i: f"Add {i}. The answer is ({i} + {i}).\n\nQ: more",
    "asdiv": lambda i: f"Add {i}. The answer is ({i} + 1).\n\nQ: more",
    "esnli": lambda i: f"Reason {i}.\nAnswer: neutral\n\nPremise: more",
    "anli1": lambda i: f"Reason {i}. So the answer is neutral.\n\nPremise: more",
}


@pytest.fixture(scope="session")
def small_root(tmp_path_factory) -> Path:
    """All five datasets in the released layout, 20 rows a split."""
    root = tmp_path_factory.mktemp("released")
    for name in RELEASED:
        splits = ("train", "valid", "test") if name in ("esnli", "anli1") else ("train", "test")
        for split in splits:
            write_jsonl(
                root / name / f"{name}_{split}.json", [RELEASED_ROWS[name](i) for i in range(20)]
            )
            texts = [RELEASED_TEXTS[name](i) for i in range(20)]
            llm = root / name / "llm"
            llm.mkdir(exist_ok=True)
            (llm / f"{split}_CoT_0.json").write_text(json.dumps(texts[:12]))
            (llm / f"{split}_CoT_1.json").write_text(json.dumps(texts[12:]))
            neox = root / "gpt-neox" / name
            neox.mkdir(parents=True, exist_ok=True)
            (neox / f"{split}.json").write_text(json.dumps([" " + text for text in texts]))
    return root


def tiny_config(**changes) -> T5Config:
    """A byte-level student that compiles in seconds."""
    values = {
        "vocab_size": 384,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_heads": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "dropout_rate": 0.0,
    }
    return T5Config(**(values | changes))


@pytest.fixture(scope="session")
def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])

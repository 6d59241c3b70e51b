"""Packaging of dss: the library, the SeqIO tasks and the gin files."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / "dss" / "__init__.py").read_text().split('__version__ = "')[1].split('"')[0]

BEAM = [
    "apache-beam>=2.77",
    "google-crc32c>=1.9",  # with which Beam writes TFRecords, as seqio_cache_tasks has it do
    "sentencepiece<0.2.2",  # Beam holds protobuf below 7, which newer ones were generated for
]
# tensorflow-text, which SeqIO needs, requires the full `tensorflow`: `tensorflow-cpu` would install
# the same files beside it.
TENSORFLOW = [
    "tensorflow>=2.21",
    "tensorflow-datasets>=4.9.10",
    "importlib_resources>=6.5",  # tensorflow-datasets needs it to load a builder
]
SEQIO = [*TENSORFLOW, "seqio>=0.0.20", "clu>=0.0.12"]
TFDS = [*TENSORFLOW, *BEAM, "mlcroissant>=1.1"]  # the `tfds` command needs the last two to start
EXPORT = ["transformers>=5.23", "torch>=2.13", "ctranslate2>=4.8"]
GCS = ["gcsfs>=2026.9"]

# The gin files live in gin/ (which is no Python package: `import gin` means gin-config) and are
# installed as the data of dss.configs, where dss.paths finds them from any directory. tasks/ is
# installed as dss.tasks, which no tasks.py of a user's hides.
setup(
    name="dss",
    version=VERSION,
    description="Distilling step-by-step: small T5 students from large language models, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["dss", "dss.*"]), "dss.configs", "dss.tasks"],
    package_dir={"dss.configs": "gin", "dss.tasks": "tasks"},
    package_data={
        "dss": ["py.typed"],
        "dss.configs": ["**/*.gin"],
        "dss.teacher": ["prompts/*.yaml", "report.html"],
        "dss.reporting": ["report.html"],
        "dss.serving": ["page.html"],
    },
    entry_points={"console_scripts": ["dss = dss.cli.main:main"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "absl-py>=2.5",
        "gin-config>=0.5.0",
        "numpy>=2.4",
        "scipy>=1.17",
        "safetensors>=0.8",
        "sentencepiece>=0.2.1",
        "protobuf>=6.31",  # sentencepiece_model_pb2 imports it
        "huggingface_hub>=2.4",
        "tensorstore>=0.1.86",
        "etils[epath]>=1.15",
        "rich>=15.0",
        "rouge-score>=0.1.2",
        "tensorboardX>=2.6.4",  # not clu, whose metric writers import TensorFlow
    ],
    extras_require={
        "tables": [
            "pandas>=3.0",
            "pyarrow>=25.0",
            "openpyxl>=3.1",
            "xlsxwriter>=3.2",
            "datasets>=5.2",
            "datasketch>=2.0",  # near-duplicates
        ],
        "teacher": [
            "openai>=3.57",
            "httpx2>=2.16",
            "jinja2>=3.1.6",
            "pyyaml>=6.0.3",
            "pyarrow>=25.0",
            "regex>=2026.11",
        ],
        "beam": BEAM,
        "report": ["matplotlib>=3.11", "jinja2>=3.1.6"],
        "export": EXPORT,
        "serve": [
            "fastapi>=0.165",
            "starlette>=1.10",
            "uvicorn>=0.54",
            "prometheus-client>=0.26",
            "pydantic>=2.14",
        ],
        "seqio": SEQIO,
        "tfds": TFDS,
        "gcs": GCS,  # gs:// paths, where TensorFlow, which can read them, is not installed
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]>=0.10.2"],
        "docs": ["mkdocs>=1.6.1,<2", "mkdocs-material>=9.8", "mkdocstrings[python]>=1.0.8"],
        "test": [
            "build>=1.6",
            "hypothesis>=6.170",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.15",
            "mypy>=2.4",
            "selenium>=4.51",  # drives the browser that the report is tested in
            *SEQIO,
            *TFDS,
            *GCS,
            "dill>=0.4",  # TFDS's own test of builders needs it
            "transformers[serving]>=5.23",
            "torch==2.13.0",
            "ctranslate2>=4.8",
            "libtpu",  # the TPU's compiler, which `dss plan` asks; it needs no TPU
            "gcp-storage-emulator>=2026.7",
            "nbclient>=0.11",
            "ipykernel>=7.4",
        ],
    },
)

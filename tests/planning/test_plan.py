import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys

import jax
import pytest
from jax.errors import JaxRuntimeError

from dss.batches.batches import Batches
from dss.batches.order import paired_order
from dss.cli.main import main
from dss.config.experiment import DataConfig, Experiment
from dss.config.gin_files import parse_gin
from dss.errors import DssError
from dss.parallel.config import MeshConfig
from dss.parallel.mesh import make_mesh
from dss.paths import gin_root
from dss.planning import hardware
from dss.planning.hardware import Accelerator, find_accelerator, planned_devices
from dss.planning.plan import Planner, _required_bytes, abstract_batch, plan
from dss.planning.typical import typical_store
from dss.student.network import num_parameters
from dss.training.config import OptimizerConfig
from dss.training.loss import CHUNK_SLOTS
from tests.conftest import ROOT, tiny_config

pytestmark = pytest.mark.slow

FSDP = (("embed", "data"), ("vocab", "model"), ("heads", "model"), ("mlp", "model"))
STUDENTS = sorted(path.stem for path in (gin_root() / "students").glob("*.gin"))
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler"
)


@pytest.fixture
def chip(monkeypatch):
    """Registers an accelerator, `toy`, with the given usable bytes."""

    def make(usable):
        toy = Accelerator(
            name="toy",
            memory=2 * usable,
            usable=usable,
            reserve="half of it",
            flops={"float32": 1e12, "bfloat16": 2e12},
            mfu=0.5,
            links=1e9,
        )
        monkeypatch.setitem(hardware.ACCELERATORS, "toy", toy)

    return make


def tiny(**values) -> Experiment:
    values = {
        "student": tiny_config(),
        "dropout_rate": 0.0,
        "mesh": MeshConfig(data=2, model=2),
    } | values
    return Experiment(**values)


@pytest.mark.parametrize(
    "student",
    [
        pytest.param(name, marks=() if name == "small" else pytest.mark.exhaustive)
        for name in STUDENTS
    ],
)
def test_every_student_compiles_on_eight_devices(student):
    flags = [
        "MeshConfig.data=4",
        "MeshConfig.model=2",
        f"MeshConfig.rules={FSDP}",
        "Experiment.remat='full'",
        "BATCH_SIZE=8",
        "DROPOUT_RATE=0",
    ]
    experiment = parse_gin([f"students/{student}.gin", "runs/adafactor.gin"], flags)
    found = plan(experiment, "h100", largest=False)
    assert found.parameters == num_parameters(experiment.student)
    assert found.memory.parameters == pytest.approx(4 * found.parameters / 8, rel=0.01)
    assert found.memory.optimizer < 0.04 * found.memory.parameters  # factored for all matrices
    assert found.memory.temporary > found.memory.parameters  # gradients and more
    assert found.work.useful < found.work.computed < 2 * found.work.useful
    assert found.computing_seconds == pytest.approx(found.work.useful / (8 * 494e12 * 0.4))
    assert found.sending_seconds == pytest.approx(sum(c.sent for c in found.exchanges) / 450e9)
    # Kernels are gathered in both passes and gradients reduced: a few times the memory of a device.
    assert 4 < sum(c.sent for c in found.exchanges) / found.memory.parameters < 40
    assert found.fits


def plan_without_libtpu(file, *options):
    """Plans in a subprocess, with any number of devices and without the slow TPU compiler."""
    code = (
        "import sys, importlib.util as util\n"
        "from dss.cli.main import main\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'libtpu' else find(name)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "plan", *options, "--quick", f"--json={file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


LARGEST = [
    "--gin_file=layouts/two_d.gin",
    "--gin_file=runs/adafactor.gin",
    "--gin.Experiment.dtype=bfloat16",
    "--gin.Experiment.remat=full",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "accelerator", "data", "model"),
    [
        pytest.param("xxl", "v4", 4, 4, marks=pytest.mark.exhaustive),
        pytest.param("xxl", "v5p", 4, 2, marks=pytest.mark.exhaustive),
        ("xxl", "h100", 4, 2),
        pytest.param("base", "h100", 8, 4, marks=pytest.mark.exhaustive),
    ],
    ids=["xxl on a v4-32", "xxl on a v5p-16", "xxl on 8 h100", "base on 32 h100"],
)
def test_large_students_fit_on_their_meshes_by_the_cpus_compiler(
    student, accelerator, data, model, tmp_path
):
    options = [f"--student={student}", f"--accelerator={accelerator}", *LARGEST]
    mesh = f"--mesh=data={data},model={model}"
    found = plan_without_libtpu(tmp_path / "plan.json", *options, mesh)
    assert found["compiler"].startswith("the CPU's compiler")
    assert found["fits"]
    assert found["exchanges"]
    # Parameters are float32; all are sharded but the few relative position biases.
    part = 4 * found["parameters"] / (data * model)
    assert part <= found["memory"]["parameters"] < 1.001 * part


def test_xxls_program_has_no_array_of_all_slots_and_the_vocabulary():
    """Compiled on a mesh of 4x2, where each data shard has three chunks of slots."""
    files = ["students/xxl.gin", "layouts/two_d.gin", "runs/adafactor.gin"]
    flags = ["MeshConfig.data=4", "MeshConfig.model=2", "Experiment.remat=full", "BATCH_SIZE=256"]
    experiment = parse_gin(files, flags)
    config = experiment.resolve_student(experiment.student)
    store = typical_store(config.vocab_size)
    planner = Planner(experiment, config, store, jax.devices()[:8], num_steps=32)
    batch = abstract_batch(planner.batches(256), planner.mesh)
    slots = batch.decoder_target_tokens.shape[1]
    assert 2 * CHUNK_SLOTS < slots <= 3 * CHUNK_SLOTS
    text = planner.lower(batch).compile(compiler_options=planner.options).as_text()
    others = set()  # number of elements per vocabulary entry, of arrays with a vocabulary axis
    for shape in set(re.findall(r"\w\[([\d,]+)\]", text)):
        sizes = [int(size) for size in shape.split(",")]
        vocabulary = {config.vocab_size, config.vocab_size // 2} & set(sizes)
        if vocabulary:
            others.add(math.prod(sizes) // vocabulary.pop())
    chunk = -(-slots // 3)
    width = config.d_model
    assert others == {1, chunk, width, width // 4}  # logits of a chunk; the head and its shard


@pytest.mark.parametrize("starts", [None, (0, 9)], ids=["apart", "one encoder pass"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_abstract_batch_has_the_shapes_of_a_real_batch(packed, starts):
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    store = typical_store(384)
    order = paired_order(store, 8, 0)
    batches = Batches(store, order, num_steps=3, packed=packed, groups=2, starts=starts)
    abstract = abstract_batch(batches, mesh)
    real = [batches[step] for step in range(3)]
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), batch) for batch in real]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) in shapes


@pytest.mark.exhaustive
def test_one_encoder_pass_takes_less_memory_and_flops(chip):
    chip(40e6)
    once = DataConfig(one_encoder_pass=True)
    apart, together = (
        plan(tiny(batch_size=32, **options), "toy", largest=False)
        for options in ({}, {"data": once})
    )
    assert together.work.input_tokens == pytest.approx(apart.work.input_tokens / 2)
    assert together.work.target_tokens == apart.work.target_tokens
    for name in ("useful", "computed"):
        assert getattr(together.work, name) < 0.8 * getattr(apart.work, name)
    assert together.memory.temporary < apart.memory.temporary


def test_the_largest_batch_fits_and_uses_most_of_the_memory(chip):
    chip(40e6)
    found = plan(tiny(batch_size=32), "toy")
    assert found.fits
    assert found.largest_batch > 32
    assert 0.9 * 40e6 < found.largest_bytes <= 40e6
    assert found.largest_batch % 2 == 0  # data shards
    assert found.mfu == 0.5
    assert found.memory.optimizer == pytest.approx(2 * found.memory.parameters, rel=0.01)


def test_a_batch_that_does_not_fit_gets_advice_and_a_batch_that_does(chip):
    chip(6e6)
    found = plan(tiny(batch_size=256), "toy")
    assert not found.fits
    assert 0 < found.largest_batch < 256
    advice = " ".join(found.advice)
    for change in (
        "layouts/two_d.gin",
        "remat=full",
        "dtype=bfloat16",
        "adafactor",
        "microbatches",
    ):
        assert change in advice


def test_the_advice_for_a_student_that_cannot_fit_is_a_number_of_devices(chip):
    chip(1000)
    levers = {
        "mesh": MeshConfig(data=2, model=2, rules=FSDP),
        "optimizer": OptimizerConfig(name="adafactor"),
        "remat": "full",
        "dtype": "bfloat16",
    }
    found = plan(tiny(batch_size=2, **levers), "toy")
    assert found.largest_batch is None
    (advice,) = found.advice
    assert "or more" in advice


def test_lengths_are_those_of_the_data_if_given(toy_folder, chip):
    chip(1e9)
    data = dataclasses.replace(
        Experiment().data, dataset_path=str(toy_folder), labels=("yes", "no")
    )
    experiment = tiny(batch_size=8, data=data, vocabulary="bytes", mixture="toy_step_by_step_rules")
    found = plan(experiment, "toy", largest=False)
    assert found.lengths == "toy_step_by_step_rules's"
    # "predict: is 17 good" and EOS, "explain: ..."; label and "17 is 2 mod 3".
    assert found.work.input_tokens == pytest.approx(8 * 2 * 19.75, rel=0.02)
    given = plan(experiment, "toy", tokens=(100, 20), largest=False)
    assert given.lengths == "as given"
    assert given.work.input_tokens == pytest.approx(8 * 2 * 100, rel=0.05)


def test_a_missing_student_mesh_or_accelerator_is_an_error():
    with pytest.raises(DssError, match="no student"):
        plan(Experiment(), "h100")
    with pytest.raises(DssError, match="no mesh"):
        plan(tiny(mesh=MeshConfig()), "h100")
    with pytest.raises(
        DssError, match="unknown accelerator 'h10'; known: v4, v5p, h100, h200, cpu"
    ):
        plan(tiny(), "h10")
    with pytest.raises(DssError, match="JAX has already created 8"):
        planned_devices(find_accelerator("h100", 9), 9)


def test_simulated_devices_share_this_machines_memory():
    one, four = find_accelerator("cpu", 1), find_accelerator("cpu", 4)
    assert one.memory == 4 * four.memory
    assert one.usable < one.memory
    assert 1e9 < one.flops["float32"] < 1e14


def test_the_time_of_a_step_is_with_full_and_without_overlap_of_communication(chip):
    chip(1e9)
    found = plan(tiny(batch_size=8), "toy", largest=False)
    computing, sending = found.computing_seconds, found.sending_seconds
    assert sending == pytest.approx(sum(c.sent for c in found.exchanges) / 1e9)
    assert found.step_seconds == (max(computing, sending), computing + sending)
    steps = tiny().trainer.train_steps
    assert found.run_seconds == tuple(steps * seconds for seconds in found.step_seconds)
    alone = plan(tiny(batch_size=8, mesh=MeshConfig(data=1)), "toy", largest=False)
    assert alone.exchanges == ()
    assert alone.step_seconds == (alone.computing_seconds, alone.computing_seconds)


def test_a_program_that_cannot_be_read_is_compiled_for_the_cpu_to_find_collectives(
    monkeypatch, chip
):
    chip(1e9)
    readable = plan(tiny(batch_size=8), "toy", largest=False)
    lower, hidden = Planner.lower, []

    def unreadable_at_first(self, batch):
        lowered = lower(self, batch)
        if hidden:
            return lowered

        class Unreadable:
            def compile(self, **options):
                return self

            def memory_analysis(self):
                return lowered.compile().memory_analysis()

            def as_text(self):
                hidden.append(True)
                raise JaxRuntimeError("INTERNAL: async-update instruction")

        return Unreadable()

    monkeypatch.setattr(Planner, "lower", unreadable_at_first)
    lines = []
    found = plan(tiny(batch_size=8), "toy", largest=False, report=lines.append)
    assert hidden
    assert found.exchanges == readable.exchanges
    assert lines[-1].endswith("to find collectives")


def test_shards_without_examples_are_reported(capsys):
    options = ["--student=tiny", "--accelerator=h100", "--quick", "--mesh=data=8"]
    for batch_size, message in (
        (2, "too few examples for 8 parts, one per data shard and microbatch: 4 are empty"),
        (4, "4 examples in 1 microbatch(es), "),  # two sequences per example, one per shard
    ):
        assert main(["plan", *options, f"--gin.BATCH_SIZE={batch_size}"]) == 0
        printed = capsys.readouterr().out
        assert message in printed
        assert ("too few" in printed) == (batch_size == 2)


def test_empty_parts_of_unpacked_batches_are_counted(chip):
    chip(1e9)
    apart = DataConfig(packed=False)
    found = plan(tiny(batch_size=1, data=apart, microbatches=2), "toy", largest=False)
    assert (found.work.parts, found.work.empty_parts) == (4, 2)


@pytest.mark.exhaustive
def test_the_mesh_of_gin_is_planned_unless_a_flag_overrides_it(capsys):
    options = ["--student=tiny", "--accelerator=h100", "--quick", "--gin.MeshConfig.model=2"]
    for mesh, sizes in (([], "data=1, model=2"), (["--mesh=data=2"], "data=2, model=1")):
        assert main(["plan", *options, *mesh]) == 0
        assert f" h100, {sizes}" in capsys.readouterr().out


@needs_libtpu
@pytest.mark.parametrize("chips", [1, 2, 4, 8, 16, 32, 64])
def test_tpus_come_in_slices(chips):
    devices, compiler = planned_devices(find_accelerator("v5p", chips), chips)
    assert len(devices) == chips
    assert compiler == "the TPU's own compiler"


@needs_libtpu
def test_a_slice_has_a_power_of_two_chips():
    with pytest.raises(DssError, match="12 v4 chips: the number must be a power of two"):
        planned_devices(find_accelerator("v4", 12), 12)


@needs_libtpu
def test_the_tpus_compiler_compiles_the_step(tmp_path):
    file = tmp_path / "plan.json"
    code = "import sys; from dss.cli.main import main; sys.exit(main(sys.argv[1:]))"
    options = ["--student=tiny", "--mesh=data=2,model=2", "--accelerator=v4", "--quick"]
    flags = [f"--gin.MeshConfig.rules={FSDP}", "--gin.Experiment.dtype=bfloat16"]
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", *options, *flags, f"--json={file}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "compiling a batch of 64 with the TPU's own compiler ...\n"
    assert "mesh: 4 v4, data=2, model=2" in done.stdout
    found = json.loads(file.read_text())
    assert found["fits"]
    assert found["memory"]["total"] < 1e9


def test_the_memory_of_a_program_is_parsed_from_the_tpus_out_of_memory_error():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (52.98G) exceeds available HBM (30.75G). HLO module: jit_f."
    )
    assert _required_bytes(message) == int(52.98 * 2**30)
    assert _required_bytes("RESOURCE_EXHAUSTED: something else") > 2**60

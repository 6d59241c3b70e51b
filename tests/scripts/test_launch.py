"""The launchers, run as they are, with fakes of what belongs to the cloud and the cluster."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.xm_launch import MACHINES, VERTEX_NAMES, choose_machine
from tests.conftest import ROOT

TRAIN = [
    "--gin_file=datasets/cqa.gin",
    "--gin_file=methods/step_by_step.gin",
    "--gin.MODEL_DIR=gs://bucket/it's a run",
    "--gin.DATASET_LABELS=('yes', 'no')",
    '--gin.VOCABULARY="$HOME/`x`\\n"',
    "--gin.TEACHER=two\nlines & a # no comment",
    "",
]
PYTHON = f"#!{sys.executable} -IS\n"
RECORD = (
    PYTHON
    + """import json, os, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
"""
)
DSS = (
    RECORD
    + """
import pathlib, time
stop = pathlib.Path.home() / "stop"
while os.environ.get("DSS_WAITS") and not stop.exists():
    time.sleep(0.01)
print("dss was here")
sys.exit(int(os.environ.get("DSS_STATUS", 0)))
"""
)
# Two workers, each a folder that is its home. A queued resource is ACTIVE when asked for the second
# time.
GCLOUD = (
    RECORD
    + """
import shutil, subprocess
group, verb, *rest = sys.argv[3:]
words = [a for a in rest if not a.startswith("--")]
flags = dict(a[2:].split("=", 1) for a in rest if a.startswith("--") and "=" in a)
homes = [os.path.join(os.environ["WORKERS"], n) for n in ("0", "1")]
if flags.get("worker", "all") != "all":
    homes = [homes[int(flags["worker"])]]
for home in homes:
    if verb == "ssh":
        env = {**os.environ, "HOME": home}
        status = subprocess.run(["bash", "-c", flags["command"]], env=env, cwd=home).returncode
        if status:
            sys.exit(status)
    elif verb == "scp":
        source, target = (os.path.join(home, w.split(":")[1]) if ":" in w else w for w in words)
        shutil.copy(source, target)
if verb == "describe" and group == "tpu-vm":
    print(2)
elif flags.get("format") == "value(state.state)":
    first = open(os.environ["CALLS"]).read().count("state.state") == 1
    print(os.environ.get("STATE", "WAITING_FOR_RESOURCES" if first else "ACTIVE"))
elif verb == "describe":
    print(os.environ.get("NODES", "cqa"))
"""
)
# As the real one calls them: pip makes uv, uv a virtual environment, its pip the command dss.
PYTHON3 = """#!/usr/bin/env bash
mkdir -p ~/.local/bin && cp "$FAKES/uv" ~/.local/bin/uv
"""
UV = """#!/usr/bin/env bash
[[ "$*" == "venv --quiet --seed --python 3.11 $HOME/dss/venv" ]] || exit 1
mkdir -p ~/dss/venv/bin && cp "$FAKES/pip" ~/dss/venv/bin/pip
"""
PIP = """#!/usr/bin/env bash
[[ "$*" == "install --quiet .[tpu,gcs]" && -f setup.py && ! -e .git ]] || exit 1
cp "$FAKES/dss" ~/dss/venv/bin/dss
"""
# Runs the command after its own options, as one process.
SRUN = (
    RECORD
    + """
import subprocess
first = next(i for i, a in enumerate(sys.argv) if i and not a.startswith("--"))
sys.exit(subprocess.run(sys.argv[first:]).returncode)
"""
)
SBATCH = RECORD + "open(os.environ['CALLS'] + '.script', 'w').write(sys.stdin.read())\n"
SQUEUE = RECORD + "print(os.environ.get('JOB_STATE', 'RUNNING'))\n"


class Place:
    """A machine to launch from: fakes first on PATH, and what was called."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.workers = folder / "workers"
        for worker in "01":
            (self.workers / worker).mkdir(parents=True)
        self.fakes = folder / "bin"
        self.fakes.mkdir()
        self.env = os.environ | {
            "PATH": f"{self.fakes}:{os.environ['PATH']}",
            "CALLS": str(folder / "calls"),
            "WORKERS": str(self.workers),
            "FAKES": str(self.fakes),
        }
        self.fake("sleep", "#!/bin/sh\nexec /bin/sleep 0.01\n")

    def fake(self, name: str, text: str) -> None:
        (self.fakes / name).write_text(text)
        (self.fakes / name).chmod(0o755)

    def run(self, *command: str, **kwargs) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, **kwargs
        )

    def script(self, name: str, *args: str, status: int = 0) -> str:
        done = self.run(str(ROOT / "scripts" / name), *args)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def calls(self, name: str) -> list[list[str]]:
        file = Path(self.env["CALLS"])
        lines = file.read_text().splitlines() if file.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == name]


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("script", "args", "said"),
    [
        ("tpu_vm.sh", [], "no command; give"),
        ("tpu_vm.sh", ["start", "--name=n", "--zone=z"], "unknown command 'start'"),
        ("tpu_vm.sh", ["create", "--network", "n", "--zone=z"], "are given as --OPTION=VALUE"),
        ("tpu_vm.sh", ["delete", "--name=n", "--zone=z", "--spot"], "unknown option --spot"),
        ("tpu_vm.sh", ["create", "--name=n", "--zone=z", "--slices=x"], "--slices is x"),
        ("tpu_vm.sh", ["delete", "--zone=z"], "--name is missing"),
        ("tpu_vm.sh", ["delete", "--name=a b", "--zone=z"], "--name is 'a b'"),
        ("tpu_vm.sh", ["delete", "--name=n"], "--zone is missing"),
        ("tpu_vm.sh", ["delete", "--name", "--zone=z"], "--name needs a value"),
        ("tpu_vm.sh", ["delete", "--name=n", "--zon=z"], "--zone is missing"),
        ("tpu_vm.sh", ["create", "--name=n", "--zone=z"], "create needs --type"),
        ("tpu_vm.sh", ["run", "--name=n", "--zone=z", "--"], "nothing to train"),
        ("tpu_vm.sh", ["run", "--name=n", "--zone=z", "--", "dss"], "without 'dss train'"),
        ("tpu_vm.sh", ["logs", "--name=n", "--zone=z", "--", "--x"], "for the command run"),
        ("slurm_gpu.sh", ["--nodes=2"], "nothing to train"),
        ("slurm_gpu.sh", ["--gpus=2", "--", "--x"], "unknown option --gpus"),
        ("slurm_gpu.sh", ["--nodes=0", "--", "--x"], "--nodes is 0"),
        ("slurm_gpu.sh", ["--job-name=a b", "--", "--x"], "--job-name is 'a b'"),
        ("slurm_gpu.sh", ["dss", "train"], "unexpected 'dss'"),
        ("xm_launch.py", ["--executor=local", "--", "--x"], "required: --name"),
        ("xm_launch.py", ["--executor=local", "--name=n"], "nothing to train"),
        ("xm_launch.py", ["--executor=local", "--name=n", "--", "dss"], "without 'dss train'"),
        ("xm_launch.py", ["--executor=slurm", "--name=n", "--", "--x"], "invalid choice: 'slurm'"),
        ("xm_launch.py", ["--executor=local", "--name=n", "--gpus=1", "--", "--x"], "--gpus=1"),
        (
            "xm_launch.py",
            ["--executor=local", "--name=n", "--accelerator=a100=8", "--", "--x"],
            "local_gpu=COUNT only",
        ),
        (
            "xm_launch.py",
            ["--executor=vertex", "--name=n", "--accelerator=a100", "--", "--x"],
            "'a100': give NAME=COUNT",
        ),
        (
            "xm_launch.py",
            ["--executor=local", "--name=n", "--cpu=8", "--", "--x"],
            "--cpu, --memory: a local container has those of this machine",
        ),
        (
            "xm_launch.py",
            ["--executor=vertex", "--name=n", "--memory=1G", "--", "--x"],
            "--memory: '1G': give a whole number",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(place, script, args, said):
    done = place.run(str(ROOT / "scripts" / script), *args)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: ")
    assert said in line


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm_gpu.sh", "xm_launch.py"])
def test_help_names_the_dry_run(place, script):
    assert "--dry-run" in place.script(script, "--help")


def test_the_commands_of_the_docs_are_understood(place):
    text = (ROOT / "docs" / "launching.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^    (?:python )?(scripts/\S+)(.*)", text, re.MULTILINE)
    assert len(commands) == 8
    for script, args in commands:
        place.run(
            "bash", "-euc", f"DATA=data USER=me; {ROOT}/{script} --dry-run {args}", check=True
        )


class TestTpuVm:
    @pytest.fixture
    def place(self, place):
        fakes = {"gcloud": GCLOUD, "python3": PYTHON3, "uv": UV, "pip": PIP, "dss": DSS}
        for name, text in fakes.items():
            place.fake(name, text)
        return place

    def tpu(self, place, *args: str, status: int = 0) -> str:
        return place.script("tpu_vm.sh", *args, "--name=cqa", "--zone=z", status=status)

    def test_a_dry_run_calls_nothing_and_its_text_is_what_a_run_does(self, place):
        commands = ["create", "install", "run", "wait", "logs", "delete"]
        options = ["--name", "cqa", "--zone", "us-central2-b", "--project", "p", "--type", "v4-16"]
        options += ["--version=tpu-ubuntu2204-base", "--spot"]
        text = place.script("tpu_vm.sh", *commands, *options, "--dry-run", "--", *TRAIN)
        assert not Path(place.env["CALLS"]).exists()

        place.run("bash", "-euo", "pipefail", "-c", text, check=True)
        printed = place.calls("gcloud")
        (place.folder / "calls").unlink()
        place.script("tpu_vm.sh", *commands, *options, "--", *TRAIN)
        done = place.calls("gcloud")

        def comparable(calls):
            """The archive has another name each time, and `wait` asks as often as it must."""
            calls = [[a for a in call if not a.startswith("/")] for call in calls]
            return [call for call, _ in itertools.groupby(calls)]

        assert comparable(printed) == comparable(done)
        where = ["--zone=us-central2-b", "--project=p"]
        queued = ["compute", "tpus", "queued-resources"]
        create = ["--runtime-version=tpu-ubuntu2204-base", "--accelerator-type=v4-16"]
        assert done[0] == [*queued, "create", "cqa", *create, "--node-id=cqa", *where, "--spot"]
        assert done[-1] == [*queued, "delete", "cqa", "--force", "--quiet", *where]
        assert all(set(call) >= set(where) for call in done)
        assert place.calls("dss") == [["train", *TRAIN]] * 2
        for worker in "01":
            log = place.folder / "logs" / "cqa" / f"cqa-worker-{worker}.log"
            lines = ["dss was here", "dss train ended with exit status 0"]
            assert log.read_text().splitlines() == lines * 2  # one log, whoever started it

    def test_a_run_outlives_the_connection_and_is_not_started_twice(self, place):
        self.tpu(place, "install")
        place.env["DSS_WAITS"] = "1"
        run = ["run", "--name=cqa", "--zone=z", "--", "--gin.X=1"]
        place.script("tpu_vm.sh", *run)  # returns, though dss does not
        pids = [wait_for(place.workers / n / "dss" / "train.pid") for n in "01"]
        done = place.run(str(ROOT / "scripts" / "tpu_vm.sh"), *run)
        assert done.returncode == 1
        assert f"running already, process {pids[0]}" in done.stderr

        os.kill(pids[0], signal.SIGTERM)
        (place.workers / "1" / "stop").touch()
        self.tpu(place, "wait")
        shown = self.tpu(place, "logs").splitlines()
        assert shown == [
            "logs/cqa/cqa-worker-0.log: dss train ended with exit status 143",
            "logs/cqa/cqa-worker-1.log: dss train ended with exit status 0",
        ]

    def test_what_fails_ends_the_list_of_commands(self, place):
        done = place.run(
            str(ROOT / "scripts" / "tpu_vm.sh"), "logs", "delete", "--name=n", "--zone=z"
        )
        assert done.returncode != 0
        assert "delete" not in [call[3] for call in place.calls("gcloud")]

    def test_what_was_not_granted_is_not_installed(self, place):
        place.env["STATE"] = "SUSPENDED"
        done = place.run(str(ROOT / "scripts" / "tpu_vm.sh"), "install", "--name=n", "--zone=z")
        assert done.returncode == 1
        assert "the queued resource n is SUSPENDED: delete it" in done.stderr
        assert [call[3] for call in place.calls("gcloud")] == ["describe"]

    def test_gclouds_own_options_reach_it(self, place):
        passed = ["--internal-ips", "--network=mine", "--subnetwork=sub", "--reserved"]
        passed += ["--service-account=me@p", "--labels=team=a b,cost=1"]
        self.tpu(place, "create", "--type=v4-8", "--version=v", *passed)
        (call,) = place.calls("gcloud")
        assert call[-len(passed) :] == passed

    def test_a_topology_replaces_the_accelerator_type(self, place):
        self.tpu(place, "create", "--type=v4", "--topology=2x2x4", "--version=v")
        (call,) = place.calls("gcloud")
        assert {"--type=v4", "--topology=2x2x4"} < set(call)
        assert not any(option.startswith("--accelerator-type") for option in call)

    def test_slices_are_one_queued_resource(self, place):
        place.env["NODES"] = "cqa-0;cqa-1"
        for worker in "01":
            (place.workers / worker / "dss").mkdir()
            (place.workers / worker / "dss" / "train.log").write_text("done\n")
        shown = self.tpu(place, "create", "logs", "--slices=2", "--type=v4-8", "--version=v")
        assert {"--node-count=2", "--node-prefix=cqa"} < set(place.calls("gcloud")[0])
        logs = [f"logs/cqa/cqa-{n}-worker-{w}.log: done" for n in "01" for w in "01"]
        assert shown.splitlines() == logs
        copies = [call[-2:] for call in place.calls("gcloud") if call[3] == "scp"]
        assert copies == [[f"--node={n}", f"--worker={w}"] for n in "01" for w in "01"]

    def test_every_connection_takes_the_same_way(self, place):
        commands = ["install", "run", "wait", "logs"]
        where = ["--name=cqa", "--zone=z", "--tunnel-through-iap"]
        place.script("tpu_vm.sh", *commands, *where, "--", "--x")
        for call in place.calls("gcloud"):
            assert ("--tunnel-through-iap" in call) == (call[3] in ("ssh", "scp"))
        assert " --internal-ip" in self.tpu(place, "install", "--internal-ip", "--dry-run")


def wait_for(pid_file: Path) -> int:
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(pid_file.read_text())


class TestSlurm:
    OPTIONS = ("--nodes=2", "--gpus-per-node", "8", "--time=24:00:00", "--partition=gpu")

    @pytest.fixture
    def place(self, place):
        fakes = {"srun": SRUN, "sbatch": SBATCH, "squeue": SQUEUE, "scontrol": RECORD, "dss": DSS}
        for name, text in fakes.items():
            place.fake(name, text)
        place.env["SLURM_JOB_ID"] = "7"
        return place

    def batch_script(self, place, *train: str) -> str:
        return place.script("slurm_gpu.sh", *self.OPTIONS, "--dry-run", "--", *train)

    def test_the_printed_script_is_the_submitted_one(self, place):
        text = self.batch_script(place, *TRAIN)
        assert not place.calls("sbatch")
        place.script("slurm_gpu.sh", *self.OPTIONS, "--", *TRAIN)
        assert place.calls("sbatch") == [[]]
        assert Path(place.env["CALLS"] + ".script").read_text() == text
        place.run("bash", "-n", input=text, check=True)

    def test_one_process_a_gpu_that_sees_them_all(self, place):
        text = self.batch_script(place, "--x")
        head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
        assert {line.removeprefix("#SBATCH ") for line in head} == {
            "--job-name=dss",
            "--partition=gpu",
            "--time=24:00:00",
            "--nodes=2",
            "--ntasks-per-node=8",
            "--gpus-per-node=8",
            "--cpus-per-task=4",
            "--output=%x-%j.log",
            "--open-mode=append",
            "--requeue",
            "--signal=TERM@120",
        }
        assert text.startswith("#!/usr/bin/env bash\n#SBATCH")  # Slurm stops at the first command

    def test_the_arguments_reach_dss_unchanged(self, place):
        done = place.run("bash", "-c", self.batch_script(place, *TRAIN))
        assert done.returncode == 0
        assert place.calls("dss") == [["train", *TRAIN]]
        assert not place.calls("scontrol")

    @pytest.mark.parametrize(
        ("status", "state", "requeued"),
        [(143, "RUNNING", True), (143, "COMPLETING", False), (2, "RUNNING", False)],
    )
    def test_only_a_job_whose_time_was_up_queues_again(self, place, status, state, requeued):
        place.env |= {"DSS_STATUS": str(status), "JOB_STATE": state}
        done = place.run("bash", "-c", self.batch_script(place, "--x"))
        assert done.returncode == status
        assert place.calls("scontrol") == ([["requeue", "7"]] if requeued else [])

    def test_without_dss_nothing_is_submitted(self, place):
        (place.fakes / "dss").unlink()
        place.env["PATH"] = f"{place.fakes}:/usr/bin:/bin"
        done = place.run(str(ROOT / "scripts" / "slurm_gpu.sh"), "--", "--x")
        assert (done.returncode, place.calls("sbatch")) == (2, [])
        assert "no dss on PATH" in done.stderr


# Names and keywords as in XManager 0.8.5; every call is recorded.
XMANAGER = """
import json, os, sys

def record(name, value):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([name, value]) + "\\n")
"""
XM = """
import os
from xmanager import record

class Packageable(dict):
    def __init__(self, *, executable_spec, executor_spec):
        super().__init__(executable_spec=executable_spec, executor_spec=executor_spec)

def PythonContainer(*, entrypoint, path, base_image, docker_instructions):
    held = {name: os.path.exists(os.path.join(path, name)) for name in ("setup.py", "gin", ".git")}
    return {"entrypoint": entrypoint, "name": os.path.basename(path), "base_image": base_image,
            "docker_instructions": docker_instructions, "held": held}

def CommandList(commands):
    return {"commands": commands}

def JobRequirements(**resources):
    return resources

def Job(*, executable, executor):
    return {"executable": executable, "executor": executor}
"""
# The machine type of most accelerators, unless the launch replaces it.
VERTEX = """
def get_machine_spec(job):
    return {"machine_type": "n1-standard-4"}
"""
XM_LOCAL = """
import absl.flags
from xmanager import record
from xmanager.cloud import vertex

class Vertex(dict):
    def __init__(self, *, requirements):
        super().__init__(vertex=requirements)
    Spec = staticmethod(lambda: "Vertex.Spec")

class Local(dict):
    def __init__(self, *, requirements, docker_options):
        super().__init__(local=requirements, docker_options=docker_options)
    Spec = staticmethod(lambda: "Local.Spec")

def DockerOptions(*, volumes):
    return {"volumes": volumes}

class create_experiment:
    def __init__(self, *, experiment_title):
        assert absl.flags.parsed
        record("experiment", experiment_title)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def package(self, packageables):
        record("package", packageables)
        return ["executable"]
    def add(self, job):
        record("add", job)
        if "vertex" in job["executor"]:
            record("machine", vertex.get_machine_spec(job))
"""
ABSL_FLAGS = """
parsed = False

def FLAGS(argv):
    global parsed
    parsed = True
"""


class TestXManager:
    ARGS = ("--name=cqa", "--accelerator=h100=8")

    @pytest.fixture
    def installed(self, place):
        """Makes a library called xmanager that records what it is asked."""
        library = place.folder / "library"
        for name, text in {
            "xmanager/__init__.py": XMANAGER,
            "xmanager/xm.py": XM,
            "xmanager/xm_local.py": XM_LOCAL,
            "xmanager/cloud/__init__.py": "",
            "xmanager/cloud/vertex.py": VERTEX,
            "absl/__init__.py": "",
            "absl/flags.py": ABSL_FLAGS,
        }.items():
            (library / name).parent.mkdir(parents=True, exist_ok=True)
            (library / name).write_text(text)
        place.env |= {"PYTHONPATH": str(library), "GOOGLE_CLOUD_BUCKET_NAME": "bucket"}

    def dry(self, place, *args: str) -> dict:
        return json.loads(place.script("xm_launch.py", *args, "--dry-run", "--", *TRAIN))

    def test_vertex_is_told_what_the_dry_run_says(self, place, installed):
        said = self.dry(place, "--executor=vertex", *self.ARGS)
        assert not Path(place.env["CALLS"]).exists()
        place.script("xm_launch.py", "--executor=vertex", *self.ARGS, "--", *TRAIN)
        assert place.calls("experiment") == [["cqa"]] == [[said["experiment_title"]]]
        assert place.calls("package") == [
            [
                [
                    {
                        "executable_spec": {
                            "entrypoint": {"commands": said["entrypoint"]},
                            "name": "dss",
                            "base_image": said["base_image"],
                            "docker_instructions": said["docker_instructions"],
                            "held": {"setup.py": True, "gin": True, ".git": False},
                        },
                        "executor_spec": "Vertex.Spec",
                    }
                ]
            ]
        ]
        assert place.calls("add") == [[{"executable": "executable", "executor": {"vertex": {}}}]]
        machine = {
            "machine_type": "a3-highgpu-8g",
            "accelerator_type": "NVIDIA_H100_80GB",
            "accelerator_count": 8,
        }
        assert place.calls("machine") == [[machine]] == [[said["machine_spec"]]]
        install = "RUN python -m pip install --no-cache-dir '.[cuda,gcs]'"
        assert install in said["docker_instructions"]

    def test_a_local_container_works_in_this_folder(self, place, installed):
        args = ["--executor=local", "--name=cqa", "--accelerator=local_gpu=1"]
        said = self.dry(place, *args)
        here = str(place.folder)
        assert said["entrypoint"][0] == f"cd {here}"
        place.script("xm_launch.py", *args, "--", *TRAIN)
        executor = {"local": {"local_gpu": 1}, "docker_options": {"volumes": {here: here}}}
        assert place.calls("add") == [[{"executable": "executable", "executor": executor}]]

    @pytest.mark.parametrize(
        ("accelerator", "extra"), [([], ".[gcs]"), (["--accelerator=tpu_v3=8"], ".[tpu,gcs]")]
    )
    def test_the_accelerator_says_what_is_installed(self, place, accelerator, extra):
        said = self.dry(place, "--executor=vertex", "--name=n", *accelerator)
        *before, last = said["docker_instructions"]
        assert last.endswith(f"'{extra}'")
        assert any("netcat" in line for line in before) == bool(accelerator)
        assert said["requirements"] == ({"tpu_v3": 8} if accelerator else {})

    def test_the_arguments_reach_dss_unchanged(self, place):
        place.fake("dss", DSS)
        commands = self.dry(place, "--executor=local", "--name=n")["entrypoint"]
        # XManager joins the commands to a bash script and adds the arguments of the job.
        place.run("bash", "-c", "\n".join(commands) + ' "$@"', check=True)
        assert place.calls("dss") == [["train", *TRAIN]]

    def test_without_xmanager_it_says_how_to_install_it(self, place):
        place.env["GOOGLE_CLOUD_BUCKET_NAME"] = "bucket"
        script = [sys.executable, "-IS", str(ROOT / "scripts" / "xm_launch.py")]
        done = place.run(*script, "--executor=vertex", *self.ARGS, "--", "--x")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "pip install xmanager" in done.stderr


class TestMachines:
    @pytest.mark.parametrize(
        ("kind", "count", "machine"),
        [
            (None, 0, "n1-standard-8"),
            ("t4", 1, "n1-standard-8"),
            ("v100", 8, "n1-standard-64"),
            ("l4", 1, "g2-standard-8"),
            ("l4", 2, "g2-standard-24"),
            ("a100", 2, "a2-highgpu-2g"),
            ("a100", 16, "a2-megagpu-16g"),
            ("a100_80gib", 8, "a2-ultragpu-8g"),
            ("h100", 1, "a3-highgpu-1g"),
            ("h100", 8, "a3-highgpu-8g"),
            ("h200", 8, "a3-ultragpu-8g"),
            ("b200", 8, "a4-highgpu-8g"),
            ("tpu_v3", 8, "cloud-tpu"),
        ],
    )
    def test_a_machine_belongs_to_its_accelerators(self, kind, count, machine):
        assert choose_machine(kind, count).name == machine

    @pytest.mark.parametrize(
        ("kind", "count", "requested", "machine"),
        [
            (None, 0, {"cpus": 64}, "n1-standard-64"),
            ("t4", 1, {"memory": 100}, "n1-highmem-16"),
            ("v100", 1, {"memory": 8, "cpus": 4}, "n1-standard-4"),
            ("l4", 1, {"cpus": 13}, "g2-standard-16"),
            ("h200", 8, {"cpus": 224, "memory": 2952}, "a3-ultragpu-8g"),
        ],
    )
    def test_it_has_at_least_what_is_requested(self, kind, count, requested, machine):
        assert choose_machine(kind, count, **requested).name == machine

    @pytest.mark.parametrize("accelerator", ["tpu_v5e=4", "warp=1", "h200=1", "t4=1 --cpu=64"])
    def test_what_vertex_does_not_have_is_refused_before_the_image_is_built(
        self, place, accelerator
    ):
        args = f"--executor=vertex --name=n --accelerator={accelerator} -- --x".split()
        done = place.run(str(ROOT / "scripts" / "xm_launch.py"), *args)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("xm_launch.py: --accelerator: ")
        assert re.search("known: t4, v100, .*h200|with 1 h200; give 8|with 64 vCPUs", line)

    def test_every_kind_has_vertex_ais_name(self):
        assert {machine.kind for machine in MACHINES} == {None, *VERTEX_NAMES}

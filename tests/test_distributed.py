"""Several processes that train as one: found, with the same losses, stopped and killed, and continued elsewhere."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from commands import REPOSITORY
from conftest import error_of

import llm_jax
from llm_jax import distributed
from llm_jax.distributed import TRY_AGAIN, find

SIZES = (
    "--config.model.n_embd=16 --config.model.block_size=16 --config.train.eval_batches=2 --config.train.eval_every=3 "
    "--config.train.save_every=3 --config.train.log_every=1 --config.sample.max_new_tokens=4 "
    "--config.optim.schedule=constant --config.optim.warmup_steps=10"
).split()
LONG = "--config.train.save_every=10 --config.train.eval_every=30 --config.train.num_steps=4000".split()
# As srun and mpirun set them; the node's name is what was changed.
SLURM = {
    "SLURM_JOB_ID": "4911",
    "SLURM_JOB_NODELIST": "node[001-002]",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_MCA_orte_hnp_uri": "2418147328.0;tcp://10.0.0.5:43725",
}
OPEN_MPI_5 = {name: value for name, value in OPEN_MPI.items() if name.startswith("OMPI_COMM")}
GKE = {"TPU_WORKER_HOSTNAMES": "tpu-0.svc,tpu-1.svc,tpu-2.svc,tpu-3.svc", "TPU_WORKER_ID": "2"}


@pytest.mark.parametrize(
    "environ, num_processes",
    [
        ({}, None),
        (SLURM, 2),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, None),  # a batch script, without srun
        (OPEN_MPI, 4),
        (GKE, 4),
        (GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}, 8),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),  # Colab
        (SLURM | {"SLURM_NTASKS": "1"} | OPEN_MPI, 4),
        ({"TPU_WORKER_HOSTNAMES": "WARNING: no hostnames or IP addresses, please set it manually"}, None),
    ],
    ids=[
        "alone",
        "Slurm",
        "one task",
        "sbatch",
        "Open MPI 4",
        "GKE",
        "two slices",
        "Colab",
        "mpirun under Slurm",
        "libtpu alone",
    ],
)
def test_a_launcher_is_found_by_its_variables_and_jax_left_to_find_the_rest(environ, num_processes):
    cluster = find(environ)
    assert cluster == (None if num_processes is None else distributed.Cluster(num_processes, {}))


def test_flags_say_what_no_launcher_does():
    given = dict(coordinator="10.0.0.1:1234", num_processes=2, process_id=1)
    arguments = {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}
    assert find({}, **given) == distributed.Cluster(2, arguments)
    assert find({}, **given | {"num_processes": 1, "process_id": 0}) is None
    assert find({}, distributed=True) == distributed.Cluster(None, {})
    assert find(SLURM | {"SLURM_NTASKS": "1"}, **given) == distributed.Cluster(2, arguments)  # a shell by srun
    arguments = {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 1}
    assert find(OPEN_MPI_5, coordinator="10.0.0.1:1234") == distributed.Cluster(4, arguments)


@pytest.mark.parametrize(
    "environ, given, message",
    [
        ({}, dict(num_processes=2, process_id=0), "--coordinator is missing"),
        ({}, dict(coordinator="a:1", process_id=0), "--num_processes is missing"),
        ({}, dict(coordinator="a:1", num_processes=2), "--process_id is missing"),
        ({}, dict(coordinator="a:1"), "needs --num_processes and --process_id"),
        ({}, dict(coordinator="10.0.0.1", num_processes=2, process_id=0), "must be HOST:PORT"),
        ({}, dict(coordinator="a:1", num_processes=2, process_id=2), r"--process_id \(2\) must be from 0 to .*\(1\)"),
        ({}, dict(coordinator="a:99999", num_processes=2, process_id=0), "must be HOST:PORT"),
        (SLURM, dict(num_processes=2), r"--num_processes \(2\): the launcher of this process tells it"),
        (OPEN_MPI_5, {}, "Open MPI does not tell where process 0 is; give --coordinator"),
    ],
)
def test_mistakes_in_flags_are_one_line(environ, given, message):

    assert re.search(message, error_of(find, environ, **given))


def test_a_process_0_that_never_comes_or_cant_listen_is_one_line(monkeypatch):
    monkeypatch.setattr(distributed, "START_SECONDS", 0)
    assert "process 0 does not answer at 127.0.0.1:1 (" in error_of(distributed._wait_for, "127.0.0.1:1")
    with socket.create_server(("", 0)) as server:
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        assert "process 0 can't listen there" in error_of(distributed._check_port, taken)
    assert "there is no host 'no such'" in error_of(distributed._find_host, "no such:1")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Launch:
    """`count` processes of `llm_jax.main`, each with a parent; `environ` and `flags` of each by its number."""

    def __init__(self, tmp_path, tiny_text, workdir, *flags, count=2, environ=None, own_flags=None, devices=1):
        port = free_port()
        self.folder = tmp_path
        self.workdir = tmp_path / workdir
        self.processes = []
        for n in range(count):
            env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LLM_JAX_PARENT")}
            env |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"} | (environ(n) if environ else {})
            told = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={n}"]
            command = [sys.executable, "-m", "llm_jax.main", f"--config={REPOSITORY / 'configs' / 'tiny.py'}"]
            command += [f"--config.data.path={tiny_text}", f"--workdir={self.workdir}", *SIZES, *flags]
            command += told if count > 1 and environ is None else []
            command += own_flags(n) if own_flags else []
            with self.log(n, "out").open("wb") as out, self.log(n, "err").open("wb") as err:
                self.processes.append(subprocess.Popen(command, env=env, cwd=tmp_path, stdout=out, stderr=err))

    def log(self, n, stream):
        return self.folder / f"{n}.{stream}"

    def text(self, n, stream="err"):
        return self.log(n, stream).read_bytes().decode(errors="replace")

    def wait(self, seconds=180):
        """The exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0, deadline - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def done(self):
        assert self.wait() == [0] * len(self.processes), [self.text(n) for n in range(len(self.processes))]
        return self.losses()

    def wait_for(self, text, seconds=120):
        deadline = time.monotonic() + seconds
        while text not in self.text(0):
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self.text(0)
            time.sleep(0.02)

    def child(self, n):
        """The process id of the one that trains."""
        children = f"/proc/{self.processes[n].pid}/task/{self.processes[n].pid}/children"
        return int(open(children).read().split()[0])

    def losses(self):
        lines = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        return {(line["step"], name): line[name] for line in lines for name in line if "loss" in name}


@pytest.fixture
def launch(tmp_path, tiny_text):
    started = []

    def start(*args, **kwargs):
        started.append(Launch(tmp_path, tiny_text, *args, **kwargs))
        return started[-1]

    yield start
    for process in (process for each in started for process in each.processes):
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def same(losses, others):
    """To 1e-5, of all steps and evaluations: only the order of sums differs."""
    assert losses.keys() == others.keys() and len(losses) > 6
    for key, loss in losses.items():
        assert others[key] == pytest.approx(loss, rel=1e-5), key


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_one_of_them_writes(launch):
    steps = "--config.train.num_steps=6"
    alone = launch("alone", steps, count=1).done()
    both = launch("both", steps)
    same(alone, both.done())
    assert "step 6/6" in both.text(0) and "step" not in both.text(1)
    assert both.text(0, "out").strip() and "Gloo" not in both.text(0, "out")  # standard output is for the samples
    assert not both.text(1, "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, flags",
    [
        (2, "--config.mesh.fsdp=2 --config.train.accumulation_steps=2"),
        (2, "--config.mesh.context=2 --config.model.dropout=0.2"),
        (2, "--config.train.seeds=2"),
        (4, "--config.mesh.tensor=2 --config.mesh.fsdp=2"),
    ],
)
def test_any_mesh_over_processes_has_the_losses_of_one_device(launch, count, flags):
    flags = flags.split()
    alone = launch("alone", *[flag for flag in flags if "mesh" not in flag], "--config.train.num_steps=6", count=1)
    same(alone.done(), launch("all", *flags, "--config.train.num_steps=6", count=count).done())


@pytest.mark.slow
@pytest.mark.parametrize("environ", ["Slurm", "Open MPI"])
def test_processes_find_each_other_by_their_launchers_variables(launch, environ):
    """As jax does itself, with what srun and mpirun set, of this machine."""
    job = str(free_port())
    of = {
        "Slurm": lambda n: SLURM | {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": str(n)},
        "Open MPI": lambda n: {
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(n),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(n),
            "OMPI_MCA_orte_hnp_uri": f"{int(job) << 12}.0;tcp://127.0.0.1:43725",
        },
    }
    both = launch("both", "--config.train.num_steps=6", environ=of[environ])
    both.done()
    assert "on 2 x cpu" in both.text(0)


@pytest.mark.slow
@pytest.mark.parametrize("lost, when", [(0, "step 20/"), (1, "parameters")])
def test_a_kill_of_one_ends_the_others_in_one_line_and_the_same_command_continues(launch, lost, when):
    steps = LONG[:-1] + ["--config.train.num_steps=60"]
    both = launch("both", *steps)
    both.wait_for(when)
    began = time.monotonic()
    os.kill(both.child(lost), signal.SIGKILL)
    codes = both.wait(30)
    assert time.monotonic() - began < 30
    assert codes[lost] == 128 + signal.SIGKILL and codes[1 - lost] == TRY_AGAIN
    last = both.text(1 - lost).splitlines()[-1]
    assert last.startswith("error: ") and "start all of them again with the same command" in last
    assert when == "parameters" or both.text(1 - lost).count("error: ") == 1
    losses = launch("both", *steps).done()
    if lost == 0:
        assert losses == launch("unstopped", *steps).done()  # to the last bit


@pytest.mark.slow
def test_a_killed_parent_takes_its_child_with_it(launch):
    both = launch("both", *LONG)
    both.wait_for("step 20/")
    child = both.child(1)
    both.processes[1].kill()
    codes = both.wait(30)
    assert codes[0] == TRY_AGAIN
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{child}")


@pytest.mark.slow
def test_a_signal_to_any_of_them_saves_and_stops_all_at_the_same_step(launch):
    both = launch("both", *LONG)
    both.wait_for("step 20/")
    for pid in (both.processes[1].pid, both.child(1)):  # as Slurm does; the parent passes it on besides
        os.kill(pid, signal.SIGTERM)
    assert both.wait() == [128 + signal.SIGTERM] * 2
    lines = [both.text(n).splitlines()[-1] for n in range(2)]
    assert lines[0] == lines[1] and lines[0].startswith("stopped at step ")
    step = int(lines[0].split()[3].rstrip(","))
    assert (both.workdir / "checkpoints" / str(step)).is_dir()


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_them(launch):
    both = launch("both", *LONG)
    both.wait_for("training tokens")
    both.processes[1].terminate()
    codes = both.wait(60)
    assert codes[1] == 128 + signal.SIGTERM and codes[0] in (TRY_AGAIN, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_a_process_that_stands_still_is_lost(launch):
    """As one whose machine is gone: nothing closes its connections."""
    both = launch("both", *LONG)
    both.wait_for("step 20/")
    os.kill(both.child(1), signal.SIGSTOP)
    try:
        assert both.processes[0].wait(30) == TRY_AGAIN
    finally:
        os.kill(both.child(1), signal.SIGKILL)
    assert "lost the others of its run" in both.text(0).splitlines()[-1]


@pytest.mark.slow
def test_the_checkpoint_of_four_processes_continues_on_one_device_on_eight_and_in_two_processes(launch):
    flags = ["--config.train.keep_checkpoints=2", "--config.train.num_steps"]
    four = launch("all", "--config.mesh.fsdp=4", f"{flags[0]}", f"{flags[1]}=6", count=4)
    four.done()
    longer = f"{flags[1]}=12"
    unsplit = launch("unsplit", flags[0], longer, count=1).done()
    assert llm_jax.load(four.workdir).generate("the ", max_new_tokens=4)
    for name, how in {
        "one": dict(count=1),
        "eight": dict(count=1, devices=8),
        "two": dict(count=2),
    }.items():
        (four.folder / name).mkdir()
        subprocess.run(["cp", "-r", f"{four.workdir}/.", str(four.folder / name)], check=True)
        mesh = {"eight": "--config.mesh.fsdp=8", "two": "--config.mesh.tensor=2"}.get(name)
        same(unsplit, launch(name, flags[0], longer, *([mesh] if mesh else []), **how).done())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["run", "hf"])
def test_two_processes_start_from_a_models_weights_as_one_does(launch, source, tmp_path):
    long = "--config.train.num_steps=60 --config.train.save_every=0 --config.optim.peak_lr=1e-2".split()
    trained = launch("run", *long, count=1).done()[60, "val_loss_full"]
    if source == "hf":
        llm_jax.load(tmp_path / "run").save_pretrained(tmp_path / "hf")
    start = ["--config.train.num_steps=6", f"--config.train.init_from={tmp_path / source}"]
    start.append("--config.data.tokenizer=bpe")  # its default: the model has its own
    alone = launch("alone", *start, count=1).done()
    assert trained < 4.5 and alone[1, "loss"] == pytest.approx(trained, abs=0.3)  # fresh weights': ln 256 = 5.5
    same(alone, launch("both", *start, "--config.mesh.fsdp=2").done())


@pytest.mark.slow
@pytest.mark.parametrize(
    "own_flags, message",
    [
        (
            lambda n: [f"--config.optim.peak_lr={1e-3 * (n + 1)}"],
            "process 1 has another optim.peak_lr than process 0",
        ),
        (
            lambda n: [f"--config.data.val_fraction={0.1 * (n + 1)}"],
            "process 1 has another data.val_fraction than process 0",
        ),
        (lambda n: [f"--workdir=run_of_{n}"], "of process 1 is not that of process 0"),
    ],
)
def test_processes_that_differ_are_told_in_one_line(launch, own_flags, message):
    both = launch("both", "--config.train.num_steps=6", own_flags=own_flags)
    assert both.wait() == [2, 2]
    for n in range(2):
        assert both.text(n).splitlines()[-1].startswith("error: ") and message in both.text(n).splitlines()[-1]

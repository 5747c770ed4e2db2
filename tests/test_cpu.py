import os
import platform
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from llm_jax import cpu
from llm_jax.config_rules import freeze

VARIABLE, TUNABLES = cpu.VARIABLE, cpu.TUNABLES

linux_with_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc not installed"
)
CONFIG = """
import os, sys
from llm_jax.config import default

def get_config():
    print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], file=sys.stderr)
    config = default()
    config.model.n_layer = 0
    return config
"""


@linux_with_glibc
def test_the_training_command_starts_itself_again_once(clean_env, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    flags = ["--config=config.py", "--config.train.seed=3"]
    command = [sys.executable, "-m", "llm_jax.main", *flags]
    env = {name: value for name, value in clean_env.items() if name != VARIABLE}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    told = done.stderr.splitlines()
    # The config file is run once, after the restart.
    assert (done.returncode, done.stdout, len(told)) == (2, "", 2)
    assert told[0].split(maxsplit=1)[1] == f"{TUNABLES} {flags}"
    assert told[1] == "error: model.n_layer (0) must be 1 or more"

    env[VARIABLE] = "glibc.malloc.hugetlb=0"  # a person's choice
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert [line.split()[1] for line in done.stderr.splitlines()[:-1]] == ["glibc.malloc.hugetlb=0"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("-m llm_jax.main --config=x.py", True),
        ("-X dev -u -W error -m llm_jax.main", True),
        ("-m pdb -m llm_jax.main", False),
        ("-c pass -m llm_jax.main", False),
        ("train.py -m llm_jax.main", False),
        ("-m llm_jax.sample", False),
        ("-m", False),
        ("", False),
    ],
)
def test_only_the_interpreter_s_own_module_is_started_again(monkeypatch, arguments, expected):
    started = []
    monkeypatch.setattr(cpu, "huge_pages", lambda given: {VARIABLE: "x"})
    monkeypatch.setattr(cpu.os, "execve", lambda *how: started.append(how))
    monkeypatch.setattr(sys, "orig_argv", ["python", *arguments.split()])
    cpu.restart("llm_jax.main")
    assert bool(started) == expected
    if started:
        [(program, argv, env)] = started
        assert (program, argv) == (sys.executable, [sys.executable, *arguments.split()])
        assert env[VARIABLE] == "x" and env["PATH"] == os.environ["PATH"]


@linux_with_glibc
def test_the_tunables_are_those_of_glibc(tmp_path):
    """glibc passes over what it does not know, so a name misspelt would only be slow."""
    loader = next(line.split()[-1] for line in open("/proc/self/maps") if "/ld-linux" in line)
    known = subprocess.run([loader, "--list-tunables"], capture_output=True, text=True).stdout
    if "glibc.malloc.hugetlb" not in known:
        pytest.skip("glibc>=2.35 not installed")
    for assignment in TUNABLES.split(":"):
        assert f"{assignment.split('=')[0]}:" in known


def test_nothing_is_added_elsewhere(monkeypatch):
    assert cpu.huge_pages({VARIABLE: ""}) == {}
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # musl
    assert cpu.huge_pages({}) == {}
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cpu.huge_pages({}) == {}


# -- Devices


def devices(given=None, *, rows, n_embd=128, dropout=0.0, data=-1):
    values = {"model": {"n_embd": n_embd, "dropout": dropout}, "train": {"batch_size": rows}, "mesh": {"data": data}}
    return cpu.devices(given or {}, freeze(values)).get("JAX_NUM_CPU_DEVICES")


def test_there_is_a_device_for_each_core_if_the_rows_divide(monkeypatch):
    monkeypatch.setattr(cpu, "cores", lambda: 4)
    assert [devices(rows=rows) for rows in (1, 2, 3, 4, 6, 7, 64)] == ["1", "2", "3", "4", "3", "1", "4"]
    assert devices(rows=64, n_embd=768) == devices(rows=64, dropout=0.1) == "1"
    assert [devices(rows=64, n_embd=768, data=data) for data in (1, 4, 5)] == ["1", "4", "1"]  # make_mesh refuses 5
    monkeypatch.setattr(cpu, "cores", lambda: 96)
    assert devices(rows=64) == str(cpu.MAX_DEVICES)


def test_a_persons_own_number_of_devices_stays():
    assert devices({"JAX_NUM_CPU_DEVICES": "3"}, rows=64) is None
    assert devices({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, rows=64) is None


@pytest.mark.slow
def test_the_training_command_takes_its_cores_as_devices(clean_env, tmp_path):
    """In a process of its own, for jax reads their number as it is imported."""
    command = [sys.executable, "-m", "llm_jax.main", f"--config={REPOSITORY / 'configs/tiny.py'}"]
    command += ["--config.train.num_steps=1", "--config.sample.max_new_tokens=0", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=clean_env, capture_output=True, text=True, check=True)
    assert f"on {devices(rows=8)} x cpu" in done.stderr

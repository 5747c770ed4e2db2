import os
import platform
import subprocess
import sys

import pytest

from llm_jax import huge_pages

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
    env = {name: value for name, value in clean_env.items() if name != huge_pages.VARIABLE}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    told = done.stderr.splitlines()
    # The config file is run once, after the restart.
    assert (done.returncode, done.stdout, len(told)) == (2, "", 2)
    assert told[0].split(maxsplit=1)[1] == f"{huge_pages.TUNABLES} {flags}"
    assert told[1] == "error: model.n_layer (0) must be 1 or more"

    env[huge_pages.VARIABLE] = "glibc.malloc.hugetlb=0"  # a person's choice
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
    monkeypatch.setattr(huge_pages, "environment", lambda given: {huge_pages.VARIABLE: "x"})
    monkeypatch.setattr(huge_pages.os, "execve", lambda *how: started.append(how))
    monkeypatch.setattr(sys, "orig_argv", ["python", *arguments.split()])
    huge_pages.restart("llm_jax.main")
    assert bool(started) == expected
    if started:
        [(program, argv, env)] = started
        assert (program, argv) == (sys.executable, [sys.executable, *arguments.split()])
        assert env[huge_pages.VARIABLE] == "x" and env["PATH"] == os.environ["PATH"]


@linux_with_glibc
def test_the_tunables_are_those_of_glibc(tmp_path):
    """glibc passes over what it does not know, so a name misspelt would only be slow."""
    loader = next(line.split()[-1] for line in open("/proc/self/maps") if "/ld-linux" in line)
    known = subprocess.run([loader, "--list-tunables"], capture_output=True, text=True).stdout
    if "glibc.malloc.hugetlb" not in known:
        pytest.skip("glibc>=2.35 not installed")
    for assignment in huge_pages.TUNABLES.split(":"):
        assert f"{assignment.split('=')[0]}:" in known


def test_nothing_is_added_elsewhere(monkeypatch):
    assert huge_pages.environment({huge_pages.VARIABLE: ""}) == {}
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # musl
    assert huge_pages.environment({}) == {}
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert huge_pages.environment({}) == {}

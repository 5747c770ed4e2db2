import platform
import subprocess
import sys

import pytest

from llm_jax import huge_pages

linux_with_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="not Linux with glibc"
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
    assert (done.returncode, done.stdout, len(told)) == (2, "", 3)
    process = told[0].split()[0]
    assert told[0] == f"{process} None {flags}"
    assert told[1] == f"{process} {huge_pages.TUNABLES} {flags}"
    assert told[2] == "error: model.n_layer (0) must be 1 or more"

    env[huge_pages.VARIABLE] = "glibc.malloc.hugetlb=0"  # a person's choice
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert [line.split()[1] for line in done.stderr.splitlines()[:-1]] == ["glibc.malloc.hugetlb=0"]


@linux_with_glibc
def test_the_tunables_are_those_of_glibc(tmp_path):
    """glibc passes over what it does not know, so a name misspelt would only be slow."""
    loader = next(line.split()[-1] for line in open("/proc/self/maps") if "/ld-linux" in line)
    known = subprocess.run([loader, "--list-tunables"], capture_output=True, text=True).stdout
    if "glibc.malloc.hugetlb" not in known:
        pytest.skip("glibc below 2.35")
    for assignment in huge_pages.TUNABLES.split(":"):
        assert f"{assignment.split('=')[0]}:" in known


def test_nothing_is_added_elsewhere(monkeypatch):
    assert huge_pages.environment({huge_pages.VARIABLE: ""}) == {}
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # musl
    assert huge_pages.environment({}) == {}
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert huge_pages.environment({}) == {}


def test_only_the_command_itself_is_started_again(monkeypatch):
    monkeypatch.setattr(huge_pages, "environment", lambda given: {huge_pages.VARIABLE: "x"})
    monkeypatch.setattr(huge_pages.os, "execve", lambda *arguments: pytest.fail("started again"))
    huge_pages.restart("llm_jax.main")  # this is a test's process

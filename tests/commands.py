"""Runs `python -m llm_jax.<name>` as real processes, without paying for `import jax` in each.

`Commands` starts one process that has imported the libraries but started no JAX backend and none of the
commands; each command is a fork of it: its own process, signals, exit code, standard output and error.
"""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parents[1]


class Result(NamedTuple):
    returncode: int  # -N: ended by signal N, as subprocess has it
    stdout: str
    stderr: str


class Process:
    """A command that runs; its output so far is in `stdout` and `stderr`."""

    def __init__(self, commands: "Commands", pid: int, stdout: Path, stderr: Path):
        self._commands, self.pid, self.stdout, self.stderr = commands, pid, stdout, stderr

    def wait(self, *, timeout: float = 120) -> Result:
        deadline = time.monotonic() + timeout
        while (code := self._commands._ask(poll=self.pid)) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(self.stderr.read_text(errors="replace"))
            time.sleep(0.01)
        # Not read_text, which would make "\r" another character.
        return Result(code, *(file.read_bytes().decode(errors="replace") for file in (self.stdout, self.stderr)))

    def signal_when(self, signum: int, reached: Callable[[], bool], *, timeout: float = 90) -> Result:
        """Sends the signal as soon as `reached()`; an error if the command ends before."""
        deadline = time.monotonic() + timeout
        while not reached():
            over = self._commands._ask(poll=self.pid)
            assert over is None, f"ended ({over}) before the signal:\n{self.stderr.read_text(errors='replace')}"
            assert time.monotonic() < deadline, self.stderr.read_text(errors="replace")
            time.sleep(0.002)
        os.kill(self.pid, signum)
        return self.wait()


class Commands:
    """The process that forks; one command at a time is enough for two cores."""

    def __init__(self, folder: Path, **env: str):
        self._folder, self._count = folder, 0
        # The test process has its fake devices from jax.config; what a user's shell would not have stays out.
        inherited = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
        compiling = {  # each program once, and quickly
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        cache = {"LLM_JAX_CACHE": str(folder / "cache")}
        env = inherited | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"} | compiling | cache | env
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def start(
        self, name: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None, stdin: bytes = b""
    ) -> Process:
        self._count += 1
        typed = self._folder / f"{self._count}.in"
        typed.write_bytes(stdin)
        stdout, stderr = (self._folder / f"{self._count}.{stream}" for stream in ("out", "err"))
        stdout.touch(), stderr.touch()
        request = dict(argv=[name, *map(str, arguments)], cwd=str(cwd), env=env or {})
        pid = self._ask(**request, stdin=str(typed), stdout=str(stdout), stderr=str(stderr))
        return Process(self, pid, stdout, stderr)

    def run(self, name: str, *arguments: str, cwd: Path, **how: Any) -> Result:
        return self.start(name, *arguments, cwd=cwd, **how).wait()

    def _ask(self, **request: object) -> int | None:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    import jax  # noqa: F401
    import matplotlib.figure  # noqa: F401

    import llm_jax.train  # noqa: F401

    gc.collect(), gc.freeze()  # else the children copy every page when they collect
    codes = {}
    for line in sys.stdin:
        request = json.loads(line)
        if pid := request.get("poll"):
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        else:
            answer = os.fork()
            if not answer:
                _become(**request)
                return
        print(json.dumps(answer), flush=True)


def _become(argv: list[str], cwd: str, env: dict[str, str], stdin: str, stdout: str, stderr: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest in the background ignores it
    writes = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for descriptor, path, mode in ((0, stdin, os.O_RDONLY), (1, stdout, writes), (2, stderr, writes)):
        file = os.open(path, mode)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = open(0)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = argv
    runpy.run_module(f"llm_jax.{argv[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()

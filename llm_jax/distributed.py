"""Commands of several processes that train as one: how they find each other, and how one of them ends."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from llm_jax import cpu, progress
from llm_jax.errors import InputError

# What each launcher sets for its processes, and jax.distributed reads to find the first of them.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
OPEN_MPI_ADDRESS = "OMPI_MCA_orte_hnp_uri"  # Open MPI 5 does not set it any more
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # on GKE, with commas between them

START_SECONDS = 300  # until all processes must have come
HEARTBEAT_SECONDS = 15  # without a sign of life a process counts as lost: a killed one, or its machine
LEAVE_SECONDS = 1  # in which the others receive what all have been told, such as that they stop
# Exit codes, as sysexits.h has them: the same command, once more, goes on; a bug, where 1 may be XLA's.
TRY_AGAIN, BUG = 75, 70
REMEDY = (
    "unless one of them tells of a mistake, start all of them again with the same command: a run goes on from its "
    "last checkpoint"
)
PARENT = "LLM_JAX_PARENT"  # set for a child of `supervise`: a socket that ends with its parent
JOINED = b"1"  # what the child sends there when it has met the others

_parent: socket.socket | None = None


class PeerLost(RuntimeError):
    """Another process of this run is gone, and with it its part of the state."""


class Cluster(NamedTuple):
    """arguments: of jax.distributed.initialize; those that are not here it finds itself."""

    num_processes: int | None  # None: only the machine knows
    arguments: dict[str, Any]


def find(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool = False,
) -> Cluster | None:
    """The processes that this one belongs to: by the flags, or as its launcher tells; None: it is alone.

    Args:
        coordinator: HOST:PORT of process 0, reached by all.
        distributed: there are others, as the machine's own service knows (a pod of Cloud TPU VMs).

    Raises:
        InputError: the flags are not complete, or contradict each other.
    """
    if coordinator is not None:
        port = re.fullmatch(r".+:([0-9]{1,5})", coordinator)
        if port is None or not 0 < int(port[1]) < 2**16:
            raise InputError(f"--coordinator ({coordinator!r}) must be HOST:PORT of process 0, such as 10.0.0.1:1234")
    told = _launched(environ)
    given = {"num_processes": num_processes, "process_id": process_id}
    if told is None and any(value is not None for value in given.values()):
        if missing := [name for name, value in {"coordinator": coordinator, **given}.items() if value is None]:
            raise InputError(
                f"--{missing[0]} is missing; several processes need --coordinator=HOST:PORT, --num_processes and "
                "--process_id (0 for the one at HOST)"
            )
        if not 0 <= process_id < num_processes:
            raise InputError(
                f"--process_id ({process_id}) must be from 0 to --num_processes - 1 ({num_processes - 1})"
            )
        return Cluster(num_processes, {"coordinator_address": coordinator, **given}) if num_processes > 1 else None
    if told is None:
        if coordinator is not None:
            raise InputError("--coordinator needs --num_processes and --process_id: no launcher tells of them here")
        return Cluster(None, {}) if distributed else None
    count, arguments = told
    for name, value in given.items():
        if value is not None:
            raise InputError(f"--{name} ({value}): the launcher of this process tells it already; leave it out")
    if coordinator is not None:
        return Cluster(count, arguments | {"coordinator_address": coordinator})
    if OPEN_MPI[0] in environ and arguments and OPEN_MPI_ADDRESS not in environ:
        raise InputError("Open MPI does not tell where process 0 is; give --coordinator=HOST:PORT of its machine")
    return Cluster(count, {} if OPEN_MPI_ADDRESS in environ else arguments)


def _launched(environ: Mapping[str, str]) -> tuple[int, dict[str, Any]] | None:
    """How many processes a launcher has started, if several, and what it tells that jax does not find itself."""
    if all(name in environ for name in OPEN_MPI):  # before Slurm, under which mpirun may run
        count, rank = (int(environ[name]) for name in OPEN_MPI)
        return (count, {"num_processes": count, "process_id": rank}) if count > 1 else None
    if all(name in environ for name in SLURM):
        count = int(environ["SLURM_NTASKS"])
        return (count, {}) if count > 1 else None
    hosts = next((environ[name] for name in TPU_HOSTS if name in environ), "")
    if re.fullmatch(r"[\w.:,-]+", hosts):  # where libtpu knows none, it writes a warning there
        count = len(hosts.split(",")) * int(environ.get("MEGASCALE_NUM_SLICES") or 1)
        return (count, {}) if count > 1 else None
    return None


def supervise(module: str) -> None:
    """Runs this command again as a child, and exits as it does, unless this is that child or no `python -m <module>`.

    A process that loses another is ended by XLA, wherever it is, with SIGABRT and a trace, or by older ones with exit
    code 1 and a line of theirs: its parent says in one line what that means.
    """
    global _parent
    if PARENT in os.environ:
        _parent = socket.socket(fileno=int(os.environ.pop(PARENT)))
        threading.Thread(target=_end_with_parent, args=(_parent,), daemon=True).start()
        return
    if os.name != "posix" or not sys.executable or not cpu.started_as(module):
        return
    own, of_child = socket.socketpair()  # the system closes this end, however this process ends
    command = [sys.executable, *sys.orig_argv[1:]]
    environ = {**os.environ, PARENT: str(of_child.fileno())}
    child = subprocess.Popen(command, env=environ, pass_fds=[of_child.fileno()])
    of_child.close()
    passed_on: list[int] = []

    def pass_on(signum: int, frame: Any) -> None:
        passed_on.append(signum)
        child.send_signal(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, pass_on)
    code = child.wait()
    has_joined = own.recv(1) == JOINED  # b"" from a child that has ended before
    if code == -signal.SIGABRT or (code == 1 and has_joined):
        if passed_on:  # to the others as well: who was compiling lost them
            print("interrupted", file=sys.stderr)
            sys.exit(128 + passed_on[0])
        print(f"error: this process lost the others of its run, or never met them; {REMEDY}", file=sys.stderr)
        sys.exit(TRY_AGAIN)
    if code < 0:
        print(f"error: ended by signal {-code} ({signal.Signals(-code).name})", file=sys.stderr)
    sys.exit(code if code >= 0 else 128 - code)


def _end_with_parent(parent: socket.socket) -> NoReturn:
    with contextlib.suppress(OSError):
        parent.recv(1)  # returns when the other end is closed
    os._exit(TRY_AGAIN)


def start(cluster: Cluster) -> None:
    """Joins the processes, before jax knows its devices; what only one of them should tell, the first one tells.

    Raises:
        InputError: process 0 is not there.
    """
    import jax

    # Gloo writes a line to standard output for each group of processes: it goes to standard error.
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = open(results, "w", encoding=sys.stdout.encoding, errors="replace")
    address, process_id = (cluster.arguments.get(name) for name in ("coordinator_address", "process_id"))
    if address is not None:
        _find_host(address)
        if process_id:
            _wait_for(address)
        else:
            _check_port(address)
    try:
        jax.distributed.initialize(
            **cluster.arguments, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the processes can't be started ({reason}); give --coordinator with a free port of process 0's machine, "
            "--num_processes and --process_id"
        ) from None
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # jax has put a handler of its own there
    if cluster.num_processes not in (None, jax.process_count()):
        raise InputError(
            f"--num_processes ({cluster.num_processes}) must be the same for all; process 0 has {jax.process_count()}"
        )
    if _parent is not None:
        _parent.send(JOINED)
    if jax.process_index():
        progress.say_nothing()


def _find_host(address: str) -> None:
    host = address.rpartition(":")[0].strip("[]")
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise InputError(f"--coordinator ({address!r}): there is no host {host!r} ({error.strerror})") from None


def _check_port(address: str) -> None:
    """Of process 0, which listens there: jaxlib crashes where it can't."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        raise InputError(
            f"--coordinator ({address!r}): process 0 can't listen there ({error.strerror}); give another port"
        ) from None


def _wait_for(address: str) -> None:
    """Until process 0 listens: the client of jax.distributed would end this process with a trace if it never does."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(
                    f"process 0 does not answer at {address} ({error}); start it, or give its --coordinator"
                ) from None
        time.sleep(0.2)


def is_started() -> bool:
    """Whether this process is one of several."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave(code: int, *, at_once: bool = False) -> NoReturn:
    """Ends this process as sys.exit does; one of several soon, without waiting for the others to end too."""
    if is_started():
        if not at_once:
            time.sleep(LEAVE_SECONDS)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)

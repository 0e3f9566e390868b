"""Several real processes, each with CPU devices of its own, that find each other over a free port."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from quick import xla_flags

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


class Group:
    """The processes of one run. What they write goes to files, for a full pipe would stop them."""

    def __init__(self, folder: pathlib.Path, commands: list[list[str]], environments: list[dict[str, str]], cwd):
        self._folder = folder
        folder.mkdir(parents=True)
        self.processes = []
        for number, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            with (folder / f"out-{number}").open("w") as out, (folder / f"err-{number}").open("w") as err:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
                    )
                )

    def out(self, number: int = 0) -> str:
        return (self._folder / f"out-{number}").read_text()

    def err(self, number: int = 0) -> str:
        return (self._folder / f"err-{number}").read_text()

    def lines(self, number: int) -> list[str]:
        """What a person reads on standard error."""
        return [line for line in self.err(number).splitlines() if line.strip()]

    def line(self, number: int) -> str:
        """The only line that a person reads on standard error."""
        lines = self.lines(number)
        assert len(lines) == 1, self.told()
        return lines[0]

    def told(self) -> str:
        parts = (f"--- {i}\n{self.out(i)[-2000:]}\n{self.err(i)[-5000:]}" for i in range(len(self.processes)))
        return "\n".join(parts)

    def wait(self, codes: int | list[int] = 0, timeout: float = 150) -> None:
        """Until all have ended with these exit codes; anything else fails the test and shows what they wrote."""
        end = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                self.kill()
                pytest.fail(f"still running after {timeout} s\n{self.told()}")
        wanted = [codes] * len(self.processes) if isinstance(codes, int) else codes
        ended = [process.returncode for process in self.processes]
        assert ended == wanted, f"exit codes {ended}\n{self.told()}"

    def until(self, condition: Callable[[], object], timeout: float = 120) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                self.kill()
                pytest.fail(f"the processes did not come so far\n{self.told()}")
            time.sleep(0.05)

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Group]]:
    """start(2, "mlm.pretrain", "debug", …): a Group of processes with 2 CPU devices each.

    The place of each is given by environment variables; `flags=True`: on its command line. A name that ends with .py is
    a script beside this file. each: further arguments or environment, by the number of the process.
    """
    groups: list[Group] = []

    def start(
        count: int, program: str, *arguments: object, devices: int = 2, flags: bool = False, each=lambda number: {}
    ) -> Group:
        port, commands, environments = free_port(), [], []
        for number in range(count):
            more = each(number)
            command = [
                sys.executable,
                "-P",
                *(["-m", program] if not program.endswith(".py") else [str(HERE / program)]),
            ]
            command += [*map(str, arguments), *map(str, more.get("arguments", ()))]
            environment = os.environ | {
                "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE.parent}",
                "XLA_FLAGS": xla_flags(devices),
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
            if flags:
                command += ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.processes", str(count)]
                command += ["--distributed.process-id", str(number)]
            elif count > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(number),
                }
            commands.append(command)
            environments.append(environment | more.get("environment", {}))
        groups.append(Group(tmp_path / f"group-{len(groups)}", commands, environments, tmp_path))
        return groups[-1]

    yield start
    for group in groups:
        group.kill()


@pytest.fixture
def run(start) -> Callable[..., Group]:
    """As `start`, but waits for all to end well; codes: other exit codes. Tries anew where the port was taken."""

    def run(*arguments, codes: int | list[int] = 0, timeout: float = 150, **options) -> Group:
        for _ in range(3):
            group = start(*arguments, **options)
            with contextlib.suppress(subprocess.TimeoutExpired):
                group.processes[0].wait(timeout)
            if "cannot listen on port" not in group.err(0):
                break
            group.kill()
        group.wait(codes, timeout)
        return group

    return run

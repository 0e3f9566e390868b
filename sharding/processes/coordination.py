"""One program in several processes: start, exchange of small values, barriers, and shutdown.

The `main` of training is decorated with `joined`, which starts `jax.distributed` where there are several processes.
Every wait is bounded: by a time-out, and by `watchdog.py`, which ends all processes when one has ended.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from espalier import library_log, signals
from espalier.errors import MachineError, UserError
from sharding.processes.discovery import Place, find_place
from sharding.processes.watchdog import Watch, rendezvous

WAIT = 600.0
"""Time-out in seconds of a barrier before which no process does long work."""
LONG_WAIT = 24 * 3600.0
"""The same where one process may prepare text, hash or export for hours; the watchdog sees that it is alive."""
HEARTBEAT = 100
"""Seconds without a heartbeat after which JAX gives up on a process, should `watchdog.py` have missed its end."""
SHUTDOWN = 100
"""Seconds that JAX waits for all to leave together."""

R = TypeVar("R")


def joined(main: Callable[..., R]) -> Callable[..., R]:
    """A main(config, …) that first joins the other processes of the run, if there are any, and leaves them at its end.

    config.distributed: a sharding.processes.discovery.DistributedConfig. Only process 0 writes to standard output.
    """

    @functools.wraps(main)
    def run(config: Any, *args: Any, **kwargs: Any) -> R:
        place = find_place(config.distributed)
        if place is None:
            return main(config, *args, **kwargs)
        with _membership(place, config.distributed.timeout):
            return main(config, *args, **kwargs)

    return run


def watch() -> Watch | None:
    """The connections to the other processes; None where there are none."""
    return _watch


def gather(name: str, value: Any = None, timeout: float = WAIT) -> list:
    """The values that all processes give under this name, in process order; also a barrier. Values are JSON.

    Every process calls it equally often with a name. MachineError if one does not within `timeout` seconds.
    """
    import jax

    count, mine = jax.process_count(), jax.process_index()
    if count == 1:
        return [value]
    store, end = _store(), time.monotonic() + timeout
    turn = _turns[name] = _turns[name] + 1
    key, written = f"espalier/{name}/{turn}", json.dumps(value)
    if mine:
        store.key_value_set(f"{key}/{mine}", written)
        # Process 0 times out first, and names the missing one.
        return json.loads(_value(f"{key}/all", end + 30, f"process 0 did not reach {name!r} within {timeout:g} s"))
    values = [written]
    for number in range(1, count):
        missing = f"process {number} of {count} did not reach {name!r} within {timeout:g} s"
        values.append(_value(f"{key}/{number}", end, missing))
    store.key_value_set(f"{key}/all", f"[{','.join(values)}]")
    if turn > 1:
        # All processes have reached this turn, so all have read the previous one.
        store.key_value_delete(f"espalier/{name}/{turn - 1}/")
    return [json.loads(value) for value in values]


def from_first(name: str, value: Any = None, timeout: float = WAIT) -> Any:
    """Broadcast: the value that process 0 gives under this name; the others wait for it."""
    import jax

    if jax.process_count() == 1:
        return value
    turn = _turns[name] = _turns[name] + 1
    key = f"espalier/{name}/{turn}/first"
    if jax.process_index() == 0:
        _store().key_value_set(key, json.dumps(value))
        return value
    missing = f"process 0 did not reach {name!r} within {timeout:g} s"
    return json.loads(_value(key, time.monotonic() + timeout, missing))


def collected(tree: Any) -> Any:
    """A tree of arrays as NumPy arrays in process 0, None in the others. All processes must call it.

    Leaves are gathered one at a time, so that a device never holds more than one of them whole.
    """
    import jax

    if jax.process_count() == 1:
        return jax.device_get(tree)
    first = jax.process_index() == 0

    def whole(leaf):
        if not leaf.is_fully_replicated:
            everywhere = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
            leaf = jax.jit(_same, out_shardings=everywhere)(leaf)
        local = leaf.addressable_data(0).block_until_ready()
        return jax.device_get(local) if first else None

    gathered = jax.tree.map(whole, tree)
    return gathered if first else None


_turns: Counter[str] = Counter()
_watch: Watch | None = None


def _same(x):
    return x


def _store():
    from jax._src import distributed

    # JAX has no public access to its key-value store; Orbax takes the same way.
    client = distributed.global_state.client
    assert client is not None, "several processes and no jax.distributed"
    return client


def _value(key: str, end: float, missing: str) -> str:
    while (left := end - time.monotonic()) > 0:
        # In short waits, so that Ctrl-C is handled between them.
        try:
            return _store().blocking_key_value_get(key, int(min(left, 5.0) * 1000) + 1)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    raise MachineError(missing)


@contextlib.contextmanager
def _membership(place: Place, timeout: float) -> Iterator[None]:
    if place.process_id:
        # The file descriptor and not sys.stdout: libraries write to it from C++.
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), library_log.terminal(1))
    global _watch
    watch = _watch = rendezvous(place, timeout)
    import jax

    try:
        with signals.telling(lambda number: watch.fail(signals.words(number), 128 + number)):
            _initialize(place, timeout)
            yield
            gather("the end", timeout=LONG_WAIT)
    except BaseException as error:
        number = signals.interrupted_by(error)
        if not (number or isinstance(error, UserError | MachineError | SystemExit)):
            # When another process ends, a collective fails here, and the message about the cause arrives later.
            cause = watch.failure(3.0)
            if cause:
                error = MachineError(cause)
        who = f"process {place.process_id} of {place.processes}"
        code = 128 + number if number else 2 if isinstance(error, UserError) else 1
        watch.fail(signals.words(number) if number else _one_line(error), code)
        _exit_soon(code)
        error.add_note(who)
        raise error
    watch.leave()
    _watch = None
    jax.distributed.shutdown()


def _initialize(place: Place, timeout: float) -> None:
    import jax

    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It takes SIGTERM, and does nothing of it before a training's first step.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {
        # All processes are connected: only JAX itself is awaited now.
        "initialization_timeout": max(60, round(timeout)),
        "heartbeat_timeout_seconds": HEARTBEAT,
        "shutdown_timeout_seconds": SHUTDOWN,
    }
    # The last option is newer than JAX 0.7.
    known = inspect.signature(jax.distributed.initialize).parameters
    host = f"[{place.host}]" if ":" in place.host else place.host
    try:
        jax.distributed.initialize(
            f"{host}:{place.port}",
            place.processes,
            place.process_id,
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",
            **{name: value for name, value in options.items() if name in known},
        )
    except RuntimeError as error:
        raise UserError(f"jax.distributed did not start: {_one_line(error)}") from None
    finally:
        signals.again()


def _one_line(error: BaseException) -> str:
    said = " ".join(str(error).split())[:500]
    if isinstance(error, UserError | MachineError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _exit_soon(code: int) -> None:
    """End this process once its error is printed, without waiting for the others as JAX would at exit."""

    def end():
        sys.stdout.flush()
        sys.stderr.flush()
        leave()

    def leave():
        library_log.ended()
        os._exit(code)

    atexit.register(end)
    # Threads that wait for other processes could keep Python from reaching its exit handlers.
    timer = threading.Timer(20.0, leave)
    timer.daemon = True
    timer.start()

"""Connecting the processes of one command before any of them touches a device."""

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jaxrec.errors import UserError

_ADDRESS = re.compile(r"(?P<host>\[[^\]]+\]|[^:\s]+):(?P<port>\d{1,5})")
# Seconds by which JAX would give up later than we do.
_LATER = 60


def connect(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    *,
    distributed: bool,
    timeout: int,
) -> None:
    """`jax.distributed.initialize`, where the options ask for it.

    Args:
      coordinator: HOST:PORT where the first process listens.
      processes: how many there are.
      process: which of them this is, from 0.
      distributed: leave all three to the cluster that has started the processes.
      timeout: seconds within which all must have come.

    Raises:
      UserError: options that do not fit, processes that do not meet, devices already in use.
    """
    values = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    given = [name for name, value in values.items() if value is not None]
    if distributed and given:
        raise UserError(f"train: --distributed finds out what {given[0]} says; give one of the two")
    if not distributed and not given:
        return
    if timeout < 1:
        raise UserError(f"train: --connect-timeout must be positive, got {timeout}")
    if not distributed:
        missing = [name for name in values if name not in given]
        if missing:
            raise UserError(
                "train: --coordinator, --processes and --process belong together; missing: "
                f"{', '.join(missing)}"
            )
        assert coordinator is not None
        assert processes is not None
        assert process is not None
        _check(coordinator, processes, process)
    _initialize(coordinator, processes, process, timeout)


def _check(coordinator: str, processes: int, process: int) -> None:
    address = _ADDRESS.fullmatch(coordinator)
    if address is None or not 0 < int(address["port"]) < 2**16:
        raise UserError(
            f"train: --coordinator is HOST:PORT, like 10.0.0.1:8476, got {coordinator!r}"
        )
    if processes < 1:
        raise UserError(f"train: --processes must be positive, got {processes}")
    if not 0 <= process < processes:
        raise UserError(
            f"train: --process is from 0 to {processes - 1} with --processes {processes}, got "
            f"{process}"
        )
    try:
        socket.getaddrinfo(address["host"].strip("[]"), None)
    except OSError as error:
        raise UserError(
            f"train: --coordinator: no host {address['host']} ({error.strerror})"
        ) from None
    if process == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        # The service itself does not survive it.
        try:
            socket.create_server(("", int(address["port"]))).close()
        except OSError as error:
            raise UserError(
                f"train: --coordinator: cannot listen on port {address['port']} "
                f"({os.strerror(error.errno or 0)}); choose another"
            ) from None


def _initialize(
    coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> None:
    import jax

    # Its handler would keep SIGTERM from ending a process before and after the training loop, which
    # has one of its own.
    jax.config.update("jax_enable_preemption_service", False)
    place = "of the cluster" if coordinator is None else f"at {coordinator}"
    with _ending_after(
        timeout,
        f"train: the processes have not met {place} within {timeout} seconds; all of them must be "
        "started, and reach process 0 there (--connect-timeout waits longer)",
    ):
        try:
            jax.distributed.initialize(
                coordinator, processes, process, initialization_timeout=timeout + _LATER
            )
        except ValueError as error:
            raise UserError(
                f"train: --distributed finds no cluster here ({error}); give --coordinator, "
                "--processes and --process"
            ) from None
        except RuntimeError as error:
            raise UserError(f"train: the processes cannot be connected: {error}") from None


@contextmanager
def _ending_after(seconds: int, message: str) -> Iterator[None]:
    """Ends this process with the message: JAX would abort it, with a stack of its own.

    Ctrl-C ends it at once, which JAX would not let Python hear of.
    """

    def end() -> None:
        print(f"jaxrec: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        timer.cancel()

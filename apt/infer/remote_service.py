"""A policy as a service: robots ask it by name, from other processes, environments or machines.

    pyro4-ns -p 9091
    python -m apt.infer.remote_service --ckpt checkpoints/APT/ft_apt_pp/ckpt_latest.pt --uri apt_control
    python -m apt.infer.remote_service --status

Every client has a planner session of its own (prompt, frames, ensemble, noise); queries run one at a time, in the order
in which they were asked. docs/inference.md shows both sides.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from dataclasses import dataclass

from apt.infer.service_status import status_line, status_report
from apt.infer.serving import ServedPolicy
from data_utils.cli import CommandLineError, parse
from shm_transport import TransportError, get_shm_proxy
from shm_transport.end_wish import EndWish
from shm_transport.names import NameServer
from shm_transport.server import ShmServer, is_alive

_FINISH_S = 7.0  # that a query in flight has when the service is told to stop


@dataclass(frozen=True)
class ServiceConfig(ServedPolicy):
    uri: str = "apt_control"
    """Name under which clients find the service."""
    host: str = "localhost"
    """Interface to listen on. Others than localhost are open to whoever reaches them: prefer an SSH tunnel."""
    ns_host: str = "localhost"
    """Where the name server runs (pyro4-ns -p 9091)."""
    ns_port: int = 9091
    status_every: float = 60.0
    """Seconds between two status lines while there are queries; 0: none."""
    status: bool = False
    """Say how the service that runs under --uri is doing, and end."""


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. 0: ended as told to; 2: an error, said in one line."""
    try:
        config = parse(
            ServiceConfig,
            sys.argv[1:] if argv is None else argv,
            prog="python -m apt.infer.remote_service",
            description=__doc__,
        )
        if config.status:
            return show_status(config)
        with EndWish() as wish:
            return serve(config, wish)
    except (CommandLineError, TransportError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def show_status(config: ServiceConfig) -> int:
    """Print what the service under ``config.uri`` says of itself. Raises TransportError."""
    with get_shm_proxy(config.uri, config.ns_host, config.ns_port, timeout=10.0) as service:
        print(status_report(service.status()))
    return 0


def serve(config: ServiceConfig, wish: EndWish) -> int:
    """Load, warm up, register, serve until ``wish`` is.

    Raises:
        CommandLineError, TransportError, OSError: what is wrong with the arguments, the name server or the port, before
            the model is loaded.
        CheckpointError, CheckpointMismatch: a checkpoint that is of no use.
    """
    config = config.named()
    config.check()
    _check_arguments(config)
    _check_name(config)
    try:
        wish.interrupting = True
        if wish.wished:
            raise KeyboardInterrupt
        # torch and the model's libraries take seconds to import; complaints and --status need not wait for them.
        from apt.infer.service_session import PolicyService

        config.check_model()
        try:
            server = ShmServer(lambda: service.session(), config.host, config.port, grace_s=_FINISH_S)
        except OSError as error:
            raise CommandLineError(
                f"cannot listen at {config.host}:{config.port} ({error}); --port wants a free one (0: any), --host a "
                "name or address of this machine"
            ) from error
        planner, checkpoint = config.load()
        service = PolicyService(planner, checkpoint, config.uri, server.clients)
        wish.interrupting = False  # the name must be removed again: the server does that at its end
        if wish.wished:
            raise KeyboardInterrupt  # the first was lost in a library's callback
        server.register(config.uri, config.ns_host, config.ns_port)
    except KeyboardInterrupt:
        print("stopped before it was ready", flush=True)
        return 0
    print(
        "\n".join(
            [
                f"ready: {config.uri} at {server.location.host}:{server.location.port}, name server "
                f"{config.ns_host}:{config.ns_port}, process {os.getpid()}; Ctrl-C or SIGTERM ends it",
                *(f"  {line}" for line in service.contract(planner).lines()),
            ]
        ),
        flush=True,
    )
    ended = threading.Event()
    reporter = threading.Thread(target=_report, args=(service, config.status_every, ended), daemon=True)
    if config.status_every > 0:
        reporter.start()
    server.serve_forever(wish)
    ended.set()
    print(f"ended: {status_line(service.status())}", flush=True)
    return 0


def _check_arguments(config: ServiceConfig) -> None:
    if not 0 <= config.ns_port < 1 << 16:
        raise CommandLineError(f"--ns_port is {config.ns_port}; wanted 0 to 65535")
    if not config.uri or config.uri.startswith("PYRO:"):
        raise CommandLineError(f"--uri is {config.uri!r}; wanted a plain name, such as apt_control")
    if not config.status_every >= 0:
        raise CommandLineError(f"--status_every is {config.status_every}; wanted seconds, or 0 for none")


def _check_name(config: ServiceConfig) -> None:
    """Raises TransportError where there is no name server, or the name belongs to a living service."""
    other = NameServer(config.ns_host, config.ns_port).find(config.uri)
    if other is not None and is_alive(other):
        raise TransportError(f"{config.uri!r} is a running service at {other}; end that one or choose another --uri")


def _report(service, every: float, ended: threading.Event) -> None:
    """A status line now and then, where something happened."""
    told = 0
    while not ended.wait(every):
        asked = service.log.answered + service.log.failed
        if asked != told:
            print(status_line(service.status()), flush=True)
        told = asked


if __name__ == "__main__":
    code = main()
    gc.freeze()  # the interpreter would look through all of torch for cycles as it ends, for seconds
    sys.exit(code)

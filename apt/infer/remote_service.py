"""A policy as a service: robots ask it by name, from other processes, environments or machines.

    pyro4-ns -p 9091
    python -m apt.infer.remote_service --ckpt checkpoints/APT/ft_apt_pp/ckpt_latest.pt --uri apt_control
    python -m apt.infer.remote_service --status

Every client has a planner session of its own (prompt, frames, ensemble, noise); queries run one at a time, in the order
in which they were asked. docs/inference.md shows both sides.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from apt.infer.service_status import status_line, status_report
from data_utils.cli import CommandLineError, parse
from shm_transport import TransportError, get_shm_proxy
from shm_transport.end_wish import EndWish
from shm_transport.names import NameServer
from shm_transport.server import ShmServer, is_alive
from train_utils.places import named_checkpoint

_FINISH_S = 7.0  # that a query in flight has when the service is told to stop


@dataclass(frozen=True)
class ServiceConfig:
    ckpt: Path | None = None
    """A run's ckpt_*.pt, its configuration beside it, an exported folder, or a run's name."""
    uri: str = "apt_control"
    """Name under which clients find the service."""
    host: str = "localhost"
    """Interface to listen on. Others than localhost are open to whoever reaches them: prefer an SSH tunnel."""
    port: int = 0
    """0: any free one."""
    ns_host: str = "localhost"
    """Where the name server runs (pyro4-ns -p 9091)."""
    ns_port: int = 9091
    ensemble: int = 4
    """Trajectories that are blended into the returned one; 0: none. Clients may choose another number."""
    ema: bool = False
    """Use the averaged weights."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default the first GPU where there is one."""
    compile: str = "none"
    """none, compile (torch.compile) or graphs (CUDA graphs too): faster queries after minutes of warm-up."""
    steps: int | None = None
    """Denoising steps; by default 20, of flow matching 10 or 4."""
    sampler: str | None = None
    """ddim, or dpm for few steps (8 to 10); of flow matching euler. By default the policy's own."""
    seed: int = 0
    """Of each session's noise."""
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
    if config.ckpt is not None:
        config = dataclasses.replace(config, ckpt=named_checkpoint(config.ckpt))
    _check_arguments(config)
    _check_name(config)
    try:
        wish.interrupting = True
        if wish.wished:
            raise KeyboardInterrupt
        # torch and the model's libraries take seconds to import; complaints and --status need not wait for them.
        from apt.checkpoint import checkpoint_sha256, read_config
        from apt.configs import train_config_from_dict
        from apt.infer.planner import TrajPlanner
        from apt.infer.policy import pick_device
        from apt.infer.service_session import Checkpoint, PolicyService
        from apt.infer.stages import check_compile_mode
        from apt.model.objectives.registry import make_objective

        check_compile_mode(config.compile, pick_device(config.device))
        trained, _ = train_config_from_dict(read_config(config.ckpt))
        make_objective(trained.objective).schedule(config.steps, config.sampler)
        try:
            server = ShmServer(lambda: service.session(), config.host, config.port, grace_s=_FINISH_S)
        except OSError as error:
            raise CommandLineError(
                f"cannot listen at {config.host}:{config.port} ({error}); --port wants a free one (0: any), --host a "
                "name or address of this machine"
            ) from error
        with ThreadPoolExecutor(1) as background:
            digest = background.submit(checkpoint_sha256, config.ckpt)
            print(f"loading {config.ckpt}", flush=True)
            planner = TrajPlanner(
                config.ckpt,
                config.device,
                config.ensemble,
                use_ema=config.ema,
                seed=config.seed,
                steps=config.steps,
                sampler=config.sampler,
                compile=config.compile,
            )
            planner.warm_up()
            name = f"{config.ckpt.resolve().parent.name}/{config.ckpt.name}"
            checkpoint = Checkpoint(name, digest.result(), config.ema)
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
    if config.ckpt is None:
        raise CommandLineError("--ckpt is missing: a run's ckpt_latest.pt or an exported folder")
    if not config.ckpt.exists():
        raise CommandLineError(f"--ckpt: there is no {config.ckpt}; check the path, or train one (scripts/train.sh)")
    if config.ckpt.is_dir() and (config.ckpt / "ckpt_latest.pt").is_file():
        raise CommandLineError(f"--ckpt: {config.ckpt} is a run's folder; name {config.ckpt / 'ckpt_latest.pt'}")
    for flag, port in (("--port", config.port), ("--ns_port", config.ns_port)):
        if not 0 <= port < 1 << 16:
            raise CommandLineError(f"{flag} is {port}; wanted 0 to 65535")
    if config.ensemble < 0:
        raise CommandLineError(f"--ensemble is {config.ensemble}; wanted 0 (off) or more")
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

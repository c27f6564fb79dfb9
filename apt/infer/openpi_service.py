"""A policy as openpi's websocket protocol serves it, for programs that were written for pi0.

    python -m apt.infer.openpi_service --ckpt checkpoints/APT/ft_apt_pp/ckpt_latest.pt --port 8000

A client gets the observation contract as its first message, then sends observations and gets action chunks. Every
connection is a planner session of its own; what is wrong with an observation comes back as a text, and the connection
stays. docs/integrations.md says what both sides look like.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import http
import signal
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apt.infer.openpi_profile import ProfileReader
from apt.infer.serving import ServedPolicy
from data_utils.cli import CommandLineError, parse

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request, Response

    from apt.infer.service_session import PolicyService

KEY_SCHEME = "Api-Key "
_FINISH_S = 7.0  # that queries in flight have when the service is told to stop
_OPENING_S = 30.0  # that a client has to become a websocket, also on a busy machine


@dataclass(frozen=True)
class OpenpiServiceConfig(ServedPolicy):
    host: str = "127.0.0.1"
    """Interface to listen on. Others than this are open to whoever reaches them: give an --api-key-file then."""
    port: int = 8000
    """0: any free one."""
    ensemble: int = 0
    """Trajectories that are blended into the returned one; 0: none. Wants the true times of frames."""
    profile: str | None = None
    """What observations are, where not frames of this library: libero:SCENE, or a YAML file (docs/integrations.md)."""
    queries_per_s: float | None = None
    """How often clients ask that do not say when: their frames are this far apart. By default the time that passes."""
    api_key_file: Path | None = None
    """File whose text clients must bring; by default all may ask."""
    tls_cert: Path | None = None
    """Certificate chain (PEM) for wss://, with --tls-key."""
    tls_key: Path | None = None
    """Its private key (PEM)."""
    max_connections: int = 16
    max_message_mb: float = 32.0
    """Messages larger than this end the connection."""


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. 0: ended as told to; 2: an error, said in one line."""
    try:
        config = parse(
            OpenpiServiceConfig,
            sys.argv[1:] if argv is None else argv,
            prog="python -m apt.infer.openpi_service",
            description=__doc__,
        )
        return serve(config)
    except KeyboardInterrupt:
        print("stopped before it was ready", flush=True)
        return 0
    except (CommandLineError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def serve(config: OpenpiServiceConfig) -> int:
    """Load, warm up, listen.

    Raises:
        CommandLineError, OSError: what is wrong with the arguments or the port.
        CheckpointError, CheckpointMismatch: a checkpoint that is of no use.
    """
    config = config.named()
    _check_arguments(config)
    config.check()
    profile = None if config.profile is None else ProfileReader(config.profile)
    key, context = _api_key(config.api_key_file), _tls(config)
    try:
        import msgpack  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise CommandLineError(f"{error.name} is missing; run: pip install msgpack websockets") from error
    from apt.infer.service_session import PolicyService

    config.check_model()
    planner, checkpoint = config.load()
    service = PolicyService(planner, checkpoint, "openpi", list)
    asyncio.run(OpenpiServer(service, config, key, profile).run(context))
    return 0


class OpenpiServer:
    """The sockets; what is asked is answered in threads, so that pings are answered meanwhile.

    Args:
        key: that clients must bring; None: all may ask.
        profile: what observations are; None: frames.
    Raises:
        CommandLineError: a clock or a profile that does not suit the policy.
    """

    def __init__(
        self, service: PolicyService, config: OpenpiServiceConfig, key: str | None, profile: ProfileReader | None = None
    ) -> None:
        self._service, self._config, self._key, self._profile = service, config, key, profile
        self._clock_step = _clock_step(config, service, profile)
        _check_suits(service, profile)
        self._connections = 0
        self._threads = ThreadPoolExecutor(config.max_connections, "openpi")
        self.port: int | None = None
        """Once it listens."""

    async def run(self, context: ssl.SSLContext | None = None) -> None:
        """Until SIGTERM or SIGINT. Raises ``OSError`` where it cannot listen."""
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told.set)
        async with self.listening(context):
            scheme = "ws" if context is None else "wss"
            print(f"ready: {scheme}://{self._config.host}:{self.port}; Ctrl-C or SIGTERM ends it", flush=True)
            for line in self._service.contract(self._service.planner).lines():
                print(f"  {line}", flush=True)
            await told.wait()
        log = self._service.log
        print(f"ended: {log.answered} queries answered, {log.failed} failed", flush=True)

    @contextlib.asynccontextmanager
    async def listening(self, context: ssl.SSLContext | None = None):
        """Context in which clients are served."""
        from websockets.asyncio.server import serve as listen

        config = self._config
        try:
            server = await listen(
                self._serve_connection,
                config.host,
                config.port,
                ssl=context,
                compression=None,
                max_size=int(config.max_message_mb * 1e6),
                max_queue=2,
                process_request=self._judge_request,
                open_timeout=_OPENING_S,
                close_timeout=_FINISH_S,
            )
        except OSError as error:
            raise OSError(
                f"cannot listen at {config.host}:{config.port} ({error.strerror or error}); --port wants a free one "
                "(0: any), --host a name or address of this machine"
            ) from error
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            await server.wait_closed()
            self._threads.shutdown(cancel_futures=True)

    def _judge_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Before the connection becomes a websocket."""
        if request.path.partition("?")[0] == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self._key is not None:
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode("utf-8", "replace"), (KEY_SCHEME + self._key).encode()):
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, "this service wants its API key\n")
        if self._connections >= self._config.max_connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "as many clients as are allowed are here\n")
        return None

    async def _serve_connection(self, connection: ServerConnection) -> None:
        from websockets.exceptions import ConnectionClosed

        from apt.infer.openpi_codec import pack
        from apt.infer.openpi_session import OpenpiSession

        loop = asyncio.get_running_loop()
        self._connections += 1
        try:
            session = await loop.run_in_executor(
                self._threads, OpenpiSession, self._service, self._clock_step, self._profile
            )
            await connection.send(pack(session.metadata()))
            async for message in connection:
                await connection.send(await loop.run_in_executor(self._threads, _answer, session, message))
        except ConnectionClosed:
            return
        finally:
            self._connections -= 1


def _answer(session, message: bytes | str) -> bytes | str:
    """A binary frame with the chunk, or a text that says what is wrong."""
    from apt.infer.openpi_codec import pack, unpack

    if isinstance(message, str):
        return "the observation came as a text; wanted a binary frame of msgpack"
    try:
        return pack(session.answer(unpack(message)))
    except ValueError as error:
        return str(error)


def _clock_step(config: OpenpiServiceConfig, service: PolicyService, profile: ProfileReader | None) -> float | None:
    """Between two observations that do not say when, in the policy's unit; None: the time that passes. Raises
    ``CommandLineError``: the policy counts control steps, which pass in no time that is known here."""
    contract = service.contract(service.planner)
    if contract.time_unit == "seconds":
        return None if config.queries_per_s is None else 1.0 / config.queries_per_s
    if config.queries_per_s is not None:
        raise CommandLineError("--queries-per-s is of policies that count seconds; this one counts control steps")
    steps = None if profile is None else profile.profile.control_steps_per_query
    return contract.time_step if steps is None else float(steps)


def _check_suits(service: PolicyService, profile: ProfileReader | None) -> None:
    """Raises ``CommandLineError`` where a profile lacks what the policy looks at, or wants what that cannot say."""
    if profile is None:
        return
    contract, told = service.contract(service.planner), profile.profile
    if missing := [name for name in contract.config.cameras if name not in told.cameras]:
        raise CommandLineError(
            f"--profile {profile.name} has no camera {missing[0]}, which the policy looks at; it has "
            f"{', '.join(told.cameras)}: name the policy's cameras in the profile"
        )
    if told.actions.kind == "deltas" and contract.time_unit != "control steps":
        raise CommandLineError(
            f"--profile {profile.name} answers with a row per control step; the policy counts seconds"
        )


def _check_arguments(config: OpenpiServiceConfig) -> None:
    if config.max_connections < 1 or not config.max_message_mb > 0:
        raise CommandLineError("--max-connections and --max-message-mb want more than nothing")
    if config.queries_per_s is not None and not config.queries_per_s > 0:
        raise CommandLineError(f"--queries-per-s is {config.queries_per_s}; wanted a number above 0")
    if (config.tls_cert is None) != (config.tls_key is None):
        raise CommandLineError("--tls-cert and --tls-key go together")


def _api_key(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandLineError(f"--api-key-file {file} cannot be read ({error})") from error
    if not key:
        raise CommandLineError(f"--api-key-file {file} is empty; wanted the key that clients bring")
    return key


def _tls(config: OpenpiServiceConfig) -> ssl.SSLContext | None:
    if config.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise CommandLineError(f"--tls-cert {config.tls_cert} with --tls-key {config.tls_key}: {error}") from error
    return context


if __name__ == "__main__":
    code = main()
    gc.freeze()  # the interpreter would look through all of torch for cycles as it ends, for seconds
    sys.exit(code)

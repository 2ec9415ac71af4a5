"""Runs the embedded trainer on a socket, or inside this process without one."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial

import httpx
import uvicorn

from mintjax.client import ServiceClient
from mintjax.errors import ConfigError
from mintjax.local.access import check_exposure
from mintjax.local.app import application
from mintjax.local.connections import Connection
from mintjax.local.dialects import Dialect, dialect_of
from mintjax.local.engine import Engine
from mintjax.local.limits import DEFAULT_LIMITS, Limits
from mintjax.protocol.messages import ClientConfigResponse
from mintjax.step.reduction import SUM


@contextmanager
def trainer(
    engine: Engine | None = None,
    *,
    api_key: str | None = None,
    config: ClientConfigResponse | None = None,
    like: str | Dialect | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Generator[ServiceClient]:
    """Runs the embedded trainer inside this process, without a socket.

    Args:
        engine: the trainer; a new one, closed with the block, if None. Pass one to choose its
            options, or to look at its models and gradients.
        api_key: as ``running_server`` has it; the client gets it.
        config: as ``running_server`` has it.
        like: as ``running_server`` has it.
        limits: as ``running_server`` has it.

    Yields:
        A client of it.
    """
    dialect = dialect_of(like)
    with (
        _engine(engine, dialect) as engine,
        application(
            engine,
            api_key=api_key,
            config=config,
            dialect=dialect,
            limits=limits,
        ) as app,
    ):
        transport = httpx.ASGITransport(app)
        with ServiceClient(
            "http://localhost", api_key or "tml-local", transport=transport
        ) as service:
            yield service


@contextmanager
def running_server(
    engine: Engine | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
    config: ClientConfigResponse | None = None,
    like: str | Dialect | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Generator[str]:
    """Runs the embedded trainer on a socket, in a thread of this process.

    Args:
        engine: the trainer; a new one, closed with the block, if None.
        host: the address to listen on.
        port: 0 takes a free one.
        api_key: required of every request if given.
        config: what ``client/config`` asks of clients, such as protocol buffers
            (``proto_write_fwdbwd``), compressed (``proto_compress_fwdbwd``).
        like: the trainer to play, by its name in :data:`~mintjax.local.DIALECTS`, such as
            ``"skyrl-0.4"``, or as a :class:`~mintjax.local.Dialect`; none if None.
        limits: bounds on what clients can make the trainer hold.

    Yields:
        The base URL.

    Raises:
        ConfigError: there is no trainer of that name to play, or the engine divides losses by
            something else.
        OSError: the address cannot be listened on.
    """
    dialect = dialect_of(like)
    with (
        _listening(host, port) as listener,
        _engine(engine, dialect) as engine,
        ExitStack() as stack,
    ):
        app = application(
            engine,
            api_key=api_key,
            config=config,
            dialect=dialect,
            limits=limits,
        )
        server = _server(stack.enter_context(app), limits)
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="mintjax-server", daemon=True
        )
        thread.start()
        try:
            yield _url(listener)
        finally:
            stack.close()  # ends the waiting for results, which would hold the server up
            server.should_exit = True
            thread.join()


def serve(
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    engine: Engine | None = None,
    api_key: str | None = None,
    config: ClientConfigResponse | None = None,
    like: str | Dialect | None = None,
    limits: Limits = DEFAULT_LIMITS,
    announce: Callable[[str], None] = print,
    open_to_all: bool = False,
) -> None:
    """Runs the embedded trainer on a socket until it is interrupted (Ctrl-C) or terminated.

    Args:
        host: the address to listen on.
        port: 0 takes a free one.
        engine: the trainer; a new one if None.
        api_key: required of every request if given.
        config: what ``client/config`` asks of clients, such as protocol buffers
            (``proto_write_fwdbwd``), compressed (``proto_compress_fwdbwd``).
        like: as ``running_server`` has it.
        limits: bounds on what clients can make the trainer hold.
        announce: called with the base URL once connections are taken.
        open_to_all: let other machines use it although it asks for no key.

    Raises:
        ConfigError: other machines can reach the address, no key is asked for, and that is not
            meant; or as ``running_server`` has it.
        OSError: the address cannot be listened on.
    """
    check_exposure(host, api_key, open_to_all)
    dialect = dialect_of(like)
    with (
        _listening(host, port) as listener,
        _engine(engine, dialect) as engine,
        application(engine, api_key=api_key, config=config, dialect=dialect, limits=limits) as app,
    ):
        if threading.current_thread() is threading.main_thread():
            # uvicorn, when done, raises the signal again: this way blocks still end in order
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        server = _server(app, limits)
        with suppress(KeyboardInterrupt):
            announce(_url(listener))
            server.run(sockets=[listener])


def _engine(engine: Engine | None, dialect: Dialect) -> Engine | nullcontext[Engine]:
    if engine is None:
        return Engine(reduction=dialect.reduction or SUM)
    if dialect.reduction not in (None, engine.reduction):
        raise ConfigError(
            f"like: that trainer's losses are {dialect.reduction}, and this engine's "
            f"{engine.reduction}. Pass Engine(reduction=...), or no engine"
        )
    return nullcontext(engine)


def _listening(host: str, port: int) -> socket.socket:
    # The socket listens before the server runs, so that no client comes too early.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=2048)
    # asyncio sets TCP_NODELAY only on a socket that names its protocol, which create_server leaves
    # at 0. Without it Nagle's algorithm delays an answer by the 40 ms of a delayed acknowledgement.
    return socket.socket(family, listener.type, socket.IPPROTO_TCP, fileno=listener.detach())


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _server(app: object, limits: Limits) -> uvicorn.Server:
    config = uvicorn.Config(
        app,  # pyright: ignore[reportArgumentType]
        http=partial(Connection, limits),  # pyright: ignore[reportArgumentType]
        lifespan="off",
        ws="none",
        log_config=None,  # uvicorn's own closes every handler of the process, files among them
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)

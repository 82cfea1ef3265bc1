"""The connection to a fleet: a Dask scheduler that is there, or one that is started over ssh or on this host.

A Dask client can have anything run on every host, so a connection that others can read or take over is refused: TLS,
or addresses of the loopback interface, unless the user says otherwise. Dask listens where its scheduler and workers
need it; of the clusters that are started here nothing listens for browsers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import re
import shlex
import signal
import socket
import ssl
import sys
import threading
import warnings
from importlib.util import find_spec
from multiprocessing import resource_tracker, util

from ..errors import Failed, HostpartError, UsageError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
    from types import FrameType
    from typing import Any, TypeVar

    T = TypeVar("T")

__all__ = ["CONNECT_S", "PRELOAD", "Cluster", "Where", "connect", "need", "quiet", "read_hostfile", "run"]

CONNECT_S = 10.0  # how long a scheduler may be out of reach, now and when its connection breaks
PRELOAD = "hostpart.fleet.agent"

_APART = "hostpart.fleet.apart"
_PROBE_S = 3.0  # to find out why there is no connection
_START_S = 120.0  # for a cluster of our own; a worker's process has all of Dask to import
_VERSIONS_S = 10.0
_PLAIN = ("tcp", "ws", "ucx")
_ENCRYPTED = ("tls", "wss")
_LOGGERS = ("distributed", "distributed.client", "distributed.gc", "bokeh", "tornado", "tornado.application",
            "asyncio", "asyncssh")  # fmt: skip
_COMPARED = ("python", "dask", "distributed", "cloudpickle", "msgpack")
_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,40}", re.ASCII)
_HOSTNAME = re.compile(r"(?:[A-Za-z0-9_.-]+@)?[A-Za-z0-9_.:%-]{1,255}", re.ASCII)
_LOOPBACK = "127.0.0.1"
_TLS_OPTIONS = "--tls-ca, --tls-cert and --tls-key, or distributed.comm.tls in Dask's configuration"
# What a cluster that is started here has otherwise than Dask's defaults. The pages that schedulers and workers offer to
# browsers go; the empty servers that are left listen on the loopback interface. A task that brings its worker down may
# have begun something on the host, so Dask must not try it on the next one.
_OURS: Mapping[str, object] = {
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
}
_SCHEDULER_OPTIONS = {"dashboard": False, "dashboard_address": f"{_LOOPBACK}:0"}
_WORKER_OPTIONS = {**_SCHEDULER_OPTIONS, "nthreads": 1, "memory_limit": 0, "preload": [PRELOAD]}


class Where(Value):
    """Which fleet, and how it may be reached.

    :ivar scheduler: an address (``tls://host:port``, ``host:port``), or the path of what ``--scheduler-file`` wrote
    :ivar ssh: the path of a file with a host per line
    :ivar local: how many workers to start on this host
    :ivar tls_ca: the CA's certificate (PEM); what is empty is taken from Dask's configuration
    :ivar tls_cert: this client's certificate
    :ivar tls_key: its key, where that is a file of its own
    :ivar insecure: whether plain text may leave this host
    """

    scheduler: str = ""
    ssh: str = ""
    local: int = 0
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    insecure: bool = False


class Cluster:
    """A fleet that is connected.

    :ivar client: the ``distributed.Client``, asynchronous
    :ivar address: the scheduler's
    :ivar notes: sentences that the user should read
    :ivar ours: whether it was started for this connection, and ends with it
    """

    def __init__(
        self,
        client: Any,
        address: str,
        notes: Sequence[str],
        ours: bool,
        anew: Callable[[], Awaitable[tuple[Any, list[str]]]] | None = None,
    ) -> None:
        self.client = client
        self.address = address
        self.notes = tuple(notes)
        self.ours = ours
        self._anew = anew

    async def reach(self) -> Any:
        """Return the client once more, connected: another one where Dask's own has given up to reconnect.

        :raises OSError: where the scheduler is not to be reached now
        """
        if self.client.status == "running":
            return self.client
        if self.client.status == "connecting" or self._anew is None:
            raise ConnectionError(f"no connection to {self.address} now")
        try:
            self.client, _ = await self._anew()
        except HostpartError as error:
            raise ConnectionError(str(error)) from None
        return self.client


def need() -> None:
    """Refuse where Dask is missing. Imports nothing of it.

    :raises UsageError: saying what to install
    """
    if find_spec("distributed") is None:
        raise UsageError("a fleet needs Dask's distributed, which is not installed", "pip install 'hostpart[fleet]'")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run *main* in an event loop of its own, with Dask's log kept off the terminal until the loop is gone."""
    try:
        with quiet():
            return asyncio.run(main)
    finally:
        main.close()  # it has not begun where Ctrl-C was earlier


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Dask and what is below it logs off the terminal: hostpart says itself what went wrong.

    Warnings are kept back likewise.
    """
    if find_spec("distributed") is not None:
        # It sets up its handlers when it is imported; done later, that would undo this.
        import distributed  # noqa: F401
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:] = [logging.NullHandler()]
        logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers[:] = handlers
            logger.propagate = propagate


@contextlib.asynccontextmanager
async def connect(where: Where) -> AsyncIterator[Cluster]:
    """Connect to the fleet, which is started before and ended after where *where* asks for that.

    :raises UsageError: before any packet is sent, where the connection would be open to others, certificates are
        missing or no fleet is named
    :raises Failed: where there is no connection, with the reason
    """
    need()
    if sum(map(bool, (where.scheduler, where.ssh, where.local))) > 1:
        raise UsageError("--scheduler, --ssh and --local exclude each other", "give one of them")
    with quiet():
        if where.local:
            starting = _local(where)
        elif where.ssh:
            starting = _over_ssh(where)
        else:
            starting = _there(where)
        async with starting as fleet:
            yield fleet


# A scheduler that is there


class _Endpoint(Value):
    scheme: str
    host: str
    port: int

    @property
    def encrypted(self) -> bool:
        return self.scheme in _ENCRYPTED

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


@contextlib.asynccontextmanager
async def _there(where: Where) -> AsyncIterator[Cluster]:
    import dask.config

    named = where.scheduler or dask.config.get("scheduler-address", "") or ""
    if not named:
        raise UsageError(
            "no fleet is named", "add --scheduler ADDRESS, --ssh HOSTFILE, or --local 2 to try it on this host"
        )
    endpoint = _endpoint(_address(named), tls=_tls_wanted(where))
    notes = []
    security = None
    if endpoint.encrypted:
        security = _security(where)
    else:
        if where.tls_ca or where.tls_cert or where.tls_key:
            raise UsageError(
                f"{endpoint} is plain text, and certificates are given for it",
                f"write {_encrypted(endpoint)} where the scheduler speaks TLS, or leave the certificates out",
            )
        endpoint, note = await _allowed(endpoint, where.insecure)
        notes += note
    spoken = security or _plain_security()

    async def anew() -> tuple[Any, list[str]]:
        return await _client(str(endpoint), spoken, endpoint)

    client, said = await anew()
    fleet = Cluster(client, str(endpoint), (*notes, *said), False, anew)
    try:
        yield fleet
    finally:
        await _closed(fleet.client)


def _tls_wanted(where: Where) -> bool:
    # Of an address that doesn't say how to speak.
    import dask.config

    return bool(
        where.tls_ca
        or where.tls_cert
        or where.tls_key
        or dask.config.get("distributed.comm.require-encryption", None)
        or dask.config.get("distributed.comm.default-scheme", "tcp") in _ENCRYPTED
    )


def _address(named: str) -> str:
    if "://" in named or ("/" not in named and not os.path.exists(named)):
        return named
    remedy = "give the file that 'dask scheduler --scheduler-file FILE' has written, or an ADDRESS"
    try:
        with open(named, encoding="utf-8") as file:
            document = json.loads(file.read(1 << 20))
    except OSError as error:
        raise UsageError(f"--scheduler {named!r} can't be read: {error.strerror}", remedy) from None
    except ValueError:
        raise UsageError(f"--scheduler {named!r} is neither an address nor JSON", remedy) from None
    address = document.get("address") if isinstance(document, dict) else None
    if not isinstance(address, str):
        raise UsageError(f"{named!r} has no scheduler's address", remedy)
    return address


def _endpoint(address: str, *, tls: bool = False) -> _Endpoint:
    scheme, sep, rest = address.rpartition("://")
    if not sep:
        scheme = "tls" if tls else "tcp"
    remedy = "write it as tls://HOST:PORT, tcp://HOST:PORT or HOST:PORT"
    if scheme not in _PLAIN + _ENCRYPTED:
        raise UsageError(f"{address!r} is no scheduler's address: {scheme!r} is no way to reach one", remedy)
    found = re.fullmatch(r"(?:\[([^\]/]+)\]|([^:/\[\]]+)):([0-9]{1,5})/?", rest, re.ASCII)
    if not found or not _HOSTNAME.fullmatch(found[1] or found[2]) or not 0 < int(found[3]) < 65536:
        raise UsageError(f"{address!r} is no scheduler's address", remedy)
    return _Endpoint(scheme, found[1] or found[2], int(found[3]))


def _encrypted(endpoint: _Endpoint) -> _Endpoint:
    return endpoint.replace(scheme="wss" if endpoint.scheme == "ws" else "tls")


async def _allowed(endpoint: _Endpoint, insecure: bool) -> tuple[_Endpoint, list[str]]:
    """Return where plain text may be sent, and what to say about it."""
    addresses = await _resolved(endpoint.host, endpoint.port)
    if all(map(_is_loopback, addresses)):
        # The name is not asked for again: what was looked at is what is connected to.
        return endpoint.replace(host=_listening(addresses, endpoint.port)), []
    if not insecure:
        raise UsageError(
            f"{endpoint} is plain text over a network: whoever is on it could read all of it, and run commands as you "
            "on every host",
            f"start scheduler and workers with TLS and write {_encrypted(endpoint)}; with --insecure it is done anyway",
        )
    return endpoint, [f"{endpoint} is plain text over a network: whoever is on it can run commands as you on the hosts"]


async def _resolved(host: str, port: int) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Failed(f"no address is known for the host {host!r}: {reason}", "see to its spelling, or to DNS") from None
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def _is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


def _listening(addresses: Sequence[str], port: int) -> str:
    # "localhost" is two addresses, and a scheduler listens on one of them.
    for address in addresses[:-1]:
        try:
            with socket.create_connection((address, port), timeout=1):
                return address
        except OSError:
            continue
    return addresses[-1]


# TLS


def _plain_security() -> Any:
    from distributed.security import Security

    return Security(require_encryption=False)


def _security(where: Where) -> Any:
    import dask.config
    from distributed.security import Security

    files: dict[str, Any] = {
        "--tls-ca": where.tls_ca or dask.config.get("distributed.comm.tls.ca-file", None),
        "--tls-cert": where.tls_cert or dask.config.get("distributed.comm.tls.client.cert", None),
        # A certificate that is given brings its key, in the same file or with --tls-key.
        "--tls-key": where.tls_key or (None if where.tls_cert else dask.config.get("distributed.comm.tls.client.key")),
    }
    missing = [option for option in ("--tls-ca", "--tls-cert") if not files[option]]
    if missing:
        raise UsageError(f"TLS needs certificates: {' and '.join(missing)} not given", f"give {_TLS_OPTIONS}")
    for option, path in files.items():
        if path:
            _check_readable(option, path)
            files[option] = os.path.abspath(path)  # where it goes to other hosts, no directory is current
    security = Security(
        require_encryption=True,
        tls_ca_file=files["--tls-ca"],
        tls_client_cert=files["--tls-cert"],
        tls_client_key=files["--tls-key"],
    )
    _check_certificates(files["--tls-ca"], files["--tls-cert"], files["--tls-key"])
    return security


def _check_readable(option: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise UsageError(f"{option} {path!r} can't be read: {error.strerror}", f"give {_TLS_OPTIONS}") from None


def _check_certificates(ca: str, cert: str, key: str | None) -> None:
    # Dask would have OpenSSL ask for a key's pass phrase on the terminal, once per connection.
    def no_phrase() -> str:
        raise UsageError(
            f"the key {key or cert!r} has a pass phrase, for which Dask can't ask",
            f"'openssl pkey -in {shlex.quote(key or cert)} -out PLAIN.pem', and keep that file yours alone",
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise UsageError(f"{ca!r} holds no CA's certificate: {_reason(error)}", "give the PEM file") from None
    try:
        context.load_cert_chain(cert, key, no_phrase)
    except ssl.SSLError as error:
        raise UsageError(
            f"the certificate {cert!r} and its key {key or cert!r} can't be used: {_reason(error)}",
            "give a certificate with --tls-cert and its own key with --tls-key, as PEM files",
        ) from None


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or error.strerror or str(error)).replace("_", " ").lower()


# The client


async def _client(address: str, security: Any, endpoint: _Endpoint, cluster: Any = None) -> tuple[Any, list[str]]:
    from distributed import Client

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        client = Client(
            cluster or address, asynchronous=True, set_as_default=False, direct_to_workers=False, security=security,
            timeout=CONNECT_S, name="hostpart",
        )  # fmt: skip
        try:
            # What answers but is no scheduler can keep Dask waiting for ever.
            await asyncio.wait_for(client, CONNECT_S + _PROBE_S)
        except Exception as error:  # whatever is at the other end, it may answer anything
            await _closed(client)
            raise await _no_connection(endpoint, security, error) from None
        except BaseException:
            await _closed(client)
            raise
    differ = any(type(one.message).__name__ == "VersionMismatchWarning" for one in said)
    return client, await _version_notes(client) if differ else []


async def _closed(client: Any) -> None:
    # A connection that is gone can't be closed in good order, and there is nobody to tell.
    with contextlib.suppress(Exception):
        await asyncio.wait_for(client.close(), _PROBE_S)


async def _no_connection(endpoint: _Endpoint, security: Any, error: Exception) -> HostpartError:
    """Return the reason why there is no connection, found by one attempt without Dask."""
    start = "start one ('dask scheduler'), or see to the address; hosts join it with 'dask worker ADDRESS"
    start += f" --nthreads 1 --preload {PRELOAD}'"
    try:
        await _resolved(endpoint.host, endpoint.port)
        if endpoint.encrypted:
            context = security.get_connection_args("client")["ssl_context"]
            return await _tls_reason(endpoint, context)
        return await _plain_reason(endpoint)
    except HostpartError as known:
        return known
    except ConnectionRefusedError:
        return Failed(f"nobody listens at {endpoint}, for {CONNECT_S:g} s", start)
    except (OSError, EOFError, ValueError) as reason:
        text = "it does not answer" if isinstance(reason, TimeoutError) else reason.__class__.__name__
        if isinstance(reason, OSError) and reason.strerror:
            text = reason.strerror
        return Failed(f"no connection to {endpoint}: {text}", start)
    finally:
        del error  # its frames hold the client


async def _plain_reason(endpoint: _Endpoint) -> HostpartError:
    if await _first_byte(endpoint, None):
        return Failed(f"{endpoint} does not answer as a Dask scheduler should", "see to the address and to its log")
    # Silence: a server of TLS waits for the client's first word.
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname = False
    anyone.verify_mode = ssl.CERT_NONE
    try:
        await _first_byte(endpoint, anyone)
    except ssl.SSLError as error:
        if "CERTIFICATE" not in (error.reason or ""):
            return Failed(f"what listens at {endpoint} is no Dask scheduler", "see to the address")
    except (OSError, EOFError):
        return Failed(f"what listens at {endpoint} is no Dask scheduler", "see to the address")
    return Failed(
        f"what listens at {endpoint} wants TLS", f"write {_encrypted(endpoint)}, with {_TLS_OPTIONS}"
    )  # fmt: skip


async def _tls_reason(endpoint: _Endpoint, context: ssl.SSLContext) -> HostpartError:
    try:
        await _first_byte(endpoint, context)
    except ssl.SSLCertVerificationError as error:
        return Failed(
            f"the certificate of {endpoint} is not accepted: {error.verify_message}",
            "give the CA that signed it with --tls-ca; where it has expired, the scheduler needs a new one",
        )
    except ssl.SSLError as error:
        reason = error.reason or ""
        if "ALERT" in reason:  # said by the other side
            return Failed(
                f"{endpoint} does not accept this client's certificate: {_reason(error)}",
                "give one with --tls-cert that its CA has signed and that has not expired",
            )
        return Failed(
            f"what listens at {endpoint} speaks no TLS that is known here: {_reason(error)}",
            "see to the address; a scheduler has TLS where it is started with --protocol tls and --tls-ca-file, "
            "--tls-cert, --tls-key",
        )
    return Failed(f"{endpoint} does not answer as a Dask scheduler should", "see to the address and to its log")


async def _first_byte(endpoint: _Endpoint, context: ssl.SSLContext | None) -> bytes:
    """Connect, and return what the other side says unasked: a scheduler says who it is, others wait (empty)."""
    async with asyncio.timeout(_PROBE_S):
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context)
    try:
        # With TLS 1.3, what the other side thinks of this client's certificate comes with the first byte.
        return await asyncio.wait_for(reader.read(1), _PROBE_S)
    except TimeoutError:
        return b""
    finally:
        writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(writer.wait_closed(), 1)


async def _version_notes(client: Any) -> list[str]:
    """Return a sentence for each package of which not all have the same version."""
    try:
        versions = await asyncio.wait_for(client.get_versions(), _VERSIONS_S)
        by_place = {
            "here": [versions["client"]],
            "at the scheduler": [versions["scheduler"]],
            "at hosts": list(versions["workers"].values()),
        }
    except Exception:  # what others answer
        return ["Dask says that not all have the same versions of it, and not which"]
    notes = []
    for package in _COMPARED:
        have = {place: sorted({_version_of(one, package) for one in ones}) for place, ones in by_place.items()}
        if len({version for ones in have.values() for version in ones}) > 1:
            told = "; ".join(f"{place} {', '.join(ones)}" for place, ones in have.items() if ones)
            notes.append(f"versions of {package} differ: {told}; where it does not work, install the same everywhere")
    return notes


def _version_of(document: object, package: str) -> str:
    packages = document.get("packages") if isinstance(document, dict) else None
    version = packages.get(package) if isinstance(packages, dict) else None
    if version is None:
        return "none"
    return version if isinstance(version, str) and _VERSION.fullmatch(version) else "unknown"


# Clusters that are started here


@contextlib.asynccontextmanager
async def _local(where: Where) -> AsyncIterator[Cluster]:
    import dask.config
    from distributed import LocalCluster

    if where.tls_ca or where.tls_cert or where.tls_key:
        raise UsageError("--local makes certificates of its own", "leave --tls-ca, --tls-cert and --tls-key out")
    notes = [f"{where.local} local worker{'s share' if where.local > 1 else ' uses'} this host's pCPUs and its leases"]
    security = _own_security()
    if not security.require_encryption:
        notes.append("any user of this host can connect to its scheduler meanwhile: pip install cryptography")
    with contextlib.ExitStack() as last, dask.config.set(_OURS):
        # hostpart leaves without atexit, and multiprocessing's helper would complain of the semaphores left to it.
        last.callback(util._run_finalizers, 0)  # type: ignore[attr-defined]
        cluster = LocalCluster(
            n_workers=where.local, threads_per_worker=1, processes=True, host=_LOOPBACK, dashboard_address=None,
            worker_dashboard_address=None, silence_logs=logging.CRITICAL, asynchronous=True, security=security,
            protocol="tls://" if security.require_encryption else "tcp://", memory_limit=0, preload=[_APART, PRELOAD],
            scheduler_kwargs=_SCHEDULER_OPTIONS,
        )  # fmt: skip
        async with _started(cluster, security, "a worker of this host", where.local, deaf=True) as (client, said):
            yield Cluster(client, cluster.scheduler_address, (*notes, *said), ours=True)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    # Processes inherit what the thread that starts them blocks, and Dask's thread for that inherits it from here.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # multiprocessing's own helper, which it would else start in between, to unblock SIGINT whatever it was before.
    resource_tracker.ensure_running()
    came = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came += 1
        if came > 1 and callable(handler):
            handler(number, frame)

    # Another thread can still be given it, and what is half started is not ended in good order. Asked twice, it ends.
    handler = signal.signal(signal.SIGINT, note)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _own_security() -> Any:
    # On the loopback interface there are the host's other users.
    from distributed.security import Security

    if find_spec("cryptography") is None:
        return _plain_security()
    return Security.temporary()


@contextlib.asynccontextmanager
async def _started(
    cluster: Any, security: Any, noun: str, workers: int, *, deaf: bool = False
) -> AsyncIterator[tuple[Any, list[str]]]:
    try:
        try:
            # The terminal's Ctrl-C is this process's to answer, and not the end of all workers.
            with _interrupts_later() if deaf else contextlib.nullcontext():
                await asyncio.wait_for(cluster, _START_S)
        except Exception as error:  # Dask wraps what its parts have raised into RuntimeError, or does not
            # Not TimeoutError's empty text, and one line of what may be many.
            text = (str(error) or error.__class__.__name__).strip().splitlines()[-1][:300]
            raise Failed(
                f"{noun} could not be started: {text!r}", f"try it there: python -c 'import {PRELOAD}'"
            ) from None
        endpoint = _endpoint(cluster.scheduler_address)
        client, said = await _client(str(endpoint), security, endpoint, cluster)
        try:
            # Over ssh a worker counts as started before it has registered.
            try:
                await client.wait_for_workers(workers, timeout=_START_S)
            except TimeoutError:
                raise Failed(
                    f"not all {workers} workers have come within {_START_S:g} s",
                    "see whether the hosts can connect to the first of them, where the scheduler is",
                ) from None
            yield client, said
        finally:
            await _closed(client)
    finally:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(cluster.close(), _START_S)


# Over ssh


def read_hostfile(path: str) -> tuple[str, ...]:
    """Return the hosts that a file names, one per line, as ``host`` or ``user@host``; ``#`` begins a comment.

    :raises UsageError: where it can't be read, names none, one twice, or something that is no host
    """
    remedy = "write a host per line, such as: user@host"
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read(1 << 20).splitlines()
    except OSError as error:
        raise UsageError(f"--ssh {path!r} can't be read: {error.strerror}", remedy) from None
    except ValueError:
        raise UsageError(f"--ssh {path!r} is no text", remedy) from None
    hosts: list[str] = []
    for number, line in enumerate(lines, 1):
        host = line.partition("#")[0].strip()
        if not host:
            continue
        if not _HOSTNAME.fullmatch(host) or host.startswith("-"):
            raise UsageError(f"{path}, line {number}: {host!r} is no host", remedy)
        if host in hosts:
            raise UsageError(f"{path}, line {number}: {host} is named twice", "a host runs one worker: leave one out")
        hosts.append(host)
    if not hosts:
        raise UsageError(f"{path} names no host", remedy)
    return tuple(hosts)


@contextlib.asynccontextmanager
async def _over_ssh(where: Where) -> AsyncIterator[Cluster]:
    import dask.config
    from distributed import SSHCluster

    hosts = read_hostfile(where.ssh)
    if find_spec("asyncssh") is None:
        raise UsageError("--ssh needs asyncssh, which is not installed", "pip install asyncssh")
    names = [host.rpartition("@")[2] for host in hosts]
    encrypted = _tls_wanted(where)
    config = dict(_OURS)
    paths: list[str] = []
    notes: list[str] = []
    loopback = False
    if encrypted:
        security = _security(where)
        paths = [path for path in (security.tls_ca_file, security.tls_client_cert, security.tls_client_key) if path]
        config |= _tls_everywhere(security)
        notes.append(f"the hosts use their own files of these names for TLS: {', '.join(paths)}")
    else:
        security = _plain_security()
        addresses = [address for name in names for address in await _resolved(name, 22)]
        loopback = all(map(_is_loopback, addresses))
        if not loopback and not where.insecure:
            raise UsageError(
                "ssh starts the workers, but what Dask says then is plain text over the network: whoever is on it "
                "could run commands as you on every host",
                f"give {_TLS_OPTIONS}, as paths that are right on every host; with --insecure it is done anyway",
            )
        if not loopback:
            notes.append("Dask speaks plain text to the hosts: whoever is on the network can run commands as you there")
    python = os.environ.get("HOSTPART_FLEET_PYTHON") or sys.executable
    await _check_hosts(hosts, python, paths)
    address = {"host": _LOOPBACK} if loopback else {}
    protocol = {"protocol": "tls://" if encrypted else "tcp://"}
    with dask.config.set(config):
        cluster = SSHCluster(
            # The first of them is the scheduler's, and it runs a worker like all others.
            [hosts[0].rpartition("@")[2], *names],
            connect_options=[_ssh_options(host) for host in (hosts[0], *hosts)],
            scheduler_options={**_SCHEDULER_OPTIONS, **address, **protocol},
            worker_options={**_WORKER_OPTIONS, **address, **protocol},
            remote_python=shlex.quote(python),
            asynchronous=True,
            security=security,
        )
        async with _started(cluster, security, "a host's worker", len(hosts)) as (client, said):
            yield Cluster(client, cluster.scheduler_address, (*notes, *said), ours=True)


def _tls_everywhere(security: Any) -> dict[str, object]:
    # SSHCluster hands Dask's configuration on to the processes that it starts.
    config: dict[str, object] = {
        "distributed.comm.require-encryption": True,
        "distributed.comm.tls.ca-file": security.tls_ca_file,
    }
    for role in ("client", "scheduler", "worker"):
        config[f"distributed.comm.tls.{role}.cert"] = security.tls_client_cert
        config[f"distributed.comm.tls.{role}.key"] = security.tls_client_key
    return config


def _ssh_options(host: str) -> dict[str, object]:
    user = host.rpartition("@")[0]
    # known_hosts is left alone: asyncssh then checks hosts as ssh does, against the user's file.
    return {"connect_timeout": CONNECT_S, "login_timeout": CONNECT_S, **({"username": user} if user else {})}


async def _check_hosts(hosts: Sequence[str], python: str, paths: Sequence[str]) -> None:
    """See that every host can be logged in to and has what its worker needs; SSHCluster says neither which nor why.

    :raises Failed: naming every host that has not
    """
    found = await asyncio.gather(*(_fault(host, python, paths) for host in hosts))
    faults = [f"{host}: {fault}" for host, fault in zip(hosts, found, strict=True) if fault]
    if faults:
        raise Failed(
            "\n  ".join(["these hosts can't be used:" if len(faults) > 1 else "this host can't be used:", *faults]),
            "mend them, or take them out of the file; HOSTPART_FLEET_PYTHON says which Python is hostpart's there",
        )


async def _fault(host: str, python: str, paths: Sequence[str]) -> str:
    import asyncssh

    command = f"{shlex.quote(python)} -c 'import distributed, {PRELOAD}'"
    try:
        async with asyncssh.connect(host.rpartition("@")[2], **_ssh_options(host)) as connection:
            for path in paths:
                if (await connection.run(f"test -r {shlex.quote(path)}")).exit_status:
                    return f"it has no {path!r} for TLS"
            done = await asyncio.wait_for(connection.run(command), _START_S)
    except asyncssh.HostKeyNotVerifiable as error:
        return f"its key is not the one in known_hosts, or there is none ({error.reason}): log in once with ssh"
    except asyncssh.PermissionDenied as error:
        return f"ssh is not let in: {error.reason!r}"
    except asyncssh.Error as error:
        return f"ssh says {error.reason!r}"
    except TimeoutError:
        return "it does not answer"
    except OSError as error:
        return f"no connection: {error.strerror or error}"
    if done.exit_status == 0:
        return ""
    said = str(done.stderr or "").strip().splitlines()
    return f"{python} there lacks what a worker needs: {(said[-1] if said else 'no word why')[:200]!r}"

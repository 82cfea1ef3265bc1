from __future__ import annotations

import asyncio
import getpass
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostpart.errors import Failed, HostpartError, UsageError
from hostpart.fleet import cluster
from hostpart.fleet.cluster import Where, connect, read_hostfile

from .conftest import Place, wait_until
from .fleets import PRELOAD, certificates, fleet_at

ELSEWHERE = "192.0.2.1"  # RFC 5737: nobody's


def reached(where: Where) -> tuple[str, tuple[str, ...], bool]:
    """Connect, have the scheduler answer, and return what the connection says of itself."""

    async def there() -> tuple[str, tuple[str, ...], bool]:
        async with connect(where) as fleet:
            assert fleet.client.asynchronous
            assert fleet.client.direct_to_workers is False
            assert (await fleet.client.scheduler.identity(n_workers=-1))["type"] == "Scheduler"
            return fleet.address, fleet.notes, fleet.ours

    return cluster.run(there())


def refused(where: Where) -> HostpartError:
    with pytest.raises(HostpartError) as caught:
        reached(where)
    error = caught.value
    assert error.remedy
    assert "Traceback" not in str(error)
    assert error.__context__ is None or error.__suppress_context__
    return error


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """For connections that do not come about: what takes ten seconds takes one."""
    monkeypatch.setattr(cluster, "CONNECT_S", 1.0)
    monkeypatch.setattr(cluster, "_PROBE_S", 1.0)


@pytest.fixture
def no_connection(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every attempt to connect a socket, none of which gets as far as the kernel."""
    attempts: list[object] = []

    def attempt(self: socket.socket, address: object) -> None:
        attempts.append(address)
        raise OSError("the test lets nothing out")

    for name in ("connect", "connect_ex", "sendto", "sendmsg"):
        monkeypatch.setattr(socket.socket, name, attempt)
    return attempts


# A scheduler that is there


def test_an_address_a_name_and_a_file_lead_to_the_same_scheduler(tmp_path: Path) -> None:
    with fleet_at(tmp_path / "fleet") as fleet:
        port = fleet.address.rpartition(":")[2]
        for named in (
            fleet.address,
            f"127.0.0.1:{port}",
            f"localhost:{port}",
            str(fleet.file),
            os.path.relpath(fleet.file),
        ):
            assert reached(Where(scheduler=named)) == (fleet.address, (), False)


def test_dasks_own_configuration_names_one_where_the_user_does_not(tmp_path: Path) -> None:
    import dask.config

    with fleet_at(tmp_path / "fleet") as fleet, dask.config.set({"scheduler-address": fleet.address}):
        assert reached(Where())[0] == fleet.address
    assert "no fleet is named" in str(refused(Where()))


@pytest.mark.parametrize(
    "address",
    ["tcp://host", "host:99999", "host:0", "http://host:1", "inproc://1/2/3", "tcp://a b:1", "tcp://[::1:5", "",
     "nohost", "tcp://u:p@host:1", "tcp://host:1/x", "-:1:2"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str, no_connection: list[object]) -> None:
    assert isinstance(refused(Where(scheduler=address)), UsageError)
    assert no_connection == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "neither an address nor JSON"), ("[]", "no scheduler's address"), ('{"address": 5}', "scheduler's address"),
     (f'{{"address": "tcp://{ELSEWHERE}:1"}}', "plain text")],
)  # fmt: skip
def test_a_scheduler_file_is_trusted_no_more_than_an_address(
    tmp_path: Path, content: str, problem: str, no_connection: list[object]
) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text(content)
    assert problem in str(refused(Where(scheduler=str(file))))
    assert "can't be read" in str(refused(Where(scheduler=str(tmp_path / "none.json"))))
    assert no_connection == []


@pytest.mark.parametrize("scheme", ["tcp", "ws", "ucx", ""])
@pytest.mark.parametrize("host", [ELSEWHERE, "[2001:db8::1]", "[::ffff:192.0.2.1]", "0.0.0.0"])  # noqa: S104
def test_plain_text_over_a_network_is_refused_before_anything_is_sent(
    scheme: str, host: str, no_connection: list[object]
) -> None:
    error = refused(Where(scheduler=f"{scheme}://{host}:8786" if scheme else f"{host}:8786"))
    assert isinstance(error, UsageError)
    assert "plain text over a network" in str(error)
    assert "--insecure" in error.remedy
    assert no_connection == []


def test_a_name_counts_as_loopback_only_if_all_its_addresses_do(
    monkeypatch: pytest.MonkeyPatch, no_connection: list[object]
) -> None:
    async def resolved(host: str, port: int) -> list[str]:
        return ["127.0.0.1", ELSEWHERE]

    monkeypatch.setattr(cluster, "_resolved", resolved)
    assert "plain text" in str(refused(Where(scheduler="tcp://both:1")))
    assert no_connection == []


def test_a_loopback_name_is_not_resolved_again_by_dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolved(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(cluster, "_resolved", resolved)
    with fleet_at(tmp_path / "fleet") as fleet:
        port = fleet.address.rpartition(":")[2]
        assert reached(Where(scheduler=f"tcp://no-such-name.invalid:{port}"))[0] == fleet.address


@pytest.mark.usefixtures("short")
def test_insecure_goes_out_and_says_what_it_means(no_connection: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    client = cluster._client

    async def noted(*args: object) -> object:
        said.append(str(args[0]))
        return await client(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(cluster, "_client", noted)
    assert isinstance(refused(Where(scheduler=f"tcp://{ELSEWHERE}:8786", insecure=True)), Failed)
    assert said == [f"tcp://{ELSEWHERE}:8786"]
    assert no_connection

    async def allowed() -> list[str]:
        return (await cluster._allowed(cluster._endpoint(f"{ELSEWHERE}:1"), True))[1]

    assert "can run commands as you" in asyncio.run(allowed())[0]


@pytest.mark.usefixtures("short")
def test_a_name_that_is_not_known_is_said() -> None:
    assert "no address is known for the host 'no-such-name.invalid'" in str(
        refused(Where(scheduler="tcp://no-such-name.invalid:1"))
    )


@contextmanager
def listener(behaviour: str) -> Iterator[int]:
    """Something that listens and is no scheduler: it is silent, closes, or greets like ssh."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        held = []

        def serve() -> None:
            while not ended.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                if behaviour == "close":
                    connection.close()
                    continue
                if behaviour == "greet":
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                held.append(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ended.set()
            thread.join()
            for connection in held:
                connection.close()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("scheme", ["tcp", "ws"])
@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [("silent", "is no Dask scheduler"), ("close", "is no Dask scheduler"), ("greet", "does not answer as a Dask")],
)
def test_what_listens_and_is_no_scheduler_is_said_to_be_none(
    capfd: pytest.CaptureFixture[str], scheme: str, behaviour: str, problem: str
) -> None:
    with listener(behaviour) as port:
        assert problem in str(refused(Where(scheduler=f"{scheme}://127.0.0.1:{port}")))
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("short")
def test_nobody_listening_is_said_after_the_time_limit(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    error = refused(Where(scheduler=f"127.0.0.1:{port}"))
    assert str(error) == f"nobody listens at tcp://127.0.0.1:{port}, for 1 s"
    assert "--preload hostpart.fleet.agent" in error.remedy
    assert capfd.readouterr() == ("", "")


def test_a_scheduler_that_starts_within_the_time_limit_is_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(reached(Where(scheduler=f"127.0.0.1:{port}"))))
    thread.start()
    time.sleep(0.5)
    with fleet_at(tmp_path / "fleet", "--port", str(port)):
        thread.join(30)
    assert found == [(f"tcp://127.0.0.1:{port}", (), False)]


def test_the_log_of_dask_is_kept_off_the_terminal_and_given_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import distributed  # noqa: F401

    before = logging.getLogger("distributed").handlers[:]

    async def lost() -> None:
        with fleet_at(tmp_path / "fleet") as fleet:
            async with connect(Where(scheduler=fleet.address)) as there:
                fleet.end(fleet.scheduler)
                logging.getLogger("distributed.client").error("noise")
                logging.getLogger("tornado.application").error("noise")
                with pytest.raises(OSError):
                    await there.client.scheduler.identity(n_workers=-1)

    cluster.run(lost())
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("distributed").handlers == before


def test_versions_that_differ_are_a_sentence_each_and_no_table(capfd: pytest.CaptureFixture[str]) -> None:
    def told(version: object, more: object = "1") -> dict[str, object]:
        return {"packages": {"dask": version, "distributed": "1", "python": "3", "msgpack": more, "cloudpickle": "1"}}

    class Client:
        async def get_versions(self) -> object:
            return {
                "client": told("2"), "scheduler": told("2"),
                "workers": {"a": told("2"), "b": told("1.9"), "c": told("\x1b[2J"), "d": "?"},
            }  # fmt: skip

    notes = asyncio.run(cluster._version_notes(Client()))
    assert notes[1].startswith(
        "versions of dask differ: here 2; at the scheduler 2; at hosts 1.9, 2, none, unknown; where it does not work"
    )
    assert all(note.isprintable() for note in notes)


def test_a_version_mismatch_that_dask_warns_of_becomes_a_note(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import versions

    with fleet_at(tmp_path / "fleet") as fleet:
        own = versions.get_versions()
        other = {**own, "packages": {**own["packages"], "distributed": "2020.1.0"}}
        monkeypatch.setattr(versions, "get_versions", lambda **_: other)
        _, notes, _ = reached(Where(scheduler=fleet.address))
    assert len(notes) == 1
    assert notes[0].startswith("versions of distributed differ: here 2020.1.0; at the scheduler 20")
    assert capfd.readouterr() == ("", "")


def test_only_one_fleet_can_be_meant() -> None:
    assert "exclude each other" in str(refused(Where(scheduler="127.0.0.1:1", local=2)))


def test_without_dask_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda _: None)
    with pytest.raises(UsageError) as caught:
        cluster.need()
    assert caught.value.remedy == "pip install 'hostpart[fleet]'"


# TLS


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two CAs, ``ca.crt`` and ``other.crt``, and certificates with their keys: ``me``, ``stranger`` and ``expired``."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("certificates")
    for name, ca in (("ca", ""), ("other", ""), ("me", "ca"), ("stranger", "other")):
        certificates(folder, name, ca)
    certificates(folder, "expired", "ca", days=-1)
    return folder


def tls(folder: Path, name: str = "me", ca: str = "ca") -> list[str]:
    return ["--protocol", "tls", "--tls-ca-file", str(folder / f"{ca}.crt"), "--tls-cert", str(folder / f"{name}.pem")]


def with_tls(scheduler: str, folder: Path, name: str = "me", ca: str = "ca") -> Where:
    return Where(scheduler=scheduler, tls_ca=str(folder / f"{ca}.crt"), tls_cert=str(folder / f"{name}.pem"))


def test_tls_is_spoken_with_certificates_from_options_and_from_dasks_configuration(tmp_path: Path, certs: Path) -> None:
    import dask.config

    with fleet_at(tmp_path / "fleet", *tls(certs)) as fleet:
        assert fleet.address.startswith("tls://")
        where = with_tls(fleet.address, certs)
        assert reached(where) == (fleet.address, (), False)
        assert reached(where.replace(scheduler=fleet.address.removeprefix("tls://")))[0] == fleet.address
        keys = where.replace(tls_cert=str(certs / "me.crt"), tls_key=str(certs / "me.key"))
        assert reached(keys)[0] == fleet.address
        config = {
            "distributed.comm.tls.ca-file": where.tls_ca, "distributed.comm.tls.client.cert": keys.tls_cert,
            "distributed.comm.tls.client.key": keys.tls_key,
        }  # fmt: skip
        with dask.config.set(config):
            assert reached(Where(scheduler=str(fleet.file)))[0] == fleet.address


def test_with_tls_dask_itself_is_told_to_take_nothing_else(certs: Path) -> None:
    security = cluster._security(with_tls("", certs))
    assert security.require_encryption is True
    from distributed.comm import connect as dask_connect

    async def plain() -> None:
        await dask_connect("tcp://127.0.0.1:1", timeout=1, **security.get_connection_args("client"))

    with pytest.raises(RuntimeError, match="encryption required"):
        asyncio.run(plain())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("theirs", "theirs_ca", "mine", "mine_ca", "problem"),
    [
        ("me", "ca", "me", "other", "is not accepted: "),
        ("stranger", "ca", "me", "ca", "is not accepted: "),
        ("expired", "ca", "me", "ca", "is not accepted: certificate has expired"),
        ("me", "ca", "stranger", "ca", "does not accept this client's certificate"),
        ("me", "ca", "expired", "ca", "does not accept this client's certificate"),
    ],
    ids=["another CA here", "the scheduler's is a stranger", "the scheduler's has expired", "a stranger", "expired"],
)
def test_a_certificate_that_is_wrong_is_named(
    tmp_path: Path, certs: Path, capfd: pytest.CaptureFixture[str],
    theirs: str, theirs_ca: str, mine: str, mine_ca: str, problem: str,
) -> None:  # fmt: skip
    with fleet_at(tmp_path / "fleet", *tls(certs, theirs, theirs_ca)) as fleet:
        error = refused(with_tls(fleet.address, certs, mine, mine_ca))
    assert isinstance(error, Failed)
    assert problem in str(error)
    assert "--tls-" in error.remedy
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("short")
def test_tls_and_plain_text_that_meet_are_told_apart(tmp_path: Path, certs: Path) -> None:
    with fleet_at(tmp_path / "tls", *tls(certs)) as fleet:
        error = refused(Where(scheduler=fleet.address.replace("tls:", "tcp:")))
        assert "wants TLS" in str(error)
        assert fleet.address in error.remedy
    with fleet_at(tmp_path / "plain") as fleet:
        assert "speaks no TLS" in str(refused(with_tls(fleet.address.replace("tcp:", "tls:"), certs)))
        error = refused(with_tls(fleet.address, certs))
        assert "is plain text, and certificates are given" in str(error)


def test_certificates_that_are_missing_or_none_are_said_before_anything_is_sent(
    tmp_path: Path, certs: Path, no_connection: list[object]
) -> None:
    where = with_tls(f"tls://{ELSEWHERE}:1", certs)
    (tmp_path / "junk.pem").write_text("junk")
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "pkey", "-in", certs / "me.key", "-aes256", "-passout", "pass:x", "-out", locked],
        check=True, capture_output=True,
    )  # fmt: skip
    for wrong, problem in (
        (Where(scheduler=where.scheduler), "--tls-ca and --tls-cert not given"),
        (where.replace(tls_ca=""), "--tls-ca not given"),
        (where.replace(tls_ca=str(tmp_path / "none")), "can't be read: No such file"),
        (where.replace(tls_ca=str(tmp_path / "junk.pem")), "holds no CA's certificate"),
        (where.replace(tls_cert=str(tmp_path / "junk.pem")), "can't be used"),
        (where.replace(tls_cert=str(certs / "me.crt")), "can't be used"),
        (where.replace(tls_cert=str(certs / "me.crt"), tls_key=str(certs / "stranger.key")), "can't be used"),
        (where.replace(tls_cert=str(certs / "me.crt"), tls_key=str(locked)), "has a pass phrase"),
    ):
        error = refused(wrong)
        assert isinstance(error, UsageError)
        assert problem in str(error), str(error)
    assert no_connection == []


# A cluster of this host


def test_local_workers_are_there_load_what_they_should_and_listen_on_loopback_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    preload = tmp_path / "hello_preload.py"
    preload.write_text(PRELOAD)
    monkeypatch.setattr(cluster, "PRELOAD", str(preload))
    monkeypatch.setenv("TEST_HELLO", '{"protocol": 7}')

    async def there() -> tuple[dict[str, object], tuple[str, ...], list[str]]:
        async with connect(Where(local=2)) as fleet:
            assert fleet.ours
            scheduler = fleet.client.cluster.scheduler
            assert scheduler.allowed_failures == 0
            told = await fleet.client.scheduler.identity(n_workers=-1)
            pids = [os.getpid(), *(await fleet.client.run(os.getpid)).values()]
            return told, fleet.notes, [address for pid in pids for address in listening(pid)]

    told, notes, addresses = cluster.run(there())
    assert isinstance(told["workers"], dict)
    assert [one["hostpart"] for one in told["workers"].values()] == [{"protocol": 7}] * 2
    assert [one["nthreads"] for one in told["workers"].values()] == [1, 1]
    assert "share this host's pCPUs" in notes[0]
    assert addresses
    assert set(addresses) == {"127.0.0.1"}
    assert capfd.readouterr() == ("", "")


def listening(pid: int) -> list[str]:
    import psutil

    return [
        one.laddr.ip for one in psutil.Process(pid).net_connections(kind="inet") if one.status == psutil.CONN_LISTEN
    ]


def test_other_users_of_this_host_cannot_connect_to_a_local_cluster() -> None:
    pytest.importorskip("cryptography")

    async def there() -> str:
        async with connect(Where(local=1)) as fleet:
            with pytest.raises(HostpartError) as caught:
                async with connect(Where(scheduler=fleet.address.replace("tls:", "tcp:"))):
                    pass
            return str(caught.value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "PRELOAD", "json")
        patch.setattr(cluster, "CONNECT_S", 3.0)
        assert "wants TLS" in cluster.run(there())


def test_ctrl_c_is_not_the_local_workers_to_hear_and_is_a_signal_like_others_to_what_they_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "PRELOAD", "json")

    async def there() -> tuple[set[int], list[str]]:
        async with connect(Where(local=2)) as fleet:
            groups = set((await fleet.client.run(os.getpgid, 0)).values())
            states = await fleet.client.run(Path.read_text, Path("/proc/self/status"))
            return groups, list(states.values())

    groups, states = cluster.run(there())
    assert len(groups) == 2
    assert os.getpgid(0) not in groups
    for state in states:
        for kind in ("SigBlk", "SigIgn"):
            (mask,) = re.findall(rf"^{kind}:\s*([0-9a-f]+)$", state, re.MULTILINE)
            assert not int(mask, 16) >> signal.SIGINT - 1 & 1


def test_ctrl_c_while_local_workers_start_ends_them_and_says_nothing(place: Place, tmp_path: Path) -> None:
    place.env["HOSTPART_FLEET_DIR"] = str(tmp_path / "fleet")
    process = place.start("fleet", "--local", "2", "ps", start_new_session=True)
    assert wait_until(lambda: len(place.processes()) > 2, 60)  # besides it and multiprocessing's own helper
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert wait_until(lambda: not place.processes())


def test_a_local_worker_that_cannot_load_the_preload_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "PRELOAD", "no_such_module_of_hostpart")
    error = refused(Where(local=1))
    assert "could not be started" in str(error)


# ssh


@pytest.mark.parametrize(
    ("content", "hosts"),
    [("a\n", ("a",)), ("# fleet\n\n a.b \nme@c # third\n10.0.0.1\n::1", ("a.b", "me@c", "10.0.0.1", "::1"))],
)
def test_a_hostfile_has_a_host_per_line(tmp_path: Path, content: str, hosts: tuple[str, ...]) -> None:
    (tmp_path / "hosts").write_text(content)
    assert read_hostfile(str(tmp_path / "hosts")) == hosts


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "names no host"), ("# none\n", "names no host"), ("a\na\n", "line 2: a is named twice"), ("a b\n", "line 1"),
     ("-oProxyCommand=x\n", "line 1"), ("a\n$(id)\n", "line 2"), ("a;b", "line 1"), ("\x1b[2J", "line 1")],
)  # fmt: skip
def test_a_hostfile_that_is_none_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "hosts").write_text(content)
    with pytest.raises(UsageError) as caught:
        read_hostfile(str(tmp_path / "hosts"))
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()


def test_over_ssh_plain_text_stays_on_this_host_unless_the_user_says_otherwise(
    tmp_path: Path, no_connection: list[object]
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1\n{ELSEWHERE}\n")
    error = refused(Where(ssh=str(hosts)))
    assert isinstance(error, UsageError)
    assert "plain text over the network" in str(error)
    assert "right on every host" in error.remedy
    assert no_connection == []


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An sshd of the test's own on the loopback interface, and a home whose ssh configuration leads to it."""
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    if not os.path.exists(program) or not shutil.which("ssh-keygen"):
        pytest.skip("needs sshd and ssh-keygen")
    pytest.importorskip("asyncssh")
    home = tmp_path / "home"
    ssh = home / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    for key in (tmp_path / "host_key", ssh / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "authorized").write_text((ssh / "id_ed25519.pub").read_text())
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {tmp_path}/authorized\nPasswordAuthentication no\nPermitRootLogin yes\n"
        "AcceptEnv HOSTPART_*\n"
    )
    (ssh / "known_hosts").write_text(f"[127.0.0.1]:{port} {(tmp_path / 'host_key.pub').read_text()}")
    (ssh / "config").write_text(f"Host *\n  Port {port}\n  User {getpass.getuser()}\n")
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
    log = open(tmp_path / "sshd.log", "wb")  # noqa: SIM115
    process = subprocess.Popen([program, "-D", "-e", "-f", tmp_path / "sshd_config"], stdout=log, stderr=log)
    try:

        def up() -> bool:
            with socket.socket() as one:
                return one.connect_ex(("127.0.0.1", port)) == 0

        if not wait_until(up, 10):
            pytest.skip(f"sshd does not start: {(tmp_path / 'sshd.log').read_text()}")
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        monkeypatch.delenv("HOSTPART_FLEET_PYTHON", raising=False)
        yield ssh
    finally:
        process.terminate()
        process.wait()
        log.close()


def test_over_ssh_every_host_runs_a_worker_and_all_of_it_ends_with_the_connection(
    sshd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1\n")

    async def there() -> tuple[list[str], list[int], list[str]]:
        async with connect(Where(ssh=str(hosts))) as fleet:
            told = await fleet.client.scheduler.identity(n_workers=-1)
            assert [one["nthreads"] for one in told["workers"].values()] == [1]
            assert all("hostpart" in one for one in told["workers"].values())
            failures = await fleet.client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.allowed_failures)
            assert failures == 0
            pids = [*(await fleet.client.run(os.getpid)).values(), await fleet.client.run_on_scheduler(os.getpid)]
            return list(fleet.notes), pids, [one for pid in pids for one in listening(pid)]

    notes, pids, addresses = cluster.run(there())
    assert notes == []
    assert set(addresses) == {"127.0.0.1"}
    assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 20)
    assert capfd.readouterr() == ("", "")


def test_over_ssh_with_tls_scheduler_and_workers_speak_it(sshd: Path, tmp_path: Path, certs: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1\n")
    where = with_tls("", certs).replace(scheduler="", ssh=str(hosts))
    address, notes, ours = reached(where)
    assert address.startswith("tls://")
    assert ours
    assert "their own files" in notes[0]


@pytest.mark.parametrize("trouble", ["unknown host key", "no login", "no hostpart", "no sshd"])
def test_over_ssh_the_host_that_cannot_be_used_is_named_with_the_reason(
    sshd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], trouble: str
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1\n")
    if trouble == "unknown host key":
        (sshd / "known_hosts").write_text("")
    elif trouble == "no login":
        (tmp_path / "authorized").write_text("")
    elif trouble == "no hostpart":
        python = tmp_path / "a python; $(touch boom)"
        python.write_text("#!/bin/sh\necho 'No module named hostpart' >&2\nexit 1\n")
        python.chmod(0o755)
        monkeypatch.setenv("HOSTPART_FLEET_PYTHON", str(python))
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            (sshd / "config").write_text(f"Host *\n  Port {free.getsockname()[1]}\n")
    error = refused(Where(ssh=str(hosts)))
    assert str(error).startswith("this host can't be used:\n  127.0.0.1: ")
    words = {
        "unknown host key": "known_hosts",
        "no login": "ssh is not let in",
        "no hostpart": "No module named hostpart",
        "no sshd": "no connection",
    }
    assert words[trouble] in str(error)
    assert capfd.readouterr() == ("", "")


def test_the_way_of_a_command_imports_no_dask() -> None:
    code = "import sys, hostpart.cli.fleet, hostpart.cli as c; c.parsers(); sys.exit('distributed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Host: the same files from a directory and from a tarball, and nothing from outside them."""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
import tarfile
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostpart import host as host_module
from hostpart.cpuset import CpuSet
from hostpart.errors import UsageError
from hostpart.host import Host
from tests.machines import RECORDED, write_tree

Mode = Literal["w:bz2", "w:gz", "w:xz", "w"]

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILES = {
    "sys/devices/system/cpu/online": "0-1\n",
    "sys/devices/system/cpu/cpu0/online": "1\n",
    "sys/devices/platform/thing/value": "7\n",
    "proc/mounts": "",
}
LINKS = {
    "sys/absolute": "/sys/devices/platform",
    "sys/bus/thing": "../devices/platform/thing",
    "sys/out": "../../../../../../../../../../etc/hostname",
    "sys/top": "../../../../../sys/devices/system/cpu",
    "sys/dangling": "nowhere",
    "sys/loop": "pool",
    "sys/pool": "loop",
    "sys/self": "self/self/self",
}


def pack(path: Path, add: Callable[[tarfile.TarFile], None], mode: Mode) -> str:
    with tarfile.open(path, mode) as archive:
        add(archive)
    return str(path)


def member(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(content))


def in_directory(path: Path, prefix: str) -> Host:
    write_tree(path / prefix, FILES)
    for name, target in LINKS.items():
        link = path / prefix / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    return Host.open(str(path))


def in_tarball(mode: Mode) -> Callable[[Path, str], Host]:
    def make(path: Path, prefix: str) -> Host:
        def add(archive: tarfile.TarFile) -> None:
            for name, content in FILES.items():
                member(archive, f"{prefix}{name}", content.encode())
            for name, target in LINKS.items():
                member(archive, f"{prefix}{name}", type=tarfile.SYMTYPE, linkname=target)

        return Host.open(pack(path / "machine", add, mode))

    return make


@pytest.fixture(
    params=[
        pytest.param((in_directory, ""), id="directory"),
        pytest.param((in_directory, "some/machine/"), id="two folders down"),
        pytest.param((in_tarball("w:bz2"), "machine/"), id="bz2"),
        pytest.param((in_tarball("w:gz"), "./"), id="gz"),
        pytest.param((in_tarball("w:xz"), "some/machine/"), id="xz"),
        pytest.param((in_tarball("w"), "/machine/"), id="plain tar"),
    ]
)
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    make, prefix = request.param
    made = make(tmp_path, prefix)
    assert isinstance(made, Host)
    return made


def test_it_reads_files_and_lists_folders(host: Host) -> None:
    assert host.read_text("sys/devices/system/cpu/online") == "0-1\n"
    assert host.read_bytes("proc/mounts") == b""
    assert host.listdir("sys/devices/system/cpu") == ["cpu0", "online"]
    assert host.exists("sys/devices/system/cpu/cpu0")
    assert not host.exists("sys/devices/system/cpu/cpu1")
    assert not host.live


def test_links_stay_inside(host: Host) -> None:
    assert host.read_text("sys/absolute/thing/value") == "7\n"
    assert host.read_text("sys/bus/thing/value") == "7\n"
    assert host.read_text("sys/top/online") == "0-1\n"
    assert host.read_text("sys/bus/../../../../sys/devices/system/cpu/online") == "0-1\n"
    for name in ("sys/out", "etc/hostname", "../../../../../../../../etc/hostname", "/etc/hostname"):
        assert not host.exists(name)
        with pytest.raises(FileNotFoundError):
            host.read_bytes(name)


@pytest.mark.parametrize("name", ["sys/loop", "sys/self", "sys/loop/below"])
def test_links_in_a_circle_end(host: Host, name: str) -> None:
    assert not host.exists(name)
    with pytest.raises(OSError) as caught:
        host.read_bytes(name)
    assert caught.value.errno == errno.ELOOP


def test_what_is_not_there_is_the_error_that_open_gives(host: Host) -> None:
    for name in ("sys/nothing", "sys/dangling"):
        with pytest.raises(FileNotFoundError):
            host.read_bytes(name)
    with pytest.raises(IsADirectoryError):
        host.read_bytes("sys/devices")
    with pytest.raises(NotADirectoryError):
        host.listdir("proc/mounts")
    with pytest.raises(FileNotFoundError):
        host.listdir("sys/nothing")


def test_a_recorded_machine_runs_nothing(host: Host) -> None:
    with pytest.raises(OSError, match="recorded"):
        host.affinity()


def test_the_live_machine_is_the_root_by_any_name() -> None:
    for name in ("/", "//", "/..", "/proc/self/root"):
        assert Host.open(name).live
    assert Host().affinity() == CpuSet.of(os.sched_getaffinity(0))
    assert Host().read_bytes("proc/self/stat").startswith(str(os.getpid()).encode())
    assert Host().path("sys/x") == "/sys/x"


def test_a_long_file_of_proc_comes_whole() -> None:
    # Each read of /proc gives a part: the shared libraries of this process are several of them.
    assert Host().read_bytes("proc/self/maps").count(b"\n") > 60


def test_the_live_machine_needs_no_archive_module() -> None:
    code = "import sys; from hostpart.host import Host; Host().listdir('proc/self'); print('tarfile' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_pipe_of_a_recorded_tree_does_not_stop_the_reader(tmp_path: Path) -> None:
    (tmp_path / "sys").mkdir()
    os.mkfifo(tmp_path / "sys/pipe")
    with pytest.raises(OSError, match="not a file"):
        Host.open(str(tmp_path)).read_bytes("sys/pipe")


def test_a_hostile_tarball_gives_only_its_plain_files(tmp_path: Path) -> None:
    def add(archive: tarfile.TarFile) -> None:
        member(archive, "m/sys/fine", b"1")
        member(archive, "m/../../outside", b"2")
        member(archive, "m/sys/device", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        member(archive, "m/sys/pipe", type=tarfile.FIFOTYPE)
        member(archive, "m/sys/hard", type=tarfile.LNKTYPE, linkname="m/sys/fine")
        member(archive, "m/sys/harder", type=tarfile.LNKTYPE, linkname="/etc/hostname")
        member(archive, "m/sys/large", b"x" * (host_module._MAX_FILE + 1))
        member(archive, "m/sys/swap", type=tarfile.SYMTYPE, linkname="/etc")
        member(archive, "m/sys/swap", b"3")

    host = Host.open(pack(tmp_path / "hostile.tar.gz", add, "w:gz"))
    assert host.listdir("") == ["sys"]
    assert host.listdir("sys") == ["fine", "hard", "swap"]
    assert [host.read_bytes(f"sys/{name}") for name in ("fine", "hard", "swap")] == [b"1", b"1", b"3"]
    assert os.listdir(tmp_path) == ["hostile.tar.gz"]


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [("_MAX_STREAM", 100_000, "unpacks to more"), ("_MAX_KEPT", 50_000, "larger than"), ("_MAX_MEMBERS", 3, "members")],
)
def test_a_tarball_that_grows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, said: str
) -> None:
    monkeypatch.setattr(host_module, limit, value)

    def add(archive: tarfile.TarFile) -> None:
        for number in range(5):
            member(archive, f"sys/{number}", b"\0" * 40_000)

    with pytest.raises(UsageError, match=said):
        Host.open(pack(tmp_path / "bomb.tar.bz2", add, "w:bz2"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(lambda _: None, "No such file", id="missing"),
        pytest.param(lambda path: path.mkdir(), "no 'sys' folder", id="no tree"),
        pytest.param(lambda path: path.write_text("hello"), "not a tarball", id="text"),
        pytest.param(lambda path: path.write_bytes(b"BZh9" + bytes(40)), "not a tarball", id="broken bz2"),
        pytest.param(lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(40)), "not a tarball", id="broken gz"),
        pytest.param(lambda path: path.write_bytes(b"\xfd7zXZ\0" + bytes(40)), "not a tarball", id="broken xz"),
        pytest.param(lambda path: path.write_bytes(b""), "not a tarball|no 'sys'", id="empty"),
        pytest.param(os.mkfifo, "neither", id="pipe"),
        pytest.param(lambda path: write_tree(path, {"a/sys/x": "", "b/sys/x": ""}), "2 recorded machines", id="two"),
        pytest.param(lambda path: write_tree(path, {"1/2/3/sys/x": ""}), "no 'sys' folder", id="too deep"),
    ],
)
def test_what_is_no_machine_is_refused_with_a_remedy(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    path = tmp_path / "x"
    make(path)
    with pytest.raises(UsageError, match=said) as caught:
        Host.open(str(path))
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301  our own bytes


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_damaged_tarballs_raise_nothing_but_a_usage_error(tmp_path: Path, data: st.DataObject) -> None:
    def add(archive: tarfile.TarFile) -> None:
        for name in ("sys/a", "sys/b/c"):
            member(archive, name, b"content")

    modes: list[Mode] = ["w:gz", "w:bz2", "w:xz", "w"]
    mode = data.draw(st.sampled_from(modes))
    path = tmp_path / "damaged"
    pack(path, add, mode)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        Host.open(str(path)).listdir("sys")
    except (UsageError, NotADirectoryError):
        pass


def test_a_recorded_directory_and_its_tarball_read_alike(tmp_path: Path) -> None:
    packed = pack(tmp_path / "m.tar.xz", lambda archive: archive.add(RECORDED, "m"), "w:xz")
    directory, tarball = Host.open(str(RECORDED)), Host.open(packed)
    files = [str(path.relative_to(RECORDED)) for path in RECORDED.rglob("*") if path.is_file()]
    assert len(files) > 20
    for name in files:
        assert directory.read_bytes(name) == tarball.read_bytes(name)

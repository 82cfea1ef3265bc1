"""The built-in guest: its archive, what is kept of it, what is missing for it, and what it does when it is booted."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hostpart
import workers
from hostpart.errors import Failed, HostpartError, UsageError
from hostpart.qemu import cpio, image
from tests.conftest import NOBODY, wait_until
from tests.vm import debian
from tests.vm import host as lab
from tests.vm.cache import Unavailable

QEMU = shutil.which("qemu-system-x86_64")


@pytest.fixture(scope="module")
def busybox() -> str:
    """This machine's busybox, else the lab's."""
    try:
        return image.find_busybox()
    except Failed:
        if why := lab.missing(debian.packages, "busybox"):
            pytest.skip(why)
    try:
        return str(debian.programs(("busybox-static",)) / "bin" / "busybox")
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def kernel() -> str:
    """This machine's kernel, else the lab's."""
    if QEMU is None:
        pytest.skip("needs qemu-system-x86_64")
    try:
        return image.find_kernel()
    except HostpartError:
        if why := lab.lacking():
            pytest.skip(why)
    try:
        return str(debian.kernel("6.12"))
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "busybox" in request.fixturenames:
        folder = str(Path(request.getfixturevalue("busybox")).parent)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the guests of these tests keep what is the same for all."""
    return str(tmp_path_factory.mktemp("kept"))


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """What a reader of its own finds in an archive of cpio's form newc: name to mode and content."""
    found: dict[str, tuple[int, bytes]] = {}
    offset = 0
    while True:
        header = archive[offset : offset + 110]
        assert header[:6] == b"070701"
        fields = [int(header[at : at + 8], 16) for at in range(6, 110, 8)]
        name = archive[offset + 110 : offset + 110 + fields[11] - 1].decode()
        start = (offset + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert not archive[start:].strip(b"\0")
            return found
        assert name not in found
        assert fields[5] == 0, "an entry has an age"
        found[name] = fields[1], archive[start : start + fields[6]]
        offset = (start + fields[6] + 3) // 4 * 4


def script(archive: bytes) -> str:
    """What the guest of *archive* runs."""
    return entries(archive)["etc/hostpart/command"][1].decode()


# -- the archive -------------------------------------------------------------------------------------------


def test_cpio_unpacks_every_entry_as_it_was_packed(busybox: str, tmp_path: Path) -> None:
    packed = b"".join(
        (
            cpio.folder("a"),
            cpio.file("a/text", b"12345"),
            cpio.file("a/empty", b""),
            cpio.file("a/program", b"\0" * 4096, executable=True),
            cpio.link("a/link", "text"),
            cpio.TRAILER,
        )
    )
    subprocess.run([busybox, "cpio", "-idm"], input=packed, cwd=tmp_path, capture_output=True, check=True)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"text", "empty", "program", "link"}
    assert (tmp_path / "a" / "link").read_bytes() == b"12345"
    assert (tmp_path / "a" / "empty").read_bytes() == b""
    assert (tmp_path / "a" / "program").read_bytes() == bytes(4096)
    assert stat.S_IMODE((tmp_path / "a" / "program").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "a" / "text").stat().st_mode) == 0o644


@pytest.mark.usefixtures("busybox")
def test_every_entry_has_its_folder_before_it(kept: str) -> None:
    modes = {name: mode for name, (mode, _) in entries(image.build(directory=kept)).items()}
    names = list(modes)
    for place, name in enumerate(names):
        folder = name.rpartition("/")[0]
        assert not folder or (folder in names[:place] and stat.S_ISDIR(modes[folder])), name
    assert stat.S_ISCHR(modes["dev/console"])
    assert stat.S_IMODE(modes["init"]) == 0o755


@pytest.mark.usefixtures("busybox")
def test_the_same_inputs_give_the_same_bytes(kept: str, tmp_path: Path) -> None:
    first = image.build(["a", "b"], env={"X": "1", "A": "2"}, directory=kept)
    assert image.build(["a", "b"], env={"A": "2", "X": "1"}, directory=str(tmp_path)) == first


def test_its_interpreter_finds_all_that_it_needs(busybox: str, kept: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to change the root folder")
    subprocess.run(
        [busybox, "cpio", "-id"], input=image.build(directory=kept), cwd=tmp_path, capture_output=True, check=False
    )
    modules = (
        "hostpart.cli.run, hostpart.cli.topology, workers.probes.command, workers.probes.pingpong, _sqlite3, psutil"
    )
    for words in (["-m", "hostpart", "--version"], ["-c", f"import {modules}"]):
        done = subprocess.run(
            [busybox, "chroot", str(tmp_path), "/usr/bin/python3", "-IS", *words],
            env={"LD_LIBRARY_PATH": "/usr/lib"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("busybox")
def test_a_busybox_that_is_not_static_comes_with_its_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("ldd"):
        pytest.skip("needs ldd, to compare")
    dynamic = shutil.copy(str(shutil.which("ls")), tmp_path / "busybox")  # any program that some library is made for
    said = subprocess.run(["ldd", dynamic], capture_output=True, text=True, check=True).stdout
    needed = {words[0] for line in said.splitlines() if len(words := line.split()) > 2}
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    names = entries(image.build(directory=str(tmp_path)))
    assert needed
    assert {f"usr/lib/{name}" for name in needed} <= names.keys()


# -- the command -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("busybox")
def test_words_and_values_reach_the_shell_unchanged(kept: str) -> None:
    words = ["a b", "it's", "$HOME", "", "*", "new\nline", "ü"]
    printed = script(image.build(["printf", "%s\\0", *words], env={"V": "1'2 $x\n"}, directory=kept))
    text = printed.replace("exec ", 'printf "%s\\0" "$V"; exec ')
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == ["1'2 $x\n", *words]


@pytest.mark.parametrize(
    ("command", "env"), [("a\0b", {}), ("true", {"a-b": "1"}), ("true", {"A": "\0"})], ids=["null", "name", "value"]
)
def test_what_no_shell_can_be_given_is_refused(command: str, env: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        image.build(command, env=env)


# -- what is kept ------------------------------------------------------------------------------------------


def test_what_is_kept_is_used_only_while_it_is_what_would_be_made(
    busybox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copy(busybox, tmp_path / "busybox"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    directory = tmp_path / "kept"
    directory.mkdir(mode=0o700)

    def build() -> tuple[int, bytes]:
        archive = image.build(directory=str(directory))
        (file,) = directory.iterdir()  # nothing else is left
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        return file.stat().st_ino, archive

    first, archive = build()
    assert build() == (first, archive)

    file = directory / "guest-image"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    second, again = build()
    assert (second != first, again == archive) == (True, True), "a damaged archive was used"

    own.write_bytes(own.read_bytes() + b"more")
    third, changed = build()
    assert third != second
    assert changed != archive, "what busybox was before was used"

    file.write_bytes(b"short")
    assert build()[1] == changed


@pytest.mark.usefixtures("busybox")
def test_a_full_disk_only_costs_time(tmp_path: Path, kept: str) -> None:
    assert image.build("true", directory=str(tmp_path / "not there")) == image.build("true", directory=kept)


# -- what is missing ---------------------------------------------------------------------------------------


def test_without_busybox_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(image, "_BUSYBOX", ())
    with pytest.raises(Failed, match="there is no busybox") as caught:
        image.find_busybox()
    assert "apt install busybox-static" in caught.value.remedy


def test_without_a_kernel_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "initrd.img-6.1").touch()
    with pytest.raises(Failed, match="there is no kernel") as caught:
        image.find_kernel(boot=str(tmp_path))
    assert "apt install linux-image-cloud-amd64" in caught.value.remedy
    assert "kernel = " in caught.value.remedy


def test_a_named_kernel_is_taken_or_its_lack_is_said(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    with pytest.raises(UsageError, match="bzImage"):
        image.find_kernel(str(path))
    path.touch()
    assert image.find_kernel(str(path)) == str(path)


def test_the_running_kernel_comes_before_the_newest_one(tmp_path: Path) -> None:
    for release in ("6.1.0-9-amd64", "6.1.0-50-amd64", "6.12.9-amd64", "6.12.10-amd64", "0-rescue-5f1c"):
        (tmp_path / f"vmlinuz-{release}").touch()
    assert image.find_kernel(boot=str(tmp_path)) == str(tmp_path / "vmlinuz-6.12.10-amd64")
    running = tmp_path / f"vmlinuz-{os.uname().release}"
    running.touch()
    assert image.find_kernel(boot=str(tmp_path)) == str(running)


def test_a_kernel_says_its_release(kernel: str) -> None:
    assert f"vmlinuz-{image.release_of(kernel)}" == Path(kernel).name


def test_a_kernels_drivers_are_unpacked(busybox: str, kernel: str, kept: str, tmp_path: Path) -> None:
    import lzma

    drivers = tmp_path / str(image.release_of(kernel)) / "kernel" / "drivers"
    (drivers / "acpi").mkdir(parents=True)
    (drivers / "input").mkdir()
    (drivers / "acpi" / "button.ko.xz").write_bytes(lzma.compress(b"button"))
    (drivers / "input" / "evdev.ko").write_bytes(b"evdev")
    found = entries(image.build(kernel=kernel, modules=str(tmp_path), directory=kept))
    assert found["usr/lib/modules/button.ko"][1] == b"button"
    assert found["usr/lib/modules/evdev.ko"][1] == b"evdev"


# -- without root ------------------------------------------------------------------------------------------


def test_another_user_makes_it_too_and_is_told_of_kernels_that_only_root_may_read(busybox: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    root = Path(tempfile.mkdtemp(prefix="hostpart-nobody-"))  # tmp_path is below a directory of mode 0700
    try:
        root.chmod(0o755)
        for package in (hostpart, workers):
            folder = Path(str(package.__file__)).parent
            shutil.copytree(folder, root / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(busybox, root / "busybox")
        (root / "run").mkdir(mode=0o700)
        os.chown(root / "run", NOBODY, NOBODY)
        (root / "vmlinuz-6").touch(mode=0o600)
        code = (
            f"import sys; sys.path.insert(0, {str(root)!r})\n"
            "from hostpart.qemu import image\nfrom hostpart.errors import NotPermitted\n"
            f"data = image.build('true'); assert data == image.build('true')\n"
            f"try: image.find_kernel(boot={str(root)!r})\n"
            "except NotPermitted as error: print(len(data), error, error.remedy)\n"
        )
        become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "sh", "-c", 'exec "$@"', "sh"]
        env = {"PATH": f"{root}:{os.environ['PATH']}", "HOSTPART_RUNTIME_DIR": str(root / "run")}
        for python in (sys.executable, "/usr/bin/python3"):
            if not subprocess.run(
                [*become, python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"],
                env=env, capture_output=True, check=False,
            ).returncode:  # fmt: skip
                break
        else:
            pytest.skip("no Python 3.11 that uid 65534 may run")
        done = subprocess.run([*become, python, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        size, said = done.stdout.split(" ", 1)
        assert int(size) > 5_000_000
        assert f"no kernel may be read by you: {root}/vmlinuz-6" in said
        assert "chmod a+r" in said
    finally:
        shutil.rmtree(root)


# -- booted ------------------------------------------------------------------------------------------------


class Guest:
    """A guest under QEMU, emulated: its console, its second serial port, and QMP on QEMU's standard input."""

    def __init__(self, folder: Path, kernel: str, archive: bytes, *options: str) -> None:
        self.folder = folder
        (folder / "initrd").write_bytes(archive)
        command = [
            str(QEMU), "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "256M", "-nodefaults",
            "-no-user-config", "-display", "none", "-no-reboot", "-serial", f"file:{folder}/console",
            "-serial", f"file:{folder}/results", "-qmp", "stdio", "-kernel", kernel, "-initrd", f"{folder}/initrd",
            "-append", "console=ttyS0 quiet panic=-1", *options,
        ]  # fmt: skip
        self.qemu = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.order("qmp_capabilities")

    def order(self, command: str, **arguments: object) -> None:
        """Send one command to QEMU."""
        assert self.qemu.stdin
        self.qemu.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.qemu.stdin.flush()

    def console(self) -> str:
        """What it has said so far."""
        path = self.folder / "console"
        return path.read_text(errors="replace").replace("\r\n", "\n") if path.exists() else ""

    def says(self, text: str, timeout: float = 90) -> None:
        """Wait until it has said *text*."""
        assert wait_until(lambda: text in self.console() or self.qemu.poll() is not None, timeout), self.console()
        assert text in self.console()

    def end(self, timeout: float = 90) -> str:
        """Wait until it has powered off, and return what it said."""
        assert self.qemu.wait(timeout) == 0, self.qemu.stderr and self.qemu.stderr.read()
        return self.console()


@pytest.fixture
def boot(tmp_path: Path, kernel: str) -> Iterator[object]:
    """Boots a guest; it is gone when the test ends."""
    guests: list[Guest] = []

    def start(archive: bytes, *options: str) -> Guest:
        guests.append(Guest(tmp_path, kernel, archive, *options))
        return guests[-1]

    yield start
    for guest in guests:
        guest.qemu.kill()
        guest.qemu.wait()
        for stream in (guest.qemu.stdin, guest.qemu.stderr):
            if stream:
                stream.close()


_TELL = """
hostpart topology --json
hostpart-guest firmware >&2
hostpart-guest probe --cpu 1 noise --seconds 0.2 --warmup 0 --json
hostpart run -n 1 -- sh -c 'echo ran >&2'
printf '\\001\\r\\n\\377%s' "$MARK"
exit 3
"""


@pytest.mark.usefixtures("busybox")
def test_hostpart_sees_in_the_guest_the_processors_that_qemu_made(boot: object, kept: str, kernel: str) -> None:
    assert callable(boot)
    archive = image.build(_TELL, env={"MARK": "it's"}, result_port=True, directory=kept)
    guest = boot(archive, "-smp", "3,maxcpus=4,sockets=1,cores=4")
    said = guest.end().splitlines()
    own = [line for line in said if line.startswith("hostpart guest:")]  # the kernel may complain of the emulation
    assert own == [f"hostpart guest: Linux {image.release_of(kernel)}, 3 CPUs", "hostpart guest: exit status 3"]
    assert "firmware (MADT): APIC ids 0, 1, 2; the kernel has the same" in said
    assert "ran" in said
    results = (guest.folder / "results").read_bytes()
    head, brace, rest = results.partition(b"\n}\n")
    topology = json.loads(head + brace)
    assert topology["source"]["madt"] is True
    assert topology["usable"] == "0-2"
    assert [(pcpu["cpu"], pcpu["apic_id"], pcpu["core"]) for pcpu in topology["pcpus"]] == [(n, n, n) for n in range(3)]
    line, rest = rest.split(b"\n", 1)
    record = json.loads(line)
    assert (record["probe"], record["engine"], record["where"]["cpus_allowed"]) == ("noise", "python", "1")
    assert rest == b"\x01\r\n\xffit's", "the port does not carry bytes as they are"


@pytest.mark.parametrize("how", ["Ctrl-Alt-Del", "the power button"])
@pytest.mark.usefixtures("busybox")
def test_it_ends_when_it_is_asked_to(boot: object, kept: str, kernel: str, how: str) -> None:
    assert callable(boot)
    command = "trap 'echo ending; exit 9' TERM; echo ready; sleep 600 & wait"
    archive = image.build(command, kernel=kernel, directory=kept)
    if (
        how == "the power button"
        and not {"usr/lib/modules/button.ko", "usr/lib/modules/evdev.ko"} <= entries(archive).keys()
    ):
        pytest.skip(f"needs the modules button and evdev in /lib/modules/{image.release_of(kernel)}")
    guest = boot(archive, "-smp", "2")
    guest.says("ready")
    began = time.monotonic()

    # Again until it is heard: who listens is started beside the command, and the button's driver keeps nothing.
    def asked() -> bool:
        if how == "the power button":
            guest.order("system_powerdown")
        else:
            guest.order("send-key", keys=[{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")])
        return wait_until(lambda: "asked to end" in guest.console() or guest.qemu.poll() is not None, 5)

    assert wait_until(asked, 60), guest.console()
    said = guest.end()
    assert "hostpart guest: asked to end\nending\nhostpart guest: exit status 9\n" in said
    assert time.monotonic() - began < 60

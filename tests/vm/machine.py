"""A virtual machine: booted once and saved, and then resumed as often as somebody needs a fresh one.

It is emulated (QEMU's TCG, which needs no rights and runs in containers), so that what it tells in time means nothing.
"""

from __future__ import annotations

import io
import json
import os
import queue
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tests.vm import cargo, debian
from tests.vm.cache import CACHE, LabError, digest, filled, locked
from tests.vm.image import image

__all__ = ["SETUPS", "TOPOLOGIES", "Dead", "Kind", "Machine", "booted", "collected", "resumed"]

SETUPS = ("v2", "v1", "systemd")
# QEMU's -smp, the CPUs of each NUMA node, megabytes. Under TCG SMT siblings are seen with Intel's models only.
TOPOLOGIES = {
    "2x2x2": ("8,sockets=2,dies=1,cores=2,threads=2", ("0-3", "4-7"), 768),
    "2x2x2-roomy": ("8,sockets=2,dies=1,cores=2,threads=2", ("0-3", "4-7"), 1536),
    "16": ("16,sockets=2,dies=2,cores=2,threads=2", ("0-7", "8-15"), 1024),
    "1": ("1,sockets=1,dies=1,cores=1,threads=1", ("0",), 512),
}
_CPU = "Skylake-Server-v1,-cx16"
_CMDLINE = (
    "console=ttyS0 quiet loglevel=3 panic=-1 oops=panic nokaslr mitigations=off tsc=reliable no_timer_check audit=0 "
    "rcupdate.rcu_expedited=1 random.trust_cpu=on cryptomgr.notests raid=noautodetect nowatchdog "
    "systemd.show_status=0 systemd.log_target=kmsg systemd.journald=0"
)
# Of what takes some 10 s; each try has as many seconds more, for a machine that is busy.
_TRIES = 5
_TRY_S = 60
# Memory that the guest sees behind a PCI device: a serial port moves 60 kB/s.
_SHARED = 32 << 20
_KEEP_S = 300
_ASLEEP_S = 8.0
_LOADER = "lab/drivers/load"
# Devices with message-signalled interrupts: network cards on a wire that leads nowhere, a port that nobody listens to,
# and a disk without content, whose queues the kernel spreads itself.
_DEVICES = (
    "-netdev", "hubport,id=wire0,hubid=0", "-device", "virtio-net-pci,netdev=wire0,mac=52:54:00:00:00:01,romfile=",
    "-netdev", "hubport,id=wire1,hubid=0", "-device", "vmxnet3,netdev=wire1,mac=52:54:00:00:00:02,romfile=",
    "-chardev", "null,id=nobody", "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=nobody",
    "-blockdev", "null-co,node-name=nothing,size=1048576", "-device", "virtio-blk-pci,drive=nothing,num-queues=4",
)  # fmt: skip


class Dead(LabError):
    """The machine ended, or did not answer in time; the text ends with what its console said last."""


class Kind:
    """Which machine: kernel series, set-up, topology, more words for the kernel's command line, and what is brought in
    once it has booted (one of :data:`tests.vm.cargo.CARGOES`, or nothing)."""

    def __init__(self, kernel: str, setup: str, topology: str = "2x2x2", cmdline: str = "", cargo: str = "") -> None:
        self.kernel, self.setup, self.topology, self.cmdline, self.cargo = kernel, setup, topology, cmdline, cargo

    @property
    def label(self) -> str:
        """A name for files: the same for the same kind, whatever is in its image."""
        more = f"-{digest([self.cmdline])[:6]}" if self.cmdline else ""
        return f"{self.kernel}-{self.setup}-{self.topology}{more}{self.cargo and '-'}{self.cargo}"

    def command(self) -> list[str]:
        """Return the command line of QEMU that boot and resume share."""
        smp, nodes, megabytes = TOPOLOGIES[self.topology]
        command = [
            # The tests of real cores that run meanwhile go first, and no machine outlives its test.
            "setpriv", "--pdeathsig", "KILL", "nice", "-n", "10",
            "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", _CPU,
            "-smp", smp, "-m", f"{megabytes}M", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        ]  # fmt: skip
        for number, cpus in enumerate(nodes):
            memory = f"memory-backend-ram,id=m{number},size={megabytes // len(nodes)}M"
            command += ["-object", memory, "-numa", f"node,nodeid={number},cpus={cpus},memdev=m{number}"]
        # Their interrupts can be steered: the serial ports' and the virtual PCI slots' (MSI).
        for slot in range(4):
            command += ["-device", f"pcie-root-port,id=slot{slot},chassis={slot + 1},bus=pcie.0"]
        return [*command, *_DEVICES]

    def drivers(self) -> bytes:
        """Return a tar archive of the devices' drivers, as far as its kernel has none built in, with what loads them.

        It is to be unpacked at ``/``.
        """
        packed, lines = io.BytesIO(), ["#!/bin/sh"]
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for path in debian.modules(self.kernel):
                archive.add(path, f"lab/drivers/{path.name}")
                lines.append(f"insmod /lab/drivers/{path.name} || exit")
            lines += ["for card in /sys/class/net/*; do ip link set ${card##*/} up || exit; done", ""]
            entry = tarfile.TarInfo(_LOADER)
            script = "\n".join(lines).encode()
            entry.size, entry.mode = len(script), 0o755
            archive.addfile(entry, io.BytesIO(script))
        return packed.getvalue()

    def start(self) -> list[str]:
        """Return the options that boot it."""
        words = f"{_CMDLINE} lab.kernel={self.kernel} lab.setup={self.setup} {self.cmdline}"
        return ["-kernel", str(debian.kernel(self.kernel)), "-initrd", str(image()), "-append", words.strip()]


class Machine:
    """A running machine. Leaving its ``with`` block ends it.

    One that suspends itself is woken after some seconds. An alarm of its own clock would be missed where the way down
    takes longer than that.
    """

    def __init__(self, kind: Kind, options: list[str], heard: Callable[[str], None] | None = None) -> None:
        self.console: list[str] = []
        self._heard = heard
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        self._shared = os.memfd_create("lab")
        os.truncate(self._shared, _SHARED)
        memory = f"memory-backend-file,id=shared,mem-path=/proc/self/fd/{self._shared},size={_SHARED},share=on"
        command = [*kind.command(), "-object", memory, "-device", "ivshmem-plain,memdev=shared,master=on"]
        for name, end in zip(("port", "qmp"), theirs, strict=True):
            command += ["-chardev", f"socket,id={name},fd={end.fileno()}"]
        command += ["-serial", "stdio", "-serial", "chardev:port", "-mon", "chardev=qmp,mode=control", *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", pass_fds=[self._shared, *(end.fileno() for end in theirs)],
        )  # fmt: skip
        for end in theirs:
            end.close()
        self._port, self._qmp = (end.makefile("rwb") for end in ours)
        self._sockets = ours
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._attendant = threading.Thread(target=self._attend, daemon=True)
        self._attendant.start()
        try:
            self._ask("qmp_capabilities")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self._attendant.join()
        os.close(self._shared)
        for end in (self._port, self._qmp, *self._sockets):
            try:
                end.close()
            except OSError:
                pass

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """End the machine if the block takes longer; what is said or heard there then raises :class:`Dead`."""
        timer = threading.Timer(seconds, self._late, [seconds])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def say(self, message: dict[str, object], data: bytes = b"") -> dict[str, object]:
        """Give the guest an order, with *data* if it takes any, and return the answer.

        :raises Dead: if the machine ends before it
        """
        if data:
            os.pwrite(self._shared, data, 0)
            message = {**message, "size": len(data)}
        try:
            self._port.write(json.dumps(message).encode() + b"\n")
            self._port.flush()
        except OSError:
            raise self._dead() from None
        answer = self.hear()
        if "size" in answer:
            answer["data"] = os.pread(self._shared, int(str(answer["size"])), 0)
        return answer

    def hear(self) -> dict[str, object]:
        """Return the guest's next message.

        :raises Dead: if the machine ends before it
        """
        try:
            line = self._port.readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise self._dead()
        found: dict[str, object] = json.loads(line)
        return found

    def wake(self) -> None:
        """Let a resumed machine run; set its clock and random numbers, which stood still in the snapshot."""
        while self._ask("query-status")["status"] == "inmigrate":
            time.sleep(0.02)
        self._ask("cont")
        self.say({"do": "wake", "now": time.time(), "entropy": os.urandom(64).hex()})

    def check_clock(self) -> None:
        """See that a second is one: where this machine is busy, the kernel may have measured it wrongly as it booted.

        :raises Dead: where it is not
        """
        here, there = time.monotonic(), float(str(self.say({"do": "clock"})["now"]))
        time.sleep(1.0)
        there = float(str(self.say({"do": "clock"})["now"])) - there
        here = time.monotonic() - here
        if not 0.5 * here < there < 2.0 * here:
            self.console.append(f"(ended: {there:.1f} s went by in it in {here:.1f} s)")
            raise self._dead()

    def save(self, path: Path) -> None:
        """Write the whole state of the machine to the file *path*; it stands still from then on."""
        self._ask("stop")
        self._ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self._ask("migrate", uri=f"exec:cat > '{path}'")
        while (status := self._ask("query-migrate")["status"]) != "completed":
            if status == "failed":
                raise LabError("QEMU could not save the machine's state: is the disk full?")
            time.sleep(0.02)

    def _ask(self, command: str, **arguments: object) -> dict[str, object]:
        self._order({"execute": command, "arguments": arguments})
        answer = self._answers.get()
        if answer is None:
            self._answers.put(None)
            raise self._dead()
        if "error" in answer:
            raise LabError(f"QEMU refused {command}: {answer['error']}")
        found: dict[str, object] = answer["return"]
        return found

    def _order(self, order: dict[str, object]) -> None:
        try:
            self._qmp.write(json.dumps(order).encode() + b"\n")
            self._qmp.flush()
        except OSError:
            pass  # it has ended, which its end of the socket tells

    def _attend(self) -> None:
        try:
            while line := self._qmp.readline():
                said = json.loads(line)
                if said.get("event") == "SUSPEND":
                    time.sleep(_ASLEEP_S)
                    self._order({"execute": "system_wakeup", "id": "alarm"})
                elif said.keys() & {"return", "error"} and said.get("id") != "alarm":
                    self._answers.put(said)
        except (OSError, ValueError):
            pass
        self._answers.put(None)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for text in lines:
                line = text.rstrip("\r\n")
                # A wire that leads nowhere is meant to.
                if "TCG doesn't support" not in line and "not connected to host network" not in line:
                    self.console.append(line)
                    if self._heard:
                        self._heard(line)

    def _late(self, seconds: float) -> None:
        self.console.append(f"(ended: it took more than {seconds:.0f} s)")
        self.process.kill()

    def _dead(self) -> Dead:
        self.process.kill()
        self._reader.join()
        return Dead("\n".join(["the virtual machine ended; its console:", *self.console[-60:]]))


def booted(kind: Kind) -> Path:
    """Return the saved state of a machine of *kind* that has just booted and waits for orders; made if need be.

    :raises LabError: if it can't be had
    """
    return _laden(kind) if kind.cargo else _bare(kind)


def _laden(kind: Kind) -> Path:
    state = _bare(Kind(kind.kernel, kind.setup, kind.topology, kind.cmdline))
    chunks = [*cargo.brought(kind.kernel)]

    def make(path: Path, limit_s: float) -> None:
        with resumed(kind, state) as machine, machine.limit(limit_s):
            for chunk in chunks:
                machine.say({"do": "unpack"}, chunk)
            if machine.say({"do": "execute", "argv": [f"/{cargo.LOADER}"], "cwd": "/"})["status"]:
                raise LabError("\n".join(["the guest could not take its cargo:", *machine.console[-60:]]))
            machine.save(path)

    return _saved(f"boot-{kind.label}", [state, *chunks], make)


def _bare(kind: Kind) -> Path:
    def make(path: Path, limit_s: float) -> None:
        with Machine(kind, kind.start()) as machine, machine.limit(limit_s):
            said = machine.hear()
            if "up" not in said:
                raise LabError(f"the guest's image is not complete: {said}")
            machine.check_clock()
            machine.say({"do": "unpack"}, drivers)
            if machine.say({"do": "execute", "argv": [f"/{_LOADER}"], "cwd": "/"})["status"]:
                raise LabError("\n".join(["the guest could not load a driver:", *machine.console[-60:]]))
            machine.save(path)

    drivers = kind.drivers()
    return _saved(f"boot-{kind.label}", [*kind.command(), *kind.start(), _SHARED, drivers], make)


def collected(kind: Kind, packed: bytes) -> Path:
    """Return the saved state of a machine of *kind* in which pytest has collected the cases of the *packed* project.

    :raises LabError: if it can't be had
    """
    state = booted(kind)

    def make(path: Path, limit_s: float) -> None:
        with resumed(kind, state) as machine, machine.limit(limit_s):
            machine.say({"do": "unpack"}, packed)
            said = machine.say({"do": "collect", "folder": "tests/vm"})
            if "collected" not in said:
                raise LabError("\n".join(["pytest could not start in the guest:", *machine.console[-60:]]))
            machine.save(path)

    return _saved(f"cases-{kind.label}", [state, packed], make)


@cache
def _emulator() -> str:
    # What one version of QEMU has saved is not for another to resume.
    return subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout


def _saved(label: str, contents: list[object], make: Callable[[Path, float], None]) -> Path:
    path = CACHE / "saved" / f"{label}-{digest([_emulator(), *contents])}" / "state"
    with locked(label):
        if not path.exists():
            for tries in range(1, _TRIES + 1):
                try:
                    with filled(path.parent) as folder:
                        make(folder / "state", _TRY_S * tries)
                    break
                except Dead as dead:
                    (CACHE / "failed.log").write_text(f"{label}\n{dead}\n")
                    # QEMU 7.2 with a thread per CPU: now and then the guest falls over its own patched code. One that
                    # switched itself off has said why, and would again.
                    if tries == _TRIES or "Power down" in str(dead):
                        raise
            # Others of this label are of images and sources that are no more; one just used may be another checkout's.
            for other in path.parent.parent.glob(f"{label}-" + "[0-9a-f]" * 16):
                if other != path.parent and time.time() - other.stat().st_mtime > _KEEP_S:
                    shutil.rmtree(other, ignore_errors=True)
        os.utime(path.parent)
    return path


@contextmanager
def resumed(kind: Kind, state: Path, heard: Callable[[str], None] | None = None) -> Iterator[Machine]:
    """Give a machine that goes on from where *state* was saved."""
    with Machine(kind, ["-incoming", f"exec:cat '{state}'"], heard) as machine:
        with machine.limit(_TRIES * _TRY_S):
            machine.wake()
        yield machine

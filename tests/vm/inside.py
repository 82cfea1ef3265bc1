"""What waits in the guest: takes orders over the second serial port, carries them out, says what came of it.

It is copied to ``/lab/inside.py`` of the guest and imports nothing of the lab. Each message is a line of JSON. The
bytes that belong to it are in the memory window that both sides share.
"""

from __future__ import annotations

import fcntl
import glob
import importlib
import io
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import tarfile
import time
import traceback
import tty
from typing import Any

import hypothesis
import pytest

__all__ = ["main"]

PROJECT = "/project"
_USED_MB = 640  # more than a start ever uses
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207


class Port:
    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self.fd)
        self.buffer = b""

    def hear(self) -> dict[str, object]:
        while b"\n" not in self.buffer:
            self.buffer += os.read(self.fd, 65536)
        line, _, self.buffer = self.buffer.partition(b"\n")
        found: dict[str, object] = json.loads(line)
        return found

    def say(self, message: object) -> None:
        left = json.dumps(message).encode() + b"\n"
        while left:
            left = left[os.write(self.fd, left) :]


def _shared() -> mmap.mmap:
    # The memory of QEMU's ivshmem device, which has no driver and needs none.
    for device in glob.glob("/sys/bus/pci/devices/*"):
        with open(f"{device}/vendor") as vendor, open(f"{device}/device") as number:
            if vendor.read() + number.read() != "0x1af4\n0x1110\n":
                continue
        with open(f"{device}/enable", "w") as enable:
            enable.write("1")
        with open(f"{device}/resource2", "r+b") as memory:
            return mmap.mmap(memory.fileno(), 0)
    raise OSError("there is no shared memory device")


def _awake(order: dict[str, object]) -> None:
    # The clock stood still and the random numbers are those of every other resume of this snapshot.
    time.clock_settime(time.CLOCK_REALTIME, float(str(order["now"])))
    seed = bytes.fromhex(str(order["entropy"]))
    fd = os.open("/dev/urandom", os.O_WRONLY)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)
    random.seed(seed)


def _execute(order: dict[str, object]) -> int:
    argv = order["argv"]
    assert isinstance(argv, list)
    console = os.open("/dev/ttyS0", os.O_WRONLY | os.O_NOCTTY)
    try:
        done = subprocess.run(
            argv, cwd=str(order["cwd"]), stdin=subprocess.DEVNULL, stdout=console, stderr=console, check=False
        )
        import termios

        termios.tcdrain(console)
    except OSError as error:
        os.write(console, f"{argv[0]}: {error.strerror}\n".encode())
        return 127
    finally:
        os.close(console)
    return done.returncode


class Cases:
    """pytest's plugin that holds pytest still once it has collected, and runs the cases that are asked for."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.errors: list[str] = []
        self.reports: list[object] = []

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.errors.append(f"{report.nodeid}: {report.longreprtext}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.config = session.config
        self.resident.cases = self
        self.resident.settle()
        self.resident.port.say({"collected": len(self.items)})
        self.resident.serve()
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        hook = self.config.hook
        self.reports.append(hook.pytest_report_to_serializable(config=self.config, report=report))

    def run(self, nodeid: str) -> dict[str, object]:
        """Run one case in a fork; return its reports, or what became of the fork if it gave none."""
        if nodeid not in self.items:
            return {"failed": "\n".join([f"{nodeid} was not collected in the guest", *self.errors])}
        # A file and not a pipe: what the case has left running would hold that open.
        told = os.memfd_create("reports")
        pid = os.fork()
        if pid == 0:
            try:
                self.config.pluginmanager.unregister(name="terminalreporter")
                self.config.hook.pytest_runtest_protocol(item=self.items[nodeid], nextitem=None)
                with open(told, "w", closefd=False) as file:
                    json.dump(self.reports, file)
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        data = os.pread(told, os.fstat(told).st_size, 0)
        os.close(told)
        if not data:
            return {"failed": f"the process that ran the case ended with status {os.waitstatus_to_exitcode(status)}"}
        self.resident.window[: len(data)] = data
        return {"size": len(data)}


class Resident:
    """The process that serves."""

    def __init__(self) -> None:
        self.port = Port("/dev/ttyS1")
        self.window = _shared()
        self.cases: Cases | None = None

    def serve(self) -> None:
        """Serve until the machine is switched off."""
        while True:
            order = self.port.hear()
            self.port.say(getattr(self, str(order["do"]))(order))

    def wake(self, order: dict[str, object]) -> dict[str, object]:
        _awake(order)
        return {"awake": True}

    def clock(self, _: dict[str, object]) -> dict[str, object]:
        """Say what its clock says."""
        return {"now": time.monotonic()}

    def unpack(self, order: dict[str, object]) -> dict[str, object]:
        data = self.window[: int(str(order["size"]))]
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall("/")  # noqa: S202 - the lab made it
        importlib.invalidate_caches()
        return {"unpacked": len(data)}

    def execute(self, order: dict[str, object]) -> dict[str, object]:
        return {"status": _execute(order)}

    def collect(self, order: dict[str, object]) -> dict[str, object]:
        os.chdir(PROJECT)
        options = ["--no-header", "--no-summary", "-qq", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        options += ["-o", "python_files=test_*.py outcomes.py"]
        # This process has imported hypothesis, which pytest would have liked to do itself.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        return {"failed": int(pytest.main([*options, str(order["folder"])], plugins=[Cases(self)]))}

    def run(self, order: dict[str, object]) -> dict[str, object]:
        assert self.cases is not None
        return self.cases.run(str(order["case"]))

    def settle(self) -> None:
        """Fill memory that was used and is free with zeros: QEMU saves no page that holds nothing else."""
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemFree:")) << 10
        fd = os.memfd_create("zeros")
        block = bytes(1 << 20)
        # What the kernel keeps in reserve is free, too. Of a larger machine most was never used and holds zeros;
        # an emulated processor takes so long for gigabytes that whoever waits for the boot gives up.
        for _ in range(min((free >> 20) - 128, _USED_MB)):
            os.write(fd, block)
        os.close(fd)


def main() -> None:
    """Say that the machine is up, and serve."""
    os.environ.update(
        PATH="/usr/bin:/bin",
        HOME="/root",
        LANG="C.UTF-8",
        TERM="dumb",
        PYTHONDONTWRITEBYTECODE="1",
        PYTHONUNBUFFERED="1",
    )
    with open("/proc/cmdline") as file:
        words = dict(word.partition("=")[::2] for word in file.read().split())
    os.environ["HOSTPART_INSIDE"] = words["lab.kernel"] + "/" + words["lab.setup"]
    resident = Resident()
    # An emulated processor takes its time.
    hypothesis.settings.register_profile("lab", deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    hypothesis.settings.load_profile("lab")
    resident.settle()
    resident.port.say({"up": os.uname().release})
    resident.serve()


if __name__ == "__main__":
    main()

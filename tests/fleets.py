"""Fleets for tests: schedulers and workers as processes of their own on the loopback interface, and certificates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .conftest import wait_until

__all__ = ["HELLO", "PRELOAD", "Fleet", "certificates", "fleet_at"]

HELLO: dict[str, object] = {
    "protocol": 1, "version": "0.2.0", "hostname": "node", "machine": "0123456789abcdef", "boot_id": "b0",
    "domain": "d0", "usable": "0-3", "python": "3.11.2", "user": "me", "command": ["hostpart"],
}  # fmt: skip
# What a worker says of itself without being a host of hostpart's: what it is told to.
PRELOAD = """
import json, os
def dask_setup(worker):
    worker.startup_information["hostpart"] = lambda worker: json.loads(os.environ["TEST_HELLO"])
"""


class Fleet:
    """One scheduler, and workers that come and go.

    :ivar file: what its ``--scheduler-file`` has written
    """

    def __init__(self, folder: Path, env: Mapping[str, str], *options: str) -> None:
        self.folder, self.env, self.options = folder, dict(env), options
        self.file = folder / "scheduler.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start(
            "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
            "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(self.file), *options,
        )  # fmt: skip
        assert wait_until(lambda: self.file.exists() and self.file.read_text().rstrip().endswith("}"), 60), self.log()
        self.address: str = json.loads(self.file.read_text())["address"]

    def worker(self, *options: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a worker; it has registered when this returns."""
        before = self.log().count("Register worker")
        process = self._start(
            "dask_worker", self.address, "--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard",
            "--dashboard-address", "127.0.0.1:0", *self.options, *options, env=env,
        )  # fmt: skip
        assert wait_until(lambda: self.log().count("Register worker") > before, 60), self.log()
        return process

    def says(self, hello: object, *options: str) -> subprocess.Popen[bytes]:
        """Start a worker that says *hello* of itself, and is no host."""
        preload = self.folder / "hello_preload.py"
        preload.write_text(PRELOAD)
        return self.worker("--preload", str(preload), *options, env={"TEST_HELLO": json.dumps(hello)})

    def log(self) -> str:
        """Return what all of them have logged."""
        return (self.folder / "log").read_text()

    def end(self, process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
        """End one process of the fleet."""
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self, module: str, *args: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        with open(self.folder / "log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{module}", *args],
                env={**self.env, **(env or {})}, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.processes.append(process)
        return process


@contextmanager
def fleet_at(folder: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[Fleet]:
    """Start a scheduler; it and its workers are gone afterwards.

    :param options: of scheduler and workers both, such as those for TLS
    """
    folder.mkdir(exist_ok=True)
    fleet = None
    try:
        fleet = Fleet(folder, {**os.environ, **(env or {})}, *options)
        yield fleet
    finally:
        for process in reversed(fleet.processes if fleet else []):
            if process.poll() is None:
                process.kill()
                process.wait()


def certificates(folder: Path, name: str, ca: str = "", *, days: int = 1) -> Path:
    """Make a certificate with its key in one PEM file, signed by *ca*, or a CA where that is empty.

    :param days: -1 for one that has expired
    """
    key, request, pem = folder / f"{name}.key", folder / f"{name}.csr", folder / f"{name}.crt"
    subject = ["-subj", f"/CN={name}"]
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key)]
    if not ca:
        _openssl([*new, "-x509", "-days", "1", *subject, "-out", str(pem)])
        return pem
    _openssl([*new, *subject, "-out", str(request)])
    # x509 -req takes no days below 1 everywhere; with 'ca' dates are given as such.
    when = ["-startdate", "20200101000000Z", "-enddate", "20200102000000Z"] if days < 0 else ["-days", str(days)]
    (folder / "index.txt").write_text("")
    (folder / "ca.cnf").write_text(
        f"[ca]\ndefault_ca=this\n[this]\ndatabase={folder}/index.txt\nnew_certs_dir={folder}\ndefault_md=sha256\n"
        "policy=any\nrand_serial=yes\n[any]\ncommonName=supplied\n"
    )
    _openssl(
        ["openssl", "ca", "-batch", "-notext", "-config", str(folder / "ca.cnf"), "-cert", str(folder / f"{ca}.crt"),
         "-keyfile", str(folder / f"{ca}.key"), "-in", str(request), "-out", str(pem), *when]
    )  # fmt: skip
    both = folder / f"{name}.pem"
    both.write_text(pem.read_text() + key.read_text())
    return both


def _openssl(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""What ``hostpart launch`` adds to a guest's boot under QEMU: time to the console's first byte, and by hand.

Both start the same QEMU with the same arguments, in turns: those that hostpart gave it, read from
``/proc/PID/cmdline``, without what stops it until it is told to go on and without the monitor that tells it. By hand
it is started by taskset(1) on all usable pCPUs: a command line can pin a process, and not one thread of it as hostpart
does. The clock runs from before the first fork until the console's file has a byte in it, looked at every millisecond;
so it has in it hostpart's interpreter, leases and ledger, the pinning of QEMU's threads and the way back to QEMU.
What the guest does is the same for both.

Run with ``python -m bench.bench_boot KERNEL [INITRD] [-n RUNS] [-a ACCELERATOR]`` in a checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from hostpart import procfs

from .measure import facts, in_turns, place, report

_ALLOWED = "at most 1.1"
_LIMIT_S = 60.0  # for one boot
_APPEND = "console=ttyS0 panic=-1"
_HOSTPART = [sys.executable, "-c", "from hostpart.__main__ import main; main()"]


def scenario(kernel: str, initrd: str | None, accelerator: str, console: str) -> str:
    """Return the scenario file of one guest with one vCPU."""
    keys = {"kernel": kernel, "initrd": initrd, "append": _APPEND, "memory": "256M"}
    keys |= {"accelerator": accelerator, "console": f"file:{console}"}
    extra = "powerdown = 0"  # a kernel without a root file system does not know the button
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None]
    return "\n".join(["[[vm]]", 'name = "boot"', "vcpus = 1", "[vm.qemu]", extra, *lines, ""])


def by_hand(argv: Sequence[str]) -> list[str]:
    """Return hostpart's command line of QEMU without ``-S`` and without the monitor, which are its keeper's.

    :raises ValueError: where it has something else that only works below the keeper: a descriptor's number
    """
    pairs: list[list[str]] = []
    for word in argv[1:]:
        if word.startswith("-") and word != "-":
            pairs.append([word])
        elif pairs:
            pairs[-1].append(word)
        else:
            raise ValueError(f"{word!r} belongs to no option")
    monitors = set()
    for option, *values in pairs:
        if option in ("-mon", "--mon"):
            fields = dict(field.partition("=")[::2] for field in values[0].split(","))
            # "-mon NAME" is short for "-mon chardev=NAME"
            monitors.add(fields.get("chardev", values[0].split(",")[0]))
    kept = [argv[0]]
    for option, *values in pairs:
        name = option.lstrip("-")
        if name in ("S", "qmp", "qmp-pretty", "mon"):
            continue
        if name == "chardev" and any(field.removeprefix("id=") in monitors for field in values[0].split(",")[1:]):
            continue
        if any(field.startswith("fd=") for value in values for field in value.split(",")):
            raise ValueError(f"{option} {' '.join(values)} names a descriptor that only the keeper's child has")
        kept += [option, *values]
    return kept


class Boot:
    """What both ways have in common: the console's file, and the wait for its first byte."""

    def __init__(self, console: str, environment: dict[str, str]) -> None:
        self.console, self.environment = console, environment

    def start(self, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], float]:
        """Start *command*; return it, and the seconds until the console's file had a byte."""
        if os.path.exists(self.console):
            os.unlink(self.console)
        begin = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while not self._has_begun():
            if time.perf_counter() - begin > _LIMIT_S or process.poll() is not None:
                process.terminate()
                said = process.communicate()[1].decode(errors="replace")
                sys.exit(f"{' '.join(command)}: no byte on the console\n{said}")
            time.sleep(0.001)
        return process, time.perf_counter() - begin

    def _has_begun(self) -> bool:
        try:
            return os.stat(self.console).st_size > 0
        except FileNotFoundError:
            return False


class Launched(Boot):
    """The guest by ``hostpart launch``.

    :ivar argv: the command line of the QEMU that the last run had, as hostpart gave it
    """

    def __init__(self, file: str, console: str, environment: dict[str, str]) -> None:
        super().__init__(console, environment)
        self.file = file
        self.argv: list[str] = []

    def __call__(self) -> float:
        """Return the seconds of one run."""
        process, taken = self.start([*_HOSTPART, "launch", self.file])
        self.argv = self._qemu()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=_LIMIT_S)
        return taken

    # The one process with this run's runtime directory in its environment that is no Python.
    def _qemu(self) -> list[str]:
        mark = os.fsencode(f"HOSTPART_RUNTIME_DIR={self.environment['HOSTPART_RUNTIME_DIR']}\0")
        for pid in procfs.processes():
            if mark not in (procfs.environ_block(pid) or b""):
                continue
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                argv = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
            if argv and "qemu" in os.path.basename(argv[0]):
                return argv
        sys.exit("hostpart's QEMU is not to be found")


class ByHand(Boot):
    """The same QEMU, started by taskset."""

    def __init__(self, launched: Launched) -> None:
        super().__init__(launched.console, launched.environment)
        self.launched = launched
        self.pcpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))

    def __call__(self) -> float:
        """Return the seconds of one run; one of the other way must have gone before."""
        process, taken = self.start(["taskset", "-c", self.pcpus, *by_hand(self.launched.argv)])
        process.kill()
        process.communicate()
        return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kernel")
    parser.add_argument("initrd", nargs="?")
    parser.add_argument("-n", "--runs", type=int, default=30)
    parser.add_argument("-a", "--accelerator", default="tcg")
    args = parser.parse_args()
    print(facts())
    with place() as more:
        folder = os.path.dirname(more["HOSTPART_RUNTIME_DIR"])
        console, file = f"{folder}/console", f"{folder}/boot.toml"
        with open(file, "w", encoding="utf-8") as out:
            initrd = os.path.abspath(args.initrd) if args.initrd else None
            out.write(scenario(os.path.abspath(args.kernel), initrd, args.accelerator, console))
        launched = Launched(file, console, {**os.environ, **more})
        taken = in_turns(args.runs, launched, ByHand(launched), warm_up=2)
        print(f"by hand: {' '.join(by_hand(launched.argv))}")
    print(f"time to the console's first byte, {args.accelerator}, one vCPU ({_ALLOWED} is wanted):")
    report(("hostpart launch", "the same QEMU by hand"), taken, "ms", 1e3)


if __name__ == "__main__":
    main()

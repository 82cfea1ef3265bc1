"""``python -m tests.vm [-k KERNEL] [-s SETUP] SCRIPT [ARGS]``: run a script as root in a virtual machine.

The project is in the guest at ``/project`` as it is in this checkout, ``hostpart`` is a command there, and
``python3 -m pytest`` works. What the script prints comes out here as it is printed.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import time
from pathlib import Path

from tests.vm import debian
from tests.vm.cache import LabError
from tests.vm.cargo import CARGOES
from tests.vm.image import HOME, project
from tests.vm.machine import SETUPS, TOPOLOGIES, Kind, booted, resumed


def main() -> int:
    """Run one script and return its exit status: 128+N if signal N ended it, 125 if the lab itself failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("-k", "--kernel", choices=[*debian.KERNELS], default="6.12")
    parser.add_argument("-s", "--setup", choices=SETUPS, default="v2")
    parser.add_argument("-t", "--topology", choices=[*TOPOLOGIES], default="2x2x2")
    parser.add_argument("-a", "--cmdline", default="", help="more words for the kernel's command line")
    parser.add_argument("--cargo", choices=CARGOES, default="", help="what else is there")
    parser.add_argument("-T", "--limit", type=float, default=300, metavar="SECONDS", help="the machine is ended then")
    parser.add_argument("-c", action="store_true", dest="shell", help="SCRIPT is a command line for the guest's shell")
    parser.add_argument("--add", action="append", default=[], metavar="FILE:PATH", help="one more file for the guest")
    parser.add_argument("script", metavar="SCRIPT", help="a file with a #! line, or one that ends with .py")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS")
    args = parser.parse_args()
    kind = Kind(args.kernel, args.setup, args.topology, args.cmdline, args.cargo)
    added = io.BytesIO()
    argv = ["/bin/sh", "-c", args.script, "sh", *args.args]
    with tarfile.open(fileobj=added, mode="w:gz") as archive:
        if not args.shell:
            name = f"/lab/run/{Path(args.script).name}"
            argv = [*(["python3"] if name.endswith(".py") else []), name, *args.args]
            archive.add(args.script, name, filter=_executable)
        for pair in args.add:
            path, _, name = pair.partition(":")
            archive.add(path, name or f"/lab/run/{Path(path).name}")
    start = time.monotonic()
    try:
        state = booted(kind)
        with resumed(kind, state, lambda line: print(line, flush=True)) as machine, machine.limit(args.limit):
            machine.say({"do": "unpack"}, project(everything=True))
            machine.say({"do": "unpack"}, added.getvalue())
            status = int(str(machine.say({"do": "execute", "argv": argv, "cwd": HOME})["status"]))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 125
    print(f"lab: {kind.label}: exit status {status} after {time.monotonic() - start:.1f} s", file=sys.stderr)
    return status if status >= 0 else 128 - status


def _executable(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.mode |= 0o755
    return entry


if __name__ == "__main__":
    sys.exit(main())

"""``hostpart launch``: the whole flow of a scenario file, from the service VM's boot to the guests' evidence."""

from __future__ import annotations

import argparse
import os
import sys

from .. import recovery
from ..config import load_scenario
from ..cpuset import CpuSet
from ..device_model import Caller
from ..errors import HostpartError, UsageError
from ..front import Front, Interrupted, Running, exit_code, say
from ..host import Host
from ..isolation import LEVELS
from ..launcher import Launch, plan, rehearse, supply_now, wish_of
from ..lease import Leases
from ..ledger import runtime_directory
from ..systemd import notify
from ..topology import Topology, read_topology
from . import options
from .run import check_wish, level_text, refuse_nested, warn_of_throttling
from .table import colour_wanted, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from ..config import Scenario

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Boot the service VM with a vCPU on every pCPU, release the pCPUs meant for guests, create the file's\n"
        "user VMs on them vCPU by vCPU, run their guests, and print where each one ran, from what the kernel says."
    )
    parser.epilog = (
        "examples:\n"
        "  hostpart launch example:first        fits any host with two usable pCPUs\n"
        "  hostpart launch --dry-run my.toml    what it would do\n"
        "  hostpart launch -d my.toml           in the background: then ps, show, stop\n\n"
        "Exit status: 0 every guest ended with 0, 1 one did not or hostpart failed, 2 the file is wrong,\n"
        "3 it does not fit, 4 not permitted, 5 with --strict if a partition did not hold, 128+N after signal N."
    )
    parser.add_argument("file", metavar="FILE", help="scenario (TOML), or example:NAME")
    parser.add_argument(
        "-d", "--detach", action="store_true", help="go on in the background once the guests run; output in log files"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the placement and every write to the host; change nothing"
    )
    parser.add_argument("--isolation", choices=LEVELS, help="instead of the file's")
    parser.add_argument(
        "--scope",
        type=options.scope,
        metavar="SCOPE",
        help="whose tasks may be moved, instead of the file's: host, user, tree:PID, cgroup:PATH",
    )
    parser.add_argument("--require", action="store_true", help="fail rather than run at a lower level of isolation")
    parser.add_argument("--strict", action="store_true", help="exit 5 if a partition did not hold")
    parser.add_argument(
        "--foreign-limit", type=options.percent, metavar="PERCENT",
        help="how much of a pCPU's time others may take before the verdict is tainted, instead of the file's",
    )  # fmt: skip
    parser.add_argument(
        "--wait", nargs="?", type=options.wait_seconds, const=float("inf"), metavar="SECONDS",
        help="queue for pCPUs in order of arrival; write --wait=SECONDS, for ever without a number",
    )  # fmt: skip
    parser.add_argument("--results", metavar="DIR", help="write each VM's evidence to DIR/VM.json")
    parser.add_argument(
        "--json", action="store_true", help="print events as JSON Lines; the guests' stdout goes to stderr"
    )
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="show log records of every worker; twice: in detail"
    )


def run(args: argparse.Namespace) -> int:
    """Launch the scenario."""
    scenario = _scenario(args)
    refuse_nested()
    for vm in scenario.vms:
        if vm.isolation == "affinity" and scenario.service.release == "hotplug":
            raise UsageError(
                f"VM {vm.name!r} has isolation 'affinity', and with release = \"hotplug\" tasks must be moved first",
                "hostpart launch --isolation sweep ..., or more",
            )
        check_wish(wish_of(vm, scenario.service))
    if not args.dry_run:
        recovery.tidy()
    topology = read_topology(Host(), madt=True)
    if args.dry_run:
        return _dry_run(args, scenario, topology)
    if args.results:
        try:
            os.makedirs(args.results, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--results {args.results}: {error.strerror}", "name a directory that can be made"
            ) from None
    if args.verbose:
        from .verbosity import enable

        enable(args.verbose)
    if args.detach:
        return _detach(args, scenario, topology)
    return _launch(
        args, scenario, topology, _Teller(args, scenario, topology), {vm.name: _caller(args) for vm in scenario.vms}, {}
    )


def _scenario(args: argparse.Namespace) -> Scenario:
    scenario = load_scenario(args.file)
    changes: dict[str, Any] = {}
    if args.isolation:
        changes["isolation"] = args.isolation
    if args.scope:
        changes["scope"] = args.scope
    if args.require:
        changes["require"] = True
    if args.foreign_limit is not None:
        changes["foreign_limit"] = args.foreign_limit
    return scenario.replace(vms=tuple(vm.replace(**changes) for vm in scenario.vms)) if changes else scenario


def _caller(args: argparse.Namespace) -> Caller:
    caller = Caller()
    if args.json:
        caller.stdout_fd = 2
    return caller


def _launch(
    args: argparse.Namespace,
    scenario: Scenario,
    topology: Topology,
    teller: _Teller,
    callers: dict[str, Caller],
    logs: dict[str, str],
) -> int:
    front = Front(topology, next(iter(callers.values())), stop_on_interrupt=True, hear=teller.hear)
    for vm in scenario.vms:
        warn_of_throttling(vm)
    launch = Launch(scenario, front, callers, args.wait, logs)
    try:
        launch.start()
        teller.started()
        notify(f"READY=1\nSTATUS=guests run: {', '.join(vm.name for vm in scenario.vms)}")
        launch.wait()
    except Interrupted as interrupt:
        return 128 + interrupt.number
    finally:
        notify("STOPPING=1")
        launch.end()
    return _outcome(args, launch, front.stopped_by)


def _outcome(args: argparse.Namespace, launch: Launch, stopped_by: int | None) -> int:
    failed: HostpartError | None = None
    worst, broken, unwritten = 0, False, False
    for keeper in launch.vms:
        ended = keeper.said.get("ended")
        if ended is None:
            failed = failed or keeper.error
            continue
        if args.results:
            unwritten = _write(args.results, keeper.name, ended["evidence"]) or unwritten
        worst = worst or exit_code(ended["statuses"])
        broken = broken or ended["evidence"]["verdict"] != "held"
        for number in sorted(set(ended["exec_errors"].values())):
            say(f"VM {keeper.name!r}: its command cannot be executed: {os.strerror(number)}")
    if failed is not None:
        raise failed
    if stopped_by is not None:
        return 128 + stopped_by
    if args.strict and broken:
        return 5
    return 1 if worst or unwritten else 0


def _write(folder: str, name: str, document: dict[str, Any]) -> bool:
    # Whether it could not be written.
    import json

    path = os.path.join(folder, f"{name}.json")
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=2)
            file.write("\n")
    except OSError as error:
        say(f"the evidence of VM {name!r} cannot be written to {path!r}: {error.strerror}\ntry: another --results DIR")
        return True
    return False


class _Teller:
    # Tells what happens as it happens: sentences and tables for people, JSON Lines for programs.
    def __init__(self, args: argparse.Namespace, scenario: Scenario, topology: Topology) -> None:
        self.json, self.topology, self.scenario = args.json, topology, scenario
        self.colour = colour_wanted(sys.stdout)
        self.ready: list[dict[str, Any]] = []
        self.documents: list[dict[str, Any]] = []
        self.levels: dict[str, dict[str, Any]] = {}

    def hear(self, keeper: Running, message: dict[str, Any]) -> None:
        event = message["event"]
        if event == "note":
            say(f"VM {keeper.name!r}: {message['text']}")
        elif event == "waiting":
            say(f"VM {keeper.name!r} waits for pCPUs: {message['why']}")
        elif event == "lost":
            say(f"the keeper of VM {keeper.name!r} was killed")
        elif event == "booted":
            self._booted(message)
        elif event == "released":
            self._released(message)
        elif event == "created":
            self._created(keeper, message)
        elif event == "ready":
            self.ready.append(message)
        elif event == "ended" and "evidence" in message:
            self.documents.append(message["evidence"])
            if self.json:
                self._print_json({"event": "ended", "vm": keeper.name, "evidence": message["evidence"]})
            elif len(self.documents) == len(self.scenario.vms):
                self._evidence()

    def started(self) -> None:
        """Say where the guests are; they run."""
        for text in self.level_texts():
            say(text)
        if self.json:
            for event in self.ready_events():
                self._print_json(event)
            return
        self._print(self.vcpus_table())

    def vcpus_table(self, logs: Mapping[str, str] | None = None) -> str:
        """Return where each vCPU is.

        :param logs: the file that has each VM's output, by its name
        """
        headers, rows = ["VM", "vCPU", "pCPU", "pid"], []
        vcpus = [(message["vm"], vcpu) for message in self.ready for vcpu in message["vcpus"]]
        threads = any("tid" in vcpu for _, vcpu in vcpus)
        headers += [*(["thread"] if threads else []), *(["output"] if logs else [])]
        for name, vcpu in vcpus:
            row = [name, vcpu["vcpu"], vcpu["pcpu"], vcpu["pid"]]
            rows.append([*row, *([vcpu.get("tid")] if threads else []), *([logs[name]] if logs else [])])
        return table(headers, rows, colour=self.colour and not logs)

    def _booted(self, message: dict[str, Any]) -> None:
        pcpus = CpuSet.of(vcpu["pcpu"] for vcpu in message["vcpus"])
        if self.json:
            self._print_json({"event": "booted", "vm": "vm0", "kept": message["kept"], "vcpus": message["vcpus"]})
            return
        doubts = f" ({'; '.join(self.topology.doubts)})" if self.topology.doubts else ""
        source = f"as {'the MADT' if message['madt'] else 'sysfs'} lists them{doubts}"
        self._print(f"service VM booted with {len(pcpus)} vCPUs on pCPU {pcpus}, {source}")
        astray = [vcpu for vcpu in message["vcpus"] if vcpu["ran_on"] != vcpu["pcpu"]]
        self._print(f"each vCPU read its pin back and ran there: {'no' if astray else 'yes'}")

    def _created(self, keeper: Running, message: dict[str, Any]) -> None:
        self.levels[keeper.name] = message["isolation"]
        if self.json:
            return
        idle = f", pCPU {message['idle']} idle beside it" if message["idle"] else ""
        self._print(f"user VM {keeper.name!r} created on pCPU {CpuSet.of(message['pcpus'])}{idle}")

    def _released(self, message: dict[str, Any]) -> None:
        if not message["pcpus"]:
            return  # all of it had been released with an earlier VM's
        if self.json:
            self._print_json({"event": "released", "vm": "vm0", "pcpus": message["pcpus"]})
        else:
            self._print(f"service VM released pCPU {message['pcpus']}")

    def _evidence(self) -> None:
        from .evidence import summary

        in_file = [vm.name for vm in self.scenario.vms]
        for document in sorted(self.documents, key=lambda document: in_file.index(document["vm"])):
            self._print("\n" + summary(document, colour=self.colour))

    def level_texts(self) -> list[str]:
        """Return what there is to say of the levels that were reached."""
        texts = (level_text(isolation, name) for name, isolation in self.levels.items())
        return [text for text in texts if text]

    def ready_events(self) -> list[dict[str, Any]]:
        return [
            {"event": "ready", "vm": m["vm"], "vcpus": m["vcpus"], "isolation": self.levels[m["vm"]]}
            for m in self.ready
        ]

    def _print_json(self, event: dict[str, Any]) -> None:
        import json

        self._print(json.dumps(event))

    def _print(self, text: str) -> None:
        print(text, flush=True)


def _dry_run(args: argparse.Namespace, scenario: Scenario, topology: Topology) -> int:
    from .plan import render

    supply = supply_now(topology, scenario.service, scenario.explicit, Leases())
    placements = plan(topology, scenario, supply)
    writes: list[str] | None = None
    if any(vm.isolation != "affinity" for vm in scenario.vms):
        writes, levels = rehearse(scenario, placements)
        for name, isolation in levels.items():
            if text := level_text(isolation.to_json(), name):
                say(text)
    render(placements, args.json, topology, supply, writes)
    return 0


def _detach(args: argparse.Namespace, scenario: Scenario, topology: Topology) -> int:
    folder = os.path.join(runtime_directory(), "log")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    logs = {vm.name: os.path.join(folder, f"{vm.name}.log") for vm in scenario.vms}
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write)
        # Up to a NUL, not to the end of file: the keepers hold the other end too.
        said = b""
        while not said.endswith(b"\0") and (part := os.read(read, 1 << 16)):
            said += part
        if said[:1] == b"0":
            # The guests run; the child goes on by itself and is init's to reap.
            print(said[1:-1].decode(), end="", flush=True)
            return 0
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            say(
                f"signal {-code} ended the process in the background before the guests ran; nothing of it runs\n"
                "try: run it again"
            )
        sys.stderr.write(said[1:-1].decode())
        return 128 - code if code < 0 else code or 1
    code = 1
    try:
        os.close(read)
        code = _detached(args, scenario, topology, logs, write)
    finally:
        os._exit(code)


def _detached(
    args: argparse.Namespace, scenario: Scenario, topology: Topology, logs: dict[str, str], parent: int
) -> int:
    os.setsid()
    callers: dict[str, Caller] = {}
    # Emptied when the VM is created: until then the file may be that of a running VM of the same name.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    opened = {name: os.open(path, flags, 0o600) for name, path in logs.items()}
    null = os.open(os.devnull, os.O_RDONLY)
    first = opened[scenario.vms[0].name]
    for fd, target in ((null, 0), (first, 1), (first, 2)):
        os.dup2(fd, target)
    for name, fd in opened.items():
        callers[name] = Caller()
        callers[name].stdout_fd = callers[name].stderr_fd = fd
    teller = _Detached(args, scenario, topology, parent, logs, opened)
    try:
        return _launch(args, scenario, topology, teller, callers, logs)
    except HostpartError as error:
        if not teller.failed(error):
            say(f"{error}\ntry: {error.remedy}")
        return error.exit_code


class _Detached(_Teller):
    # Tells the user who is still waiting at the terminal, until the guests run; then the log files.
    def __init__(
        self,
        args: argparse.Namespace,
        scenario: Scenario,
        topology: Topology,
        parent: int,
        logs: dict[str, str],
        opened: dict[str, int],
    ) -> None:
        super().__init__(args, scenario, topology)
        self.parent, self.logs, self.opened = parent, logs, opened

    def hear(self, keeper: Running, message: dict[str, Any]) -> None:
        if message["event"] == "created":
            os.ftruncate(self.opened[keeper.name], 0)
        super().hear(keeper, message)

    def started(self) -> None:
        import json

        if self.json:
            text = "".join(json.dumps(event) + "\n" for event in self.ready_events())
        else:
            text = "\n".join([*self.level_texts(), self.vcpus_table(self.logs), ""])
        self._tell(b"0" + text.encode())

    def failed(self, error: HostpartError) -> bool:
        """Tell why it failed; whether somebody was still waiting."""
        return self._tell(f"1hostpart: {error}\ntry: {error.remedy}\n".encode())

    def _tell(self, text: bytes) -> bool:
        if self.parent < 0:
            return False
        os.write(self.parent, text + b"\0")
        os.close(self.parent)
        self.parent = -1
        return True

"""How long it takes from asking for a VM of one vCPU to READY, against a bare process that pins itself and answers.

The whole way is in it: ``IC_CREATE_VM`` (the allocator's lock, a look at every lease and at who is
pinned alone, the placement, the lease, the VM's row), ``IC_CREATE_VCPU`` (fork, the vCPU's row) and
the worker until READY (signals, its cgroup leaf, its pin and the reading back). The guest is never
started. Log handlers, opening the ledger and making the leaf, which come once per keeper, are left out.

The bare process is a :class:`multiprocessing.Process` of the fork context that pins itself to the
same pCPU and writes a byte. Both are forked from this process, which keeps to the lowest pCPU, as a
keeper does. One leaf serves all runs, and they follow each other closely, so the kernel's wait at a
first entry (README.md, "what disappoints") is not in the figures.

Run with ``python -m bench.bench_create [RUNS]`` in a checkout.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable

from hostpart import recovery
from hostpart.cgroup import Leaf
from hostpart.config import Guest, ServiceVm, VmConfig
from hostpart.cpuset import CpuSet
from hostpart.device_model import Caller, DeviceModel
from hostpart.host import Host
from hostpart.hypervisor import Hypervisor
from hostpart.lease import Leases
from hostpart.ledger import Ledger, VmRow, boot_id
from hostpart.procfs import start_time
from hostpart.topology import Topology, read_topology

from .measure import facts, in_turns, place, report

_ALLOWED = 1.5


class Creation:
    """One VM, created and cancelled.

    :ivar vcpu_s: how long the last ``IC_CREATE_VCPU`` to READY took, in seconds
    """

    def __init__(self, topology: Topology, pcpu: int, ledger: Ledger) -> None:
        self.topology, self.ledger = topology, ledger
        self.config = VmConfig("bench", Guest("command", ("true",)), 1)
        self.pcpu = pcpu
        self.leaf, _ = Leaf.create(f"bench-{os.getpid()}")
        self.caller = Caller()
        self.vcpu_s = 0.0

    def __call__(self) -> float:
        """Return how long the creation of VM and vCPU took, in seconds."""
        model = DeviceModel(self.config, ServiceVm(), self.caller, [])
        hypervisor = Hypervisor(self.topology, Leases(), self.ledger, model.boot, self._forget)
        model.attach(hypervisor)
        model.leaf = self.leaf
        this = os.getpid()
        row = VmRow(
            0, "bench", 0, model.token, boot_id(), "INIT", 1, "true", this, start_time(this) or 0, this, time.time()
        )
        hypervisor.announce(row)
        begin = time.perf_counter()
        model.vm_create()
        created = time.perf_counter()
        model.vm_create_vcpu(0)
        heard = model.hear()
        end = time.perf_counter()
        assert heard[0][1] == "ready", heard
        assert model.pcpus == CpuSet.of([self.pcpu]), "the two ways were not on the same pCPU"
        self.vcpu_s = end - created
        model.all_forked()
        model.cancel()
        (pid,) = model.pids
        _, status = os.waitpid(pid, 0)
        model.worker_ended(pid, status)
        model.vm_destroy()
        os.close(model._status_r)
        os.close(model._start_r)
        return end - begin

    def _forget(self) -> None:
        recovery.recover(self.ledger)


def bare(pcpu: int) -> Callable[[], float]:
    """Return what takes the time of a bare process until it has pinned itself and answered."""
    context = multiprocessing.get_context("fork")

    def run() -> float:
        read, write = os.pipe()
        begin = time.perf_counter()
        process = context.Process(target=_pin_and_answer, args=(pcpu, write))
        process.start()
        os.read(read, 1)
        end = time.perf_counter()
        process.join()
        os.close(read)
        os.close(write)
        return end - begin

    return run


def _pin_and_answer(pcpu: int, write: int) -> None:
    os.sched_setaffinity(0, {pcpu})
    os.write(write, b"r")


def main() -> None:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        sys.exit("this needs two usable pCPUs")
    print(facts())
    with place() as environment:
        os.environ.update(environment)
        topology = read_topology(Host())
        os.sched_setaffinity(0, usable[:1])
        with Ledger() as ledger:
            creation = Creation(topology, usable[1], ledger)
            vcpu: list[float] = []

            def whole() -> float:
                taken = creation()
                vcpu.append(creation.vcpu_s)
                return taken

            try:
                taken = in_turns(runs, whole, bare(usable[1]))
            finally:
                if creation.leaf is not None:
                    creation.leaf.remove()
    print(f"from IC_CREATE_VM to READY (at most {_ALLOWED} is wanted):")
    report(("hostpart: VM and vCPU", "bare fork-context Process"), taken, "ms", 1e3)
    print("of it, from IC_CREATE_VCPU to READY:")
    report(("hostpart: vCPU", "bare fork-context Process"), (vcpu[-runs:], taken[1]), "ms", 1e3)


if __name__ == "__main__":
    main()

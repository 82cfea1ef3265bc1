"""The device model driven by hand, with real workers on real pCPUs; and through the command where that is shorter.

Each ``do_…`` function below runs in a process of its own (this file as a script): what forks workers has one thread.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hostpart import hypercall as hc
from hostpart import procfs, tree
from hostpart.allocator import POLICIES, SMT_MODES
from hostpart.config import Guest, ServiceVm, VmConfig
from hostpart.cpuset import CpuSet
from hostpart.device_model import Caller, DeviceModel, refused
from hostpart.errors import DoesNotFit, Failed, HostpartError, NotPermitted, UsageError
from hostpart.host import Host
from hostpart.hypervisor import Hypervisor
from hostpart.lease import LEASE_FD, Leases
from hostpart.ledger import Ledger, VmRow, boot_id
from hostpart.topology import read_topology
from tests.conftest import Place, wait_until
from tests.partition import FIRST, Partition, machine
from workers.vcpu import NOT_STARTED, STAGES

NOBODY = 65534


def config(*argv: str, **more: object) -> VmConfig:
    return VmConfig("rt", Guest("command", argv or ("true",)), 1).replace(**more)


def _model(wanted: VmConfig, service: ServiceVm | None = None) -> DeviceModel:
    # As the keeper makes one, with the lease directory and the ledger that the environment names.
    model = DeviceModel(wanted, service or ServiceVm(), Caller(), [])
    ledger = Ledger()
    model.attach(Hypervisor(read_topology(Host()), Leases(), ledger, model.boot))
    pid = os.getpid()
    model.hypervisor.announce(
        VmRow(0, wanted.name, 0, model.token, boot_id(), "INIT", 1, "", pid, procfs.start_time(pid) or 0, pid, 0.0)
    )
    return model


def _ready(model: DeviceModel) -> list[list[str]]:
    heard: list[list[str]] = []
    while len(heard) < len(model.pids):
        heard += model.hear()
    return heard


def _reap(model: DeviceModel) -> list[int]:
    codes = []
    for pid in model.alive:
        _, status = os.waitpid(pid, 0)
        model.worker_ended(pid, status)
        codes.append(os.waitstatus_to_exitcode(status))
    return codes


def _state(model: DeviceModel) -> tuple[str, list[str]]:
    (row,) = model.hypervisor.ledger.vms()
    return row.state, [vcpu.state for vcpu in model.hypervisor.ledger.vcpus(row.id)]


def do_life() -> dict[str, object]:
    model = _model(config("sleep", "600"))
    model.vm_create()
    pcpu = model.vm_create_vcpu(0)
    model.all_forked()
    said: dict[str, object] = {"pcpu": pcpu, "placed": list(model.vm.placement.pcpus), "ready": _ready(model)}
    (pid,) = model.pids
    said["pinned"] = sorted(os.sched_getaffinity(pid))
    said["before START"] = Path(f"/proc/{pid}/comm").read_text(), _state(model)
    model.vm_start()
    # Asleep, and not only of that name: until then the loader and the locale have files open.
    assert wait_until(lambda: (stat := procfs.read_stat(pid)) is not None and (stat.comm, stat.state) == ("sleep", "S"))
    said["running"] = _state(model)
    inherited = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    said["inherited"] = {fd: path for fd, path in inherited.items() if int(fd) > 2}
    model.pause()
    said["paused"] = _state(model), tree.descendants(os.getpid())[0].state
    model.resume()
    said["resumed"] = _state(model)
    model.signal(signal.SIGTERM)
    said["codes"] = _reap(model)
    said["zombie"] = _state(model)
    model.vm_destroy()
    said["rows"] = len(model.hypervisor.ledger.vms())
    return said


def do_cancel(mark: str) -> dict[str, object]:
    model = _model(config("touch", mark))
    model.vm_create()
    model.vm_create_vcpu(0)
    model.all_forked()
    _ready(model)
    model.cancel()
    os.close(model._start_r)
    codes = _reap(model)
    model.vm_destroy()
    return {"codes": codes, "rows": len(model.hypervisor.ledger.vms())}


def do_exhaust() -> dict[str, object]:
    """Fork as a user who may have no more processes."""
    import resource

    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    model = _model(config("true"))
    model.vm_create()
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    try:
        model.vm_create_vcpu(0)
    except HostpartError as error:
        said = {"problem": str(error), "remedy": error.remedy}
    model.vm_destroy()
    return {**said, "rows": len(model.hypervisor.ledger.vms())}


def do_lease() -> dict[str, object]:
    model = _model(config("sleep", "600"))
    model.vm_create()
    model.vm_create_vcpu(0)
    model.all_forked()
    _ready(model)

    def lost() -> list[str]:
        return [str(pcpus) for pcpus in model.leases_lost()]

    before = lost()
    ((pcpu, fd),) = model.vm.leases.items()
    let_go = ["flock", "-u", str(fd)]
    subprocess.run(let_go, pass_fds=[fd], check=True)
    said: dict[str, object] = {"pcpu": str(pcpu), "before": before, "lost": lost(), "after": lost()}
    said["held"] = Leases().take(pcpu) is None
    subprocess.run(let_go, pass_fds=[fd], check=True)
    other = Leases().take(pcpu)
    said["taken by another"] = lost()
    os.close(other or -1)
    model.signal(signal.SIGKILL)
    _reap(model)
    model.vm_destroy()
    return said


def drive(place: Place, name: str, *args: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, __file__, name, *args], env=place.env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, object] = json.loads(done.stdout)
    return said


def test_a_vm_goes_from_its_configuration_to_its_destruction(place: Place, two_pcpus: None) -> None:
    said = drive(place, "do_life")
    pcpu = said["pcpu"]
    assert said["placed"] == [pcpu]
    assert said["ready"] == [["0", "ready", str(pcpu)]], "it says where it ran, and that is its pCPU"
    assert said["pinned"] == [pcpu]
    assert isinstance(said["before START"], list)
    assert said["before START"][0] != "sleep\n"
    assert said["before START"][1] == ["INIT", ["INIT"]]
    assert said["running"] == ["RUNNING", ["RUNNING"]]
    assert said["paused"] == [["PAUSED", ["PAUSED"]], "T"]
    assert said["resumed"] == ["RUNNING", ["RUNNING"]]
    assert said["codes"] == [-signal.SIGTERM]
    assert said["zombie"] == ["RUNNING", ["ZOMBIE"]]
    assert said["rows"] == 0
    assert place.is_clean()
    assert isinstance(said["inherited"], dict)
    (fd,) = said["inherited"]
    assert int(fd) >= LEASE_FD
    assert said["inherited"][fd] == f"{place.leases}/cpu{pcpu}", "a guest inherits its lease, and nothing else"


def test_a_worker_that_gets_no_start_ends_and_its_guest_has_never_run(
    place: Place, tmp_path: Path, two_pcpus: None
) -> None:
    assert drive(place, "do_cancel", str(tmp_path / "ran")) == {"codes": [NOT_STARTED], "rows": 0}
    assert not (tmp_path / "ran").exists()
    assert place.is_clean()


def test_a_fork_that_fails_is_a_sentence_about_processes_and_leaves_nothing(place: Place, two_pcpus: None) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user with a limit")
    restored = []
    for folder in (place.leases, place.runtime, *place.runtime.parents):
        mode = folder.stat().st_mode
        if folder in (place.leases, place.runtime):
            os.chown(folder, NOBODY, NOBODY)
        elif not mode & 0o001:
            restored.append((folder, mode))
            folder.chmod(mode | 0o001)
    try:
        said = drive(place, "do_exhaust")
    finally:
        for folder, mode in restored:
            folder.chmod(mode)
    assert "no process can be had for a worker" in str(said["problem"])
    assert "ulimit -u" in str(said["remedy"])
    assert said["rows"] == 0


def test_a_lease_let_go_by_an_heir_is_taken_again_and_told_once(place: Place, two_pcpus: None) -> None:
    said = drive(place, "do_lease")
    pcpu = said["pcpu"]
    assert said["before"] == ["", "", ""]
    assert said["lost"] == [pcpu, pcpu, ""], "lost, taken again, lost for good"
    assert said["after"] == ["", "", ""]
    assert said["held"] is True
    assert said["taken by another"] == [pcpu, "", pcpu]
    assert place.is_clean()


def test_the_whole_request_is_in_what_the_ioctl_carries() -> None:
    service = ServiceVm(2, CpuSet.parse("0,4"), CpuSet.parse("9"))
    model = DeviceModel(
        config(pcpus=(5, 3), vcpus=2, policy="spread", smt="whole", kind="efficiency"), service, Caller(), []
    )
    wish = model.wish()
    assert (POLICIES[wish.policy], SMT_MODES[wish.smt], wish.kind) == ("spread", "whole", 2)
    assert (wish.vcpu_num, wish.pcpus, wish.reserve, wish.keep, wish.keep_count) == (2, (5, 3), (9,), (0, 4), 2)
    assert wish.token == bytes.fromhex(model.token)
    assert hc.CreateVm.unpack(bytes(wish.pack())) == wish


def test_two_vms_have_two_tokens() -> None:
    assert len({DeviceModel(config(), ServiceVm(), Caller(), []).token for _ in range(20)}) == 20


@pytest.fixture
def small() -> Partition:
    return Partition(machine(range(FIRST, FIRST + 2)))


def test_a_refusal_of_the_allocator_s_reaches_the_caller_in_its_own_words(small: Partition) -> None:
    with small:
        model = DeviceModel(config(vcpus=5), ServiceVm(), Caller(), [])
        model.attach(small.hypervisor)
        small.hypervisor.announce(VmRow(0, "rt", 0, model.token, "b", "INIT", 5, "", 1, 1, 1, 0.0))
        with pytest.raises(DoesNotFit, match=r"5 pCPUs wanted, 1 free \(pCPU 65\); kept by the service VM: pCPU 64"):
            model.vm_create()
        assert small.untouched()


def test_an_errno_without_a_sentence_gets_one_that_names_call_vm_and_errno(small: Partition) -> None:
    with small:
        model = DeviceModel(config(), ServiceVm(), Caller(), [])
        model.attach(small.hypervisor)
        with pytest.raises(Failed, match=r"IC_CREATE_VM for VM 'rt' failed: Invalid argument \(EINVAL\)") as caught:
            model.vm_create()
        assert caught.value.remedy == "run 'hostpart show rt' to see its state"


REFUSALS = {
    "pin": (errno.EINVAL, Failed, "refused to pin vCPU 2 of VM 'rt' to pCPU 5: Invalid argument (EINVAL)"),
    "sched": (errno.EPERM, NotPermitted, "refused --sched fifo:50"),
    "nice": (errno.EACCES, NotPermitted, "refused --nice -5"),
    "mlock": (errno.ENOMEM, NotPermitted, "refused to lock the memory"),
    "mems": (errno.EINVAL, Failed, "refused to bind the memory of vCPU 2 of VM 'rt' to NUMA node 1"),
    "user": (errno.EPERM, NotPermitted, "cannot become user"),
    "cwd": (errno.ENOENT, UsageError, "cannot start in None: No such file or directory (ENOENT)"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_whatever_the_kernel_refuses_a_worker_is_worded_with_vcpu_vm_errno_and_a_remedy(stage: str) -> None:
    number, kind, text = REFUSALS.get(stage, (errno.EIO, Failed, f"failed at {stage!r}"))
    error = refused(config(sched="fifo", priority=50, nice=-5, mems=CpuSet.of([1])), 2, 5, stage, number)
    assert type(error) is kind
    assert text in str(error)
    assert "vCPU 2 of VM 'rt'" in str(error)
    assert errno.errorcode[number] in str(error)
    assert error.remedy


@pytest.mark.parametrize(
    ("more", "problem"),
    [({"user": "no-such-user"}, "there is no user 'no-such-user'"), ({"group": "no-such-group"}, "there is no group")],
    ids=["user", "group"],
)
def test_a_misspelt_user_or_group_is_refused_before_anything_is_made(more: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        DeviceModel(config(**more), ServiceVm(), Caller(), [])


# -- what the guests are told, through the command ------------------------------------------------------


def test_a_guest_s_environment_says_where_it_is_and_keeps_the_caller_s(place: Place, two_pcpus: None) -> None:
    place.env["MY_OWN"] = "kept"
    done = place.run("run", "--name", "rt", "--pcpus", "1", "--", "env")
    env = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert {name: env[name] for name in env if name.startswith("HOSTPART_V") or name == "HOSTPART_PCPU"} == {
        "HOSTPART_VM": "rt", "HOSTPART_VCPU": "0", "HOSTPART_VCPUS": "1", "HOSTPART_PCPU": "1",
    }  # fmt: skip
    assert len(env["HOSTPART_RUN"]) == 32
    assert env["MY_OWN"] == "kept"
    assert not [name for name in env if name.startswith(("OMP_", "GOMP_"))]


def test_an_smp_guest_is_one_process_that_openmp_spreads_over_its_pcpus(place: Place, two_pcpus: None) -> None:
    look = "echo $OMP_PLACES $OMP_PROC_BIND $GOMP_CPU_AFFINITY $HOSTPART_PCPU $HOSTPART_VCPUS; "
    look += "grep Cpus_allowed_list /proc/self/status"
    done = place.run("run", "--smp", "--pcpus", "1", "--", "sh", "-c", look)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["{1}", "true", "1", "1", "1", "Cpus_allowed_list:", "1"]


if __name__ == "__main__":
    json.dump(globals()[sys.argv[1]](*sys.argv[2:]), sys.stdout)

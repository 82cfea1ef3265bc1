"""Topology: made-up and recorded machines, this one against other tools, and the drawing."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpart.cli import topology as command
from hostpart.cli.topology import draw
from hostpart.cpuset import CpuSet
from hostpart.errors import Failed, UsageError
from hostpart.host import Host
from hostpart.topology import Pcpu, Topology, read_topology
from tests.machines import RECORDED, fake_host, madt, write_tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = "sys/devices/system/cpu"
SPREAD = ("0,4", "1,5", "2,6", "3,7")  # two threads a core, numbered as Intel does


def column(topology: Topology, field: str) -> list[object]:
    return [getattr(pcpu, field) for pcpu in topology.pcpus]


def test_threads_cores_caches_nodes_and_packages_are_told_apart(tmp_path: Path) -> None:
    host = fake_host(
        tmp_path, SPREAD, packages=("0-1,4-5", "2-3,6-7"), caches=("0,4", "1,5", "2-3,6-7"), nodes=("0-7",)
    )
    topology = read_topology(host)
    assert column(topology, "cpu") == list(range(8))
    assert column(topology, "core") == [0, 1, 2, 3] * 2
    assert column(topology, "package") == [0, 0, 1, 1] * 2
    assert column(topology, "llc") == [0, 1, 2, 2] * 2
    assert column(topology, "numa") == [0] * 8
    for field in ("die", "kind", "apic_id", "acpi_uid"):
        assert column(topology, field) == [None] * 8
    assert topology.cores == tuple(CpuSet.parse(core) for core in SPREAD)
    assert topology.siblings(5) == CpuSet.parse("1,5")
    assert topology.pcpu(6).core == 2
    assert topology.usable == topology.online == topology.numbers == CpuSet.parse("0-7")
    assert (topology.root, topology.madt, topology.doubts) == (str(tmp_path), False, ())


def test_offline_cpus_are_there_and_share_nothing(tmp_path: Path) -> None:
    topology = read_topology(fake_host(tmp_path, ["0,4", "1", "9"], offline="2-3,5"))
    assert topology.numbers == CpuSet.parse("0-5,9")
    assert topology.online == topology.usable == CpuSet.parse("0-1,4,9")
    assert topology.pcpu(5) == Pcpu(5, online=False)
    assert topology.siblings(5) == CpuSet()
    assert column(topology, "core") == [0, 1, None, None, 0, None, 2]
    with pytest.raises(KeyError):
        topology.pcpu(6)


def test_without_a_list_of_the_online_each_cpu_says_it_itself(tmp_path: Path) -> None:
    # Linux before 2.6.26; the first CPU could not go offline and had no such file.
    files = {f"{CPU}/online": None, f"{CPU}/cpu1/online": "1\n"}
    assert read_topology(fake_host(tmp_path, ["0-1"], offline="2", files=files)).online == CpuSet.parse("0-1")


def test_only_folders_named_by_a_number_are_cpus(tmp_path: Path) -> None:
    strange = {
        f"{CPU}/{name}/x": "" for name in ("cpufreq", "cpu", "cpu1x", "cpu٣", "cpu8192", "cpu99999999999", "xcpu1")
    }
    assert read_topology(fake_host(tmp_path, ["0"], files=strange)).numbers == CpuSet.parse("0")


@pytest.mark.parametrize(
    ("kernels", "package"),
    [
        pytest.param({"0-1": 0, "2-3": 8}, [0, 0, 8, 8], id="unique: kept"),
        pytest.param({"0-1": -1, "2-3": -1}, [0, 0, 1, 1], id="-1 (s390, POWER, virtual machines): counted"),
        pytest.param({"0-1": 0, "2-3": 0}, [0, 0, 1, 1], id="two alike (ia64): counted"),
        pytest.param({"0-1": None, "2-3": 1}, [0, 0, 1, 1], id="one unsaid: counted"),
    ],
)
def test_packages_have_the_kernels_number_where_it_can_tell_them_apart(
    tmp_path: Path, kernels: dict[str, int | None], package: list[int]
) -> None:
    files: dict[str, str | bytes | None] = {
        f"{CPU}/cpu{cpu}/topology/physical_package_id": None if name is None else f"{name}\n"
        for group, name in kernels.items()
        for cpu in CpuSet.parse(group)
    }
    topology = read_topology(fake_host(tmp_path, ["0", "1", "2", "3"], packages=("0-1", "2-3"), files=files))
    assert column(topology, "package") == package


def test_dies_and_cores_are_numbered_through_all_packages(tmp_path: Path) -> None:
    files = {f"{CPU}/cpu{cpu}/topology/die_id": f"{cpu // 2 % 2}\n" for cpu in range(8)}
    files |= {f"{CPU}/cpu{cpu}/topology/core_id": f"{cpu % 2}\n" for cpu in range(8)}
    host = fake_host(
        tmp_path,
        [str(cpu) for cpu in range(8)],
        packages=("0-3", "4-7"),
        dies=("0-1", "2-3", "4-5", "6-7"),
        files=files,
    )
    topology = read_topology(host)
    assert column(topology, "die") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert column(topology, "core") == list(range(8))


def test_a_die_called_minus_one_is_no_die(tmp_path: Path) -> None:
    files = {f"{CPU}/cpu{cpu}/topology/die_id": "-1\n" for cpu in range(2)}
    assert column(read_topology(fake_host(tmp_path, ["0", "1"], dies=("0", "1"), files=files)), "die") == [None, None]


def test_a_cluster_is_neither_core_nor_die(tmp_path: Path) -> None:
    files = {f"{CPU}/cpu{cpu}/topology/cluster_cpus": "0000000f\n" for cpu in range(4)}
    topology = read_topology(fake_host(tmp_path, ["0", "1", "2", "3"], files=files))
    assert column(topology, "core") == [0, 1, 2, 3]
    assert column(topology, "die") == [None] * 4


@pytest.mark.parametrize("name", ["thread_siblings", "thread_siblings_list", "core_cpus_list"])
def test_cores_are_known_by_any_name_of_their_file(tmp_path: Path, name: str) -> None:
    files: dict[str, str | bytes | None] = {}
    for core in SPREAD:
        cpus = CpuSet.parse(core)
        for cpu in cpus:
            files[f"{CPU}/cpu{cpu}/topology/core_cpus"] = None
            files[f"{CPU}/cpu{cpu}/topology/{name}"] = core + "\n" if name.endswith("list") else cpus.to_mask()
    assert read_topology(fake_host(tmp_path, SPREAD, files=files)).cores == tuple(map(CpuSet.parse, SPREAD))


def test_without_sibling_files_cores_and_packages_go_by_their_ids(tmp_path: Path) -> None:
    files: dict[str, str | bytes | None] = {}
    for cpu in range(8):
        files[f"{CPU}/cpu{cpu}/topology/core_cpus"] = files[f"{CPU}/cpu{cpu}/topology/package_cpus"] = None
        files[f"{CPU}/cpu{cpu}/topology/physical_package_id"] = f"{cpu % 2}\n"
        files[f"{CPU}/cpu{cpu}/topology/core_id"] = f"{cpu // 4}\n"
    topology = read_topology(fake_host(tmp_path, SPREAD, files=files))
    assert column(topology, "package") == [0, 1] * 4
    assert list(map(str, topology.cores)) == ["0,2", "1,3", "4,6", "5,7"]


def test_siblings_with_core_ids_of_their_own_are_cores_of_their_own(tmp_path: Path) -> None:
    # AMD family 15h on older kernels; the core ids repeat in the package's other node.
    files = {f"{CPU}/cpu{cpu}/topology/core_id": f"{cpu % 4}\n" for cpu in range(8)}
    topology = read_topology(fake_host(tmp_path, ["0-1", "2-3", "4-5", "6-7"], files=files))
    assert column(topology, "core") == list(range(8))


@pytest.mark.parametrize("threads", [4, 8])
def test_power_has_many_threads_a_core(tmp_path: Path, threads: int) -> None:
    cores = [f"{first}-{first + threads - 1}" for first in range(0, 64, threads)]
    topology = read_topology(fake_host(tmp_path, cores, packages=cores, caches=cores))
    assert {len(core) for core in topology.cores} == {threads}
    assert topology.pcpu(63).core == 64 // threads - 1


def test_no_topology_folder_leaves_each_cpu_alone(tmp_path: Path) -> None:
    folder = ("core_cpus", "core_id", "package_cpus", "physical_package_id")
    files = {f"{CPU}/cpu{cpu}/topology/{name}": None for cpu in range(2) for name in folder}
    topology = read_topology(fake_host(tmp_path, ["0", "1"], files=files))
    assert column(topology, "core") == column(topology, "package") == [None, None]
    assert topology.cores == (CpuSet.parse("0"), CpuSet.parse("1"))
    assert topology.siblings(1) == CpuSet.parse("1")


def test_a_machine_without_numa_or_caches_says_so(tmp_path: Path) -> None:
    host = fake_host(tmp_path, SPREAD, nodes=(), caches=())
    shutil.rmtree(tmp_path / "sys/devices/system/node", ignore_errors=True)
    for cpu in range(8):
        shutil.rmtree(tmp_path / CPU / f"cpu{cpu}/cache")
    topology = read_topology(host)
    assert column(topology, "numa") == column(topology, "llc") == [None] * 8
    assert len(topology.cores) == 4


def test_nodes_keep_the_kernels_number_and_one_without_cpus_is_nobodys(tmp_path: Path) -> None:
    assert column(read_topology(fake_host(tmp_path, ["0", "1", "2"], nodes=("2", "", "0-1"))), "numa") == [2, 2, 0]


def test_a_node_that_claims_anothers_cpus_is_passed_over(tmp_path: Path) -> None:
    assert column(read_topology(fake_host(tmp_path, ["0", "1", "2"], nodes=("0-1", "1-2"))), "numa") == [0, 0, None]


def test_the_last_cache_may_differ_from_core_to_core(tmp_path: Path) -> None:
    # Low-power cores beside the L3: the last cache they have is the L2 of the four.
    files = {f"{CPU}/cpu{cpu}/cache/index2/shared_cpu_map": "000000f0\n" for cpu in range(4, 8)}
    host = fake_host(tmp_path, [str(cpu) for cpu in range(8)], caches=("0-3",), files=files)
    assert column(read_topology(host), "llc") == [0] * 4 + [1] * 4


def test_a_cache_counts_only_if_it_holds_data_has_a_size_and_says_who_shares_it(tmp_path: Path) -> None:
    files: dict[str, str | bytes | None] = {}
    for odd in (0, 1):
        files |= {
            f"{CPU}/cpu{0 + odd}/cache/index3/shared_cpu_map": None,
            f"{CPU}/cpu{2 + odd}/cache/index3/type": "Instruction\n",
            f"{CPU}/cpu{4 + odd}/cache/index3/size": "0K\n",
            f"{CPU}/cpu{6 + odd}/cache/index3/shared_cpu_map": "00000000\n",  # ia64: the core's own
        }
    cores = ["0", "1", "2", "3", "4", "5", "6-7"]
    host = fake_host(tmp_path, cores, caches=("0-1", "2-3", "4-5", "6-7"), files=files)
    assert column(read_topology(host), "llc") == [0, 1, 2, 3, 4, 5, 6, 6]


def test_files_that_contradict_each_other_still_give_each_cpu_one_core(tmp_path: Path) -> None:
    files: dict[str, str | bytes | None] = {f"{CPU}/cpu2/topology/core_cpus": "00000006\n"}
    topology = read_topology(fake_host(tmp_path, ["0-1", "2"], files=files))
    assert topology.cores == (CpuSet.parse("0-1"), CpuSet.parse("2"))


def test_a_cpu_without_a_cache_folder_is_known_to_share_what_others_share_with_it(tmp_path: Path) -> None:
    host = fake_host(tmp_path, ["0", "1", "2"], caches=("0-1", "2"))
    shutil.rmtree(tmp_path / CPU / "cpu0/cache")
    assert column(read_topology(host), "llc") == [0, 0, 1]


def test_intels_kinds_come_from_its_counters(tmp_path: Path) -> None:
    files: dict[str, str | bytes | None] = {
        "sys/devices/cpu_core/cpus": "0-3\n",
        "sys/bus/event_source/devices/cpu_atom/cpus": "4-5\n",
        "sys/devices/cpu_lowpower/cpus": "6\n",
    }
    topology = read_topology(fake_host(tmp_path, ["0,1", "2,3", "4", "5", "6", "7"], files=files))
    assert column(topology, "kind") == ["performance"] * 4 + ["efficiency"] * 3 + [None]


@pytest.mark.parametrize(
    ("file", "cores", "values", "kinds"),
    [
        ("cpu_capacity", ("0", "1", "2"), (446, 446, 1024), ["efficiency", "efficiency", "performance"]),
        ("cpu_capacity", ("0", "1", "2"), (1024, 1024, 1024), [None] * 3),
        ("cpu_capacity", ("0", "1", "2"), (446, None, 1024), [None] * 3),
        ("cpufreq/base_frequency", ("0-1", "2"), (1900000, 1900000, 1400000), ["performance"] * 2 + ["efficiency"]),
        ("cpufreq/base_frequency", ("0", "1", "2"), (1900000, 1900000, 1400000), [None] * 3),
    ],
    ids=["Arm", "all alike", "one unsaid", "Intel hybrid", "Speed Select is not hybrid"],
)
def test_kinds_come_from_capacity_or_base_frequency(
    tmp_path: Path, file: str, cores: tuple[str, ...], values: tuple[int | None, ...], kinds: list[str | None]
) -> None:
    files = {f"{CPU}/cpu{cpu}/{file}": f"{value}\n" for cpu, value in enumerate(values) if value is not None}
    assert column(read_topology(fake_host(tmp_path, cores, files=files)), "kind") == kinds


V2 = {"proc/mounts": "none /sys/fs/cgroup cgroup2 rw 0 0\n", "sys/fs/cgroup/cgroup.controllers": "cpu cpuset\n"}
V1 = {"proc/mounts": "none /cpusets\\040here cgroup rw,cpuset 0 0\nnone /unified cgroup2 rw 0 0\n"}


@pytest.mark.parametrize(
    ("files", "usable"),
    [
        pytest.param(
            V2 | {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/step/cpuset.cpus.effective": "1-2\n"},
            "1-2",
            id="v2",
        ),
        pytest.param(
            V2 | {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/cpuset.cpus.effective": "1-2\n"},
            "1-2",
            id="v2, controlled above",
        ),
        pytest.param(
            V2 | {"proc/self/cpuset": "/job\n", "sys/fs/cgroup/job/cpuset.cpus.effective": "0-5,90\n"},
            "0-5",
            id="v2, by the cpuset's name",
        ),
        pytest.param(
            V2 | {"sys/fs/cgroup/cgroup.controllers": "cpu\n", "proc/self/cgroup": "0::/\n"},
            "0-7",
            id="v2 without cpusets",
        ),
        pytest.param(
            V1 | {"proc/self/cgroup": "0::/no\n3:cpuset:/job\n", "cpusets here/job/cpuset.cpus": "6-7\n"},
            "6-7",
            id="v1 beside v2",
        ),
        pytest.param(
            {
                "proc/mounts": "none /dev/cpuset cgroup rw,cpuset,noprefix 0 0\n",
                "proc/self/cpuset": "/job\n",
                "dev/cpuset/job/cpus": "3\n",
            },
            "3",
            id="v1 without prefix",
        ),
        pytest.param(
            {
                "proc/self/mounts": "none /dev/cpuset cpuset rw 0 0\n",
                "proc/self/cpuset": "/\n",
                "dev/cpuset/cpus": "0-3\n",
            },
            "0-3",
            id="the cpuset file system",
        ),
        pytest.param({"proc/self/status": "Name:\tx\nCpus_allowed_list:\t2-4\n"}, "2-4", id="affinity"),
        pytest.param(
            V2
            | {
                "proc/self/status": "Cpus_allowed_list:\t2-4\n",
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/cpuset.cpus.effective": "4-7\n",
            },
            "4",
            id="both",
        ),
        pytest.param({"proc/mounts": "short\n\nnone /x cgroup2\n"}, "0-7", id="nothing said"),
    ],
)
def test_a_recorded_process_may_use_what_its_cgroup_and_affinity_leave(
    tmp_path: Path, files: dict[str, str | bytes | None], usable: str
) -> None:
    assert read_topology(fake_host(tmp_path, SPREAD, files=files)).usable == CpuSet.parse(usable)


def local_apic(uid: int, apic_id: int, flags: int = 1) -> bytes:
    return bytes([0, 8, uid, apic_id, flags, 0, 0, 0])


def with_firmware(root: Path, table: bytes, apic_ids: tuple[int | None, ...], offline: str = "") -> Topology:
    info = "\n".join(
        f"processor\t: {cpu}\n" + ("" if apic_id is None else f"apicid\t\t: {apic_id}\n")
        for cpu, apic_id in enumerate(apic_ids)
    )
    files: dict[str, str | bytes | None] = {"proc/cpuinfo": info, "sys/firmware/acpi/tables/APIC": table}
    host = fake_host(root, [str(cpu) for cpu in range(len(apic_ids))], offline=offline, files=files)
    return read_topology(host, madt=True)


def test_firmware_ids_are_mapped_by_apic_id(tmp_path: Path) -> None:
    io_apic = bytes([1, 12, *bytes(10)])
    topology = with_firmware(
        tmp_path, madt(local_apic(7, 0), io_apic, local_apic(8, 2), local_apic(9, 0xFF, 0)), (2, 0)
    )
    assert column(topology, "apic_id") == [2, 0]
    assert column(topology, "acpi_uid") == [8, 7]
    assert topology.madt
    assert topology.doubts == ()


def test_arms_ids_are_mapped_by_the_uid_that_sysfs_tells(tmp_path: Path) -> None:
    def gicc(uid: int, mpidr: int) -> bytes:
        structure = bytearray(80)
        structure[:2] = 11, 80
        structure[8], structure[12] = uid, 1
        structure[68:76] = mpidr.to_bytes(8, "little")
        return bytes(structure)

    files: dict[str, str | bytes | None] = {
        "sys/firmware/acpi/tables/APIC": madt(gicc(10, 0x100), gicc(11, 0x200)),
        f"{CPU}/cpu0/firmware_node/uid": "11\n",
        f"{CPU}/cpu1/firmware_node/uid": "10\n",
    }
    topology = read_topology(fake_host(tmp_path, ["0", "1"], files=files), madt=True)
    assert column(topology, "apic_id") == [0x200, 0x100]
    assert column(topology, "acpi_uid") == [11, 10]
    assert topology.madt


def test_without_being_asked_the_firmware_is_not_read(tmp_path: Path) -> None:
    with_firmware(tmp_path, madt(local_apic(0, 0)), (0,))
    topology = read_topology(Host(str(tmp_path)))
    assert topology.pcpu(0).apic_id is None
    assert not topology.madt


@pytest.mark.parametrize(
    ("table", "apic_ids", "offline", "said"),
    [
        pytest.param(b"", (0, 1), "", "broken at byte 0", id="no table"),
        pytest.param(madt(), (0, 1), "", "lists no processor", id="empty"),
        pytest.param(madt(local_apic(0, 0)), (0, 1), "", "does not list CPU 1", id="one missing"),
        pytest.param(madt(local_apic(0, 0), local_apic(1, 1, 0)), (0, 1), "", "CPU 1 as disabled", id="disabled"),
        pytest.param(madt(local_apic(0, 0), local_apic(1, 1)), (0, None), "", "no firmware id of CPU 1", id="unknown"),
        pytest.param(
            madt(*(local_apic(n, n) for n in range(3))),
            (0,),
            "1",
            "3 enabled processors, and the kernel has 2",
            id="more",
        ),
    ],
)
def test_what_speaks_against_the_madt_is_said(
    tmp_path: Path, table: bytes, apic_ids: tuple[int | None, ...], offline: str, said: str
) -> None:
    topology = with_firmware(tmp_path, table, apic_ids, offline)
    assert not topology.madt
    assert any(said in doubt for doubt in topology.doubts), topology.doubts


def test_entries_of_offline_cpus_and_double_entries_agree(tmp_path: Path) -> None:
    x2apic = bytes([9, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])  # APIC id 0 once more, disabled
    topology = with_firmware(tmp_path, madt(local_apic(0, 0), local_apic(1, 1), x2apic), (0,), "1")
    assert topology.doubts == ()
    assert topology.madt


def test_an_unreadable_madt_leaves_sysfs_alone(tmp_path: Path) -> None:
    topology = read_topology(fake_host(tmp_path, ["0"]), madt=True)
    assert not topology.madt
    assert "No such file" in topology.doubts[0]
    assert topology.online == CpuSet.parse("0")


def test_a_recorded_machine_is_read_whole() -> None:
    topology = read_topology(Host(str(RECORDED)), madt=True)
    assert topology.pcpus == (
        Pcpu(0, core=0, package=0, die=0, numa=0, llc=0, apic_id=0, acpi_uid=0),
        Pcpu(1, core=1, package=0, die=0, numa=0, llc=0, apic_id=1, acpi_uid=1),
    )
    assert topology.madt
    assert topology.usable == CpuSet.parse("0-1")


def test_bytes_that_tar_filled_up_with_zeros_do_no_harm(tmp_path: Path) -> None:
    for path in RECORDED.rglob("*"):
        if path.is_file() and path.name != "APIC":
            write_tree(tmp_path, {str(path.relative_to(RECORDED)): path.read_bytes().ljust(4096, b"\0")})
    assert read_topology(Host(str(tmp_path))).pcpus == read_topology(Host(str(RECORDED))).pcpus


class Garbled(Host):
    """The recorded machine, with what *change* makes of each file."""

    def __init__(self, change: Callable[[str, bytes], bytes]) -> None:
        super().__init__(str(RECORDED))
        self.change = change

    def read_bytes(self, name: str) -> bytes:
        return self.change(name, super().read_bytes(name))


@given(st.data())
def test_garbled_files_are_as_if_they_were_not_there(data: st.DataObject) -> None:
    draws: dict[str, bytes] = {}

    def change(name: str, content: bytes) -> bytes:
        if name not in draws:
            draws[name] = data.draw(st.sampled_from([content, b"", b"\xff\xfe", b"-", b"9999999", b"x", content[:-2]]))
        return draws[name]

    topology = read_topology(Garbled(change), madt=True)
    assert topology.numbers == CpuSet.parse("0-1")
    assert topology.usable <= topology.online <= topology.numbers
    assert sorted(cpu for core in topology.cores for cpu in core) == list(topology.online)


def test_want_of_descriptors_is_not_taken_for_silence() -> None:
    def change(name: str, content: bytes) -> bytes:
        if name.endswith("core_cpus"):
            raise OSError(24, "Too many open files")
        return content

    with pytest.raises(Failed, match="Too many open files"):
        read_topology(Garbled(change))


@pytest.mark.parametrize("files", [{"sys/x": ""}, {f"{CPU}/online": "0\n"}])
def test_a_tree_without_cpus_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    write_tree(tmp_path, files)
    with pytest.raises(UsageError, match="shows no CPUs"):
        read_topology(Host(str(tmp_path)))


def test_no_file_is_read_per_cpu_that_its_core_could_answer_for(tmp_path: Path) -> None:
    fake_host(tmp_path, [f"{core * 8}-{core * 8 + 7}" for core in range(32)])
    read: list[str] = []

    class Counting(Host):
        def read_bytes(self, name: str) -> bytes:
            read.append(name)
            return super().read_bytes(name)

    read_topology(Counting(str(tmp_path)))
    assert len(read) < 3 * 32  # 256 CPUs
    assert len(read) == len(set(read))


# This machine, against others' answers.


@pytest.fixture(scope="module")
def live() -> Topology:
    return read_topology(Host())


def test_online_cpus_are_those_of_libc(live: Topology) -> None:
    assert len(live.online) == os.sysconf("SC_NPROCESSORS_ONLN")


def test_usable_cpus_are_those_of_the_scheduler(live: Topology) -> None:
    assert set(live.usable) == os.sched_getaffinity(0)


def test_usable_follows_the_affinity_of_this_process() -> None:
    code = (
        "import os; from hostpart.host import Host; from hostpart.topology import read_topology;"
        "os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}); print(read_topology(Host()).usable)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(max(os.sched_getaffinity(0)))


@pytest.mark.skipif(not shutil.which("lscpu"), reason="lscpu (util-linux) is not installed")
def test_cores_packages_and_nodes_are_those_of_lscpu(live: Topology) -> None:
    done = subprocess.run(["lscpu", "-p=CPU,CORE,SOCKET,NODE"], capture_output=True, text=True, check=True)
    rows = [line.split(",") for line in done.stdout.splitlines() if not line.startswith("#")]
    assert [int(row[0]) for row in rows] == list(live.online)

    def sets(key: Callable[[int], object]) -> set[frozenset[int]]:
        groups: dict[object, set[int]] = {}
        for cpu in live.online:
            groups.setdefault(key(cpu), set()).add(cpu)
        return {frozenset(group) for group in groups.values()}

    theirs = {int(row[0]): row for row in rows}
    for index, field in ((1, "core"), (2, "package"), (3, "numa")):
        if any(theirs[cpu][index] for cpu in live.online):
            assert sets(lambda cpu, index=index: theirs[cpu][index]) == sets(  # type: ignore[misc]
                lambda cpu, field=field: getattr(live.pcpu(cpu), field)  # type: ignore[misc]
            )


def test_reading_the_live_machine_imports_nothing_slow() -> None:
    slow = ("dataclasses", "typing", "pathlib", "json", "tomllib", "contextlib", "logging", "psutil", "tarfile")
    code = (
        f"import sys; before = set(sys.modules); sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r});"
        "from hostpart.host import Host; from hostpart.topology import read_topology; read_topology(Host());"
        f"print([name for name in {slow} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# As a value, and as JSON.

ids = st.none() | st.integers(0, 5)
pcpus = st.builds(
    Pcpu,
    cpu=st.integers(0, 300),
    core=ids,
    package=ids,
    die=ids,
    numa=ids,
    llc=ids,
    online=st.booleans(),
    apic_id=ids,
    acpi_uid=ids,
    kind=st.sampled_from([None, "performance", "efficiency"]),
)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    found = draw(st.lists(pcpus, min_size=1, max_size=24, unique_by=lambda pcpu: pcpu.cpu))
    found.sort(key=lambda pcpu: pcpu.cpu)
    online = [pcpu.cpu for pcpu in found if pcpu.online]
    usable = draw(st.sets(st.sampled_from(online))) if online else set()
    return Topology(tuple(found), CpuSet.of(usable), root="/some/tree", madt=draw(st.booleans()))


@given(topologies())
def test_json_reads_back(topology: Topology) -> None:
    assert Topology.from_json(json.loads(json.dumps(topology.to_json()))) == topology


@given(topologies())
def test_every_online_cpu_is_in_exactly_one_core(topology: Topology) -> None:
    assert sorted(cpu for core in topology.cores for cpu in core) == list(topology.online)
    assert [core.lowest for core in topology.cores] == sorted(core.lowest for core in topology.cores)
    for core in topology.cores:
        assert all(topology.siblings(cpu) == core for cpu in core)


def test_it_is_a_value_whatever_was_asked_of_it() -> None:
    one, other = (read_topology(Host(str(RECORDED))) for _ in range(2))
    assert one.cores
    assert one.siblings(0)
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301  our own bytes


GOOD = {
    "schema": 1,
    "source": {"root": "/", "madt": False},
    "usable": "0",
    "pcpus": [{"cpu": 0}, {"cpu": 1, "online": False}],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema"),
        ({"usable": 3}, "usable: want a CPU list"),
        ({"usable": "0-"}, "not a CPU"),
        ({"usable": "0-1"}, "usable: 1 is not online"),
        ({"pcpus": []}, "pcpus"),
        ({"pcpus": {"cpu": 0}}, "pcpus"),
        ({"pcpus": [7]}, r"pcpus\[0\]: want an object"),
        ({"pcpus": [{"cpu": 0}, {"cpu": 0}]}, r"pcpus\[1\].cpu: 0 is there twice"),
        ({"pcpus": [{"cpu": True}]}, "want a whole number"),
        ({"pcpus": [{"cpu": 8192}]}, "8191, got 8192"),
        ({"pcpus": [{"cpu": 0, "core": "0"}]}, r"pcpus\[0\].core"),
        ({"pcpus": [{"cpu": 0, "numa": -1}]}, r"pcpus\[0\].numa"),
        ({"pcpus": [{"cpu": 0, "online": 1}]}, r"pcpus\[0\].online"),
        ({"pcpus": [{"cpu": 0, "kind": 1}]}, r"pcpus\[0\].kind"),
    ],
)
def test_json_that_is_no_topology_is_refused_by_its_key(change: dict[str, object], said: str) -> None:
    assert len(Topology.from_json(GOOD).pcpus) == 2
    with pytest.raises(UsageError, match=said) as caught:
        Topology.from_json(GOOD | change, "here.json")
    assert str(caught.value).startswith("here.json is no topology")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)
    )
)
def test_no_json_raises_anything_but_a_usage_error(value: object) -> None:
    for document in (value, GOOD | {"pcpus": value}, GOOD | {"usable": value}, GOOD | {"source": value}):
        try:
            Topology.from_json(document)
        except UsageError:
            pass


# The drawing, and the command.


def drawn(topology: Topology, holders: dict[int, str] | None = None, width: int = 80) -> str:
    return draw(topology, holders or {}, width=width, colour=False, unicode=True)


def test_a_small_host_is_drawn_like_this(tmp_path: Path) -> None:
    host = fake_host(tmp_path, ["0,4", "1,5", "2,6"], nodes=("0-1,4-5", "2,6"), caches=("0-1,4-5", "2,6"), offline="3")
    topology = read_topology(host).replace(usable=CpuSet.parse("0-2,4-5"), root="/here")
    assert (
        drawn(topology, {1: "rt", 5: "rt", 4: "web"})
        == """\
6 pCPUs, 3 cores, 1 package, 2 NUMA nodes; usable 0-2,4-5; /here
┌─package 0───────────────────────────────┐
│ ┌─NUMA 0, cache 0──────┐ ┌─NUMA 1─────┐ │
│ │ ┌─core 0─┐┌─core 1─┐ │ │ ┌─core 2─┐ │ │
│ │ │ 0  4b  ││ 1a 5a  │ │ │ │ 2  6-  │ │ │
│ │ └────────┘└────────┘ │ │ └────────┘ │ │
│ └──────────────────────┘ └────────────┘ │
└─────────────────────────────────────────┘
offline: 3
- not usable by this process
a rt: pCPU 1,5
b web: pCPU 4"""
    )


machines = st.builds(
    lambda cores, threads, sharing: Topology(
        tuple(
            Pcpu(
                thread * cores + core,
                core=core,
                package=core // (sharing * 2),
                numa=core // sharing,
                llc=core // max(sharing // 2, 1),
                online=(thread, core) != (1, 1),
                kind="performance" if core % 3 == 0 else None,
            )
            for thread in range(threads)
            for core in range(cores)
        ),
        CpuSet.of(range(0, cores, 2)),
    ),
    st.integers(1, 80),
    st.integers(1, 4),
    st.integers(1, 16),
)


@given(machines, st.integers(40, 200), st.integers(0, 60))
def test_a_drawing_fits_the_width_and_shows_every_cpu_once(topology: Topology, width: int, held: int) -> None:
    holders = {cpu: f"vm{cpu}" for cpu in list(topology.online)[:held]}
    plain = drawn(topology, holders, width)
    lines = plain.splitlines()
    assert max(map(len, lines)) <= width
    if len(topology.online) <= 288:
        cells = " ".join(re.sub("[┌└][^┐┘]*[┐┘]", " ", line) for line in lines if "│" in line or "[" in line)
        assert sorted(map(int, re.findall("[0-9]+", cells))) == list(topology.online)
    coloured = draw(topology, holders, width=width, colour=True, unicode=True)
    assert command._STYLE.sub("", coloured) == plain
    assert draw(topology, holders, width=width, colour=False, unicode=False).isascii()


def test_a_cpu_without_a_core_is_drawn_too() -> None:
    assert "core ?" in drawn(Topology((Pcpu(0),), CpuSet.parse("0")))


def test_groups_that_only_overlap_are_not_drawn_into_each_other() -> None:
    topology = Topology(
        tuple(Pcpu(cpu, core=cpu, package=cpu // 2, numa=(cpu + 1) // 2) for cpu in range(4)), CpuSet.parse("0-3")
    )
    assert "package 1" in drawn(topology)
    assert drawn(topology).count("core") == 5  # four boxes and the summary


def test_boxes_stand_in_order_of_their_lowest_cpu() -> None:
    topology = Topology(tuple(Pcpu(cpu, core=cpu, package=min(cpu, 1)) for cpu in range(4)), CpuSet.parse("0-3"))
    assert drawn(topology).index("package 0─") < drawn(topology).index("package 1─")


def test_more_holders_than_letters_are_told_apart_below() -> None:
    topology = Topology(tuple(Pcpu(cpu, core=cpu) for cpu in range(60)), CpuSet.parse("0-59"))
    text = drawn(topology, {cpu: f"vm{cpu:02}" for cpu in range(60)})
    assert "* vm59: pCPU 59" in text
    assert "a vm00: pCPU 0" in text


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add(parser)
    return command.run(parser.parse_args(words))


def test_the_command_prints_the_json_that_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--root", str(RECORDED), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["schema", "source", "usable", "pcpus"]
    assert document["source"] == {"root": str(RECORDED), "madt": True}
    assert document["pcpus"][1] == {
        "cpu": 1,
        "core": 1,
        "package": 0,
        "die": 0,
        "numa": 0,
        "llc": 0,
        "online": True,
        "apic_id": 1,
        "acpi_uid": 1,
        "kind": None,
    }
    assert Topology.from_json(document) == read_topology(Host(str(RECORDED)), madt=True)


def test_the_command_draws_without_colour_where_nobody_looks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert call("--root", str(RECORDED)) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "─core 0─" in out
    assert max(map(len, out.splitlines())) <= 50


def test_the_command_refuses_what_is_no_machine(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no 'sys' folder"):
        call("--root", str(tmp_path))

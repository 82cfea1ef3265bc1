"""The guest's topology: made-up and recorded hosts, QEMU's word on the seats, and what a booted Linux finds."""

from __future__ import annotations

import asyncio
import math
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpart.cpuset import CpuSet
from hostpart.errors import UsageError
from hostpart.host import Host
from hostpart.madt import parse_madt
from hostpart.qemu.mirror import Facts, Mirror, Seat, mirror, read_facts
from hostpart.topology import Pcpu, Topology, read_topology
from tests.machines import RECORDED, fake_host
from tests.vm import debian
from tests.vm.cache import Unavailable

MIB = 1 << 20
QEMU = "qemu-system-x86_64"
SMT = ("0,4", "1,5", "2,6", "3,7")  # two threads a core, numbered as Intel does
TWO_NODES = {"packages": ("0-1,4-5", "2-3,6-7"), "caches": ("0-1,4-5", "2-3,6-7"), "nodes": ("0-1,4-5", "2-3,6-7")}
needs_qemu = pytest.mark.skipif(not shutil.which(QEMU), reason=f"needs {QEMU}")


def read(root: Path, cores: Sequence[str] = SMT, **shared: Sequence[str]) -> Topology:
    return read_topology(fake_host(root, cores, **shared))  # type: ignore[arg-type]


def told(topology: Topology, pcpus: Sequence[int], **more: object) -> Mirror:
    words: dict[str, object] = {"memory_bytes": 256 * MIB, "accelerator": "tcg", **more}
    return mirror(topology, pcpus, **words)  # type: ignore[arg-type]


def values(found: Mirror, option: str) -> list[str]:
    return [value for name, value in zip(*[iter(found.arguments)] * 2, strict=True) if name == option]


def smp(found: Mirror) -> dict[str, int]:
    (text,) = values(found, "-smp")
    return {name: int(number) for name, number in (word.split("=") for word in text.split(","))}


def at(found: Mirror) -> list[tuple[int, int, int, int]]:
    return [(seat.socket, seat.die, seat.core, seat.thread) for seat in found.seats]


# What is told of made-up and recorded hosts.


def test_the_recorded_machine_is_told_whole() -> None:
    host = Host(str(RECORDED))
    found = told(read_topology(host), [1, 0], accelerator="kvm", facts=read_facts(host))
    assert found.arguments == (
        *("-smp", "cpus=2,maxcpus=2,sockets=1,dies=1,cores=2,threads=1"),
        *("-cpu", "host"),
        *("-m", "256M"),
    )
    assert found.seats == (Seat(0, 0, 0, 0, None, 0, 0), Seat(0, 0, 1, 0, None, 1, 1))
    assert found.notes == ()


def test_threads_of_a_core_are_threads_in_the_order_of_the_vcpus(tmp_path: Path) -> None:
    found = told(read(tmp_path), [5, 2, 1, 6])
    assert smp(found) == {"cpus": 4, "maxcpus": 4, "sockets": 1, "dies": 1, "cores": 2, "threads": 2}
    assert at(found) == [(0, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1)]
    assert [(seat.apic_id, seat.linux_cpu) for seat in found.seats] == [(0, 0), (2, 2), (1, 1), (3, 3)]
    assert not values(found, "-device")


def test_a_gap_between_the_seats_is_left_by_plugging_the_cpus_behind_it(tmp_path: Path) -> None:
    found = told(read(tmp_path), [1, 0, 4])
    assert values(found, "-smp") == ["cpus=1,maxcpus=12,sockets=3,dies=1,cores=2,threads=2"]
    assert values(found, "-device") == [
        "max-x86_64-cpu,socket-id=0,die-id=0,core-id=1,thread-id=0",
        "max-x86_64-cpu,socket-id=0,die-id=0,core-id=1,thread-id=1",
    ]
    assert [seat.apic_id for seat in found.seats] == [0, 2, 3]
    assert [seat.linux_cpu for seat in found.seats] == [0, 1, 2]


def test_under_tcg_gaps_between_ids_are_there_only_where_more_than_eight_cpus_could_be(tmp_path: Path) -> None:
    # Three cores of each package, with no seat empty: ids 0 to 2 and 4 to 6.
    six = read(tmp_path / "six", list("012345"), packages=("0-2", "3-5"), caches=("0-2", "3-5"))
    assert smp(told(six, range(6)))["sockets"] == 3
    assert smp(told(six, range(3)))["sockets"] == 1
    assert smp(told(six, range(6), flat=True))["sockets"] == 1
    assert smp(told(six, range(6), accelerator="kvm"))["sockets"] == 2
    ten = read(tmp_path / "ten", [str(cpu) for cpu in range(10)], packages=("0-4", "5-9"), caches=("0-4", "5-9"))
    assert smp(told(ten, range(10)))["sockets"] == 2
    assert values(told(read(tmp_path), [1, 0, 4], accelerator="kvm"), "-smp") == [
        "cpus=1,maxcpus=4,sockets=1,dies=1,cores=2,threads=2"
    ]


def test_a_gap_behind_all_seats_needs_no_plugging(tmp_path: Path) -> None:
    found = told(read(tmp_path), [0, 4, 1])
    assert values(found, "-smp") == ["cpus=3,maxcpus=4,sockets=1,dies=1,cores=2,threads=2"]
    assert not values(found, "-device")


@pytest.mark.parametrize(
    ("shared", "counts", "dies"),
    [
        pytest.param({}, (1, 1), [0, 0, 0, 0], id="one cache"),
        pytest.param({"caches": ("0-1,4-5", "2-3,6-7")}, (1, 2), [0, 0, 1, 1], id="two caches in a package"),
        pytest.param({"dies": ("0-1,4-5", "2-3,6-7")}, (1, 2), [0, 0, 1, 1], id="two dies, one cache"),
        pytest.param({"caches": SMT, "dies": ("0-1,4-5", "2-3,6-7")}, (1, 4), [0, 1, 2, 3], id="caches in dies"),
        pytest.param({"nodes": ("0-1,4-5", "2-3,6-7")}, (1, 2), [0, 0, 1, 1], id="two nodes in a package"),
        pytest.param({"packages": ("0-1,4-5", "2-3,6-7")}, (2, 1), [0, 0, 0, 0], id="two packages"),
    ],
)
def test_a_die_is_the_smallest_of_die_cache_and_node(
    tmp_path: Path, shared: dict[str, Sequence[str]], counts: tuple[int, int], dies: list[int]
) -> None:
    found = told(read(tmp_path, **shared), [0, 1, 2, 3])
    assert (smp(found)["sockets"], smp(found)["dies"]) == counts
    assert [seat.die for seat in found.seats] == dies


def test_each_level_of_the_apic_id_has_whole_bits(tmp_path: Path) -> None:
    # Three cores take two bits, three dies two more.
    cores = [str(cpu) for cpu in range(18)]
    thirds = [f"{first}-{first + 2}" for first in range(0, 18, 3)]
    found = told(read(tmp_path, cores, caches=thirds, packages=("0-8", "9-17")), range(18))
    assert smp(found) == {"cpus": 18, "maxcpus": 18, "sockets": 2, "dies": 3, "cores": 3, "threads": 1}
    assert [seat.apic_id for seat in found.seats] == [
        *(0, 1, 2, 4, 5, 6, 8, 9, 10),
        *(16, 17, 18, 20, 21, 22, 24, 25, 26),
    ]
    assert [seat.linux_cpu for seat in found.seats] == list(range(18))


def test_each_node_has_its_share_of_memory_bound_to_where_its_pcpus_are(tmp_path: Path) -> None:
    facts = Facts(mems=CpuSet.parse("0-1"), distances=((0, 0, 10), (0, 1, 21), (1, 0, 22), (1, 1, 10)))
    found = told(read(tmp_path, **TWO_NODES), [2, 0, 6], facts=facts, memory_bytes=257 * MIB + 8192)
    assert values(found, "-m") == ["263176K"]
    assert values(found, "-object") == [
        "memory-backend-ram,id=memory0,size=132104K,host-nodes=1,policy=bind",
        "memory-backend-ram,id=memory1,size=128M,host-nodes=0,policy=bind",
    ]
    assert values(found, "-numa") == [
        "node,nodeid=0,memdev=memory0",
        "node,nodeid=1,memdev=memory1",
        "cpu,node-id=0,socket-id=0",
        "cpu,node-id=1,socket-id=1",
        "dist,src=0,dst=1,val=22",
        "dist,src=1,dst=0,val=21",
    ]
    assert [seat.node for seat in found.seats] == [0, 1, 0]
    assert found.notes == ()


def test_a_vm_on_one_node_of_several_is_bound_to_it(tmp_path: Path) -> None:
    found = told(read(tmp_path, **TWO_NODES), [2, 3])
    assert values(found, "-object") == ["memory-backend-ram,id=memory0,size=256M,host-nodes=1,policy=bind"]
    assert values(found, "-numa") == ["node,nodeid=0,memdev=memory0", "cpu,node-id=0,socket-id=0"]
    assert [seat.node for seat in found.seats] == [0, 0]


def test_nodes_inside_a_package_are_told_die_by_die_absent_ones_too(tmp_path: Path) -> None:
    cores = [str(cpu) for cpu in range(6)]
    topology = read(tmp_path, cores, packages=("0-3", "4-5"), nodes=("0-1", "2-3", "4-5"))
    found = told(topology, [0, 2, 4], accelerator="kvm")
    assert [text for text in values(found, "-numa") if text.startswith("cpu")] == [
        "cpu,node-id=0,socket-id=0,die-id=0",
        "cpu,node-id=1,socket-id=0,die-id=1",
        "cpu,node-id=2,socket-id=1,die-id=0",
        "cpu,node-id=2,socket-id=1,die-id=1",
    ]


@pytest.mark.parametrize(
    ("mems", "pcpus", "bound", "noted"),
    [
        pytest.param("0", [0, 2], ["host-nodes=0", "host-nodes=0"], 1, id="both elsewhere"),
        pytest.param("0-1", [0, 2], ["host-nodes=0", "host-nodes=1"], 0, id="just their own"),
        pytest.param("0-1", [2], ["host-nodes=0-1"], 0, id="one node over two"),
        pytest.param("0,2", [0], ["host-nodes=0,host-nodes=2"], 0, id="a list with a gap"),
    ],
)
def test_nodes_that_are_asked_for_are_bound_to(
    tmp_path: Path, mems: str, pcpus: list[int], bound: list[str], noted: int
) -> None:
    facts = Facts(distances=((0, 1, 21), (1, 0, 21)))
    found = told(read(tmp_path, **TWO_NODES), pcpus, mems=CpuSet.parse(mems), facts=facts)
    assert [text.partition("M,")[2] for text in values(found, "-object")] == [f"{nodes},policy=bind" for nodes in bound]
    assert len(found.notes) == noted
    assert bool([text for text in values(found, "-numa") if "dist" in text]) == (len(pcpus) > 1 and not noted)


def test_on_a_host_with_one_node_of_memory_nothing_is_bound_unasked(tmp_path: Path) -> None:
    assert not values(told(read(tmp_path / "one"), range(8)), "-numa")
    found = told(read(tmp_path / "asked"), [0], mems=CpuSet.parse("0"))
    assert values(found, "-object") == ["memory-backend-ram,id=memory0,size=256M,host-nodes=0,policy=bind"]
    found = told(read(tmp_path / "two", **TWO_NODES), [0, 2], facts=Facts(mems=CpuSet.parse("0")))
    assert values(found, "-object") == [f"memory-backend-ram,id=memory{node},size=128M" for node in (0, 1)]


def test_a_node_without_memory_is_bound_to_the_nearest_that_has_some(tmp_path: Path) -> None:
    topology = read(tmp_path, ("0", "1", "2"), nodes=("0", "1", "2"))
    facts = Facts(mems=CpuSet.parse("0,2"), distances=((1, 0, 30), (1, 2, 20), (1, 1, 10)))
    found = told(topology, [1], facts=facts)
    assert "host-nodes=2,policy=bind" in values(found, "-object")[0]
    assert found.notes == ("host node 1 has no memory: its CPUs' is bound to node 2",)
    assert "host-nodes=0,host-nodes=2," in values(told(topology, [1], facts=Facts(mems=facts.mems)), "-object")[0]


def test_distances_that_linux_would_throw_away_are_left_out_with_a_word(tmp_path: Path) -> None:
    found = told(read(tmp_path, **TWO_NODES), [0, 2], facts=Facts(distances=((0, 1, 10), (1, 0, 21))))
    assert not [text for text in values(found, "-numa") if "dist" in text]
    assert found.notes == ("the host's NUMA distances are not shown: node 1 is 10 from node 0",)


def test_flat_mirrors_nothing_and_binds_only_what_was_asked_for(tmp_path: Path) -> None:
    topology = read(tmp_path, **TWO_NODES)
    found = told(topology, [0, 4, 2, 6], flat=True)
    assert values(found, "-smp") == ["cpus=4,maxcpus=4,sockets=1,dies=1,cores=4,threads=1"]
    assert not values(found, "-numa")
    assert [seat.apic_id for seat in found.seats] == [0, 1, 2, 3]
    assert found.notes == ()
    found = told(topology, [0, 4, 2, 6], flat=True, mems=CpuSet.parse("1"))
    assert values(found, "-object") == ["memory-backend-ram,id=memory0,size=256M,host-nodes=1,policy=bind"]
    assert values(found, "-numa") == ["node,nodeid=0,memdev=memory0", "cpu,node-id=0,socket-id=0"]


def test_hybrid_cores_keep_their_threads_and_their_kind_is_said_to_be_lost(tmp_path: Path) -> None:
    files = {"sys/devices/cpu_core/cpus": "0-3\n", "sys/devices/cpu_atom/cpus": "4-5\n"}
    topology = read_topology(fake_host(tmp_path, ("0-1", "2-3", "4", "5"), files=files))
    found = told(topology, range(6))
    assert at(found) == [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1), (0, 0, 2, 0), (0, 0, 3, 0)]
    assert smp(found)["cpus"] == 5
    assert len(values(found, "-device")) == 1
    assert "efficiency cores look alike" in found.notes[0]
    assert told(topology, [4, 5]).notes == ()


def test_pcpus_of_which_the_kernel_says_nothing_are_cores_of_one_cache() -> None:
    found = told(Topology((Pcpu(3), Pcpu(7, online=False)), CpuSet.parse("3")), [7, 3])
    assert at(found) == [(0, 0, 0, 0), (0, 0, 1, 0)]
    assert not values(found, "-numa")


@pytest.mark.parametrize(
    ("words", "model"),
    [
        ({}, "max,vendor=GenuineIntel"),
        ({"accelerator": "kvm"}, "host"),
        ({"accelerator": "kvm", "facts": Facts("GenuineIntel")}, "host"),
        ({"accelerator": "kvm", "facts": Facts("AuthenticAMD")}, "host,topoext=on"),
        ({"accelerator": "kvm", "facts": Facts("HygonGenuine")}, "host,topoext=on"),
        ({"accelerator": "kvm", "cpu": "EPYC-v4,-svm", "facts": Facts("AuthenticAMD")}, "EPYC-v4,-svm"),
        ({"architecture": "aarch64"}, "max"),
        ({"architecture": "aarch64", "accelerator": "kvm"}, "host"),
    ],
)
def test_the_cpu_model_shows_what_is_mirrored_unless_one_is_asked_for(
    tmp_path: Path, words: dict[str, object], model: str
) -> None:
    topology = read(tmp_path)
    assert values(told(topology, [0, 4], **words), "-cpu") == [model]
    if "architecture" not in words:
        named = model.partition(",")[0]
        assert values(told(topology, [1, 0, 4], **words), "-device")[0].startswith(f"{named}-x86_64-cpu,")


def test_a_model_that_may_not_show_threads_under_tcg_is_noted(tmp_path: Path) -> None:
    topology = read(tmp_path)
    assert "'EPYC' was asked for" in told(topology, [0, 4], cpu="EPYC").notes[0]
    assert told(topology, [0, 1], cpu="EPYC").notes == ()
    assert told(topology, [0, 4], cpu="EPYC", accelerator="kvm").notes == ()


@pytest.mark.parametrize(
    ("wide", "counts", "said"),
    [
        pytest.param((2, 12, 5, 2), (2, 1, 60, 2), "sees no die and", id="no dies"),
        pytest.param((3, 1, 17, 3), (3, 1, 51, 1), "sees no threads, and no die", id="no threads"),
        pytest.param((3, 5, 4, 4), (1, 1, 240, 1), "cores of one socket", id="nothing"),
    ],
)
def test_what_takes_too_large_apic_ids_is_shown_coarser(
    wide: tuple[int, int, int, int], counts: tuple[int, ...], said: str
) -> None:
    topology = nested(wide, (1, 0, 0))
    found = told(topology, list(topology.numbers))
    assert tuple(smp(found)[name] for name in ("sockets", "dies", "cores", "threads")) == counts
    assert said in found.notes[0]
    assert "APIC ids above 254" in found.notes[0]
    assert max(seat.apic_id or 0 for seat in found.seats) <= 254
    # The nodes are told nevertheless.
    assert len({seat.node for seat in found.seats}) == wide[0]


def test_more_vcpus_than_ids_are_refused() -> None:
    topology = nested((1, 1, 256, 1), (0, 0, 0))
    assert max(seat.apic_id or 0 for seat in told(topology, range(255)).seats) == 254
    with pytest.raises(UsageError, match="256 vCPUs are more than the 255"):
        told(topology, range(256), flat=True)


def test_less_than_a_mebibyte_a_node_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="less than a MiB for each of 2 NUMA nodes"):
        told(read(tmp_path, **TWO_NODES), [0, 2], memory_bytes=MIB)


@pytest.mark.parametrize(("pcpus", "size"), [([], MIB), ([0, 0], MIB), ([9], MIB), ([0], 0), ([0], MIB + 4096)])
def test_what_can_only_be_a_slip_is_a_value_error(tmp_path: Path, pcpus: list[int], size: int) -> None:
    with pytest.raises(ValueError, match="want "):
        told(read(tmp_path), pcpus, memory_bytes=size)


def test_arm_has_clusters_and_no_gaps(tmp_path: Path) -> None:
    topology = read(tmp_path / "even", caches=("0-1,4-5", "2-3,6-7"))
    found = told(topology, [0, 2, 4, 6], architecture="aarch64")
    assert values(found, "-smp") == ["cpus=4,maxcpus=4,sockets=1,clusters=2,cores=1,threads=2"]
    assert {seat.apic_id for seat in found.seats} == {None}
    assert found.seats[1].is_of({"socket-id": 0, "cluster-id": 1, "core-id": 0, "thread-id": 0})
    found = told(topology, [0, 4, 1, 2, 3], architecture="aarch64")
    assert values(found, "-smp") == ["cpus=5,maxcpus=5,sockets=1,clusters=1,cores=5,threads=1"]
    assert not values(found, "-device")
    assert "no empty seats" in found.notes[0]
    found = told(read(tmp_path / "nodes", **TWO_NODES), [0, 1, 2], architecture="aarch64")
    assert [text for text in values(found, "-numa") if text.startswith("cpu")] == [
        f"cpu,node-id={node},socket-id=0,cluster-id=0,core-id={core}" for core, node in enumerate((0, 0, 1))
    ]


def test_the_kernel_is_asked_for_vendor_memory_and_distances(tmp_path: Path) -> None:
    node = "sys/devices/system/node"
    files: dict[str, str | bytes | None] = {
        "sys/devices/system/cpu/modalias": "cpu:type:x86,ven0002fam0019mod0011:feature:,0000,0001\n",
        f"{node}/online": "0,2\n",
        f"{node}/has_memory": "2\n",
        f"{node}/node0/distance": "10 32\n",
        f"{node}/node2/distance": "31 10\n",
    }
    host = fake_host(tmp_path, ["0"], files=files)
    distances = ((0, 0, 10), (0, 2, 32), (2, 0, 31), (2, 2, 10))
    assert read_facts(host) == Facts("AuthenticAMD", CpuSet.parse("2"), distances)
    (tmp_path / node / "node2/distance").write_text("31 10 7\n")
    (tmp_path / "sys/devices/system/cpu/modalias").unlink()
    assert read_facts(host) == Facts("", CpuSet.parse("2"))


def test_the_vendor_is_that_of_cpuinfo() -> None:
    named = re.search(r"^vendor_id\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if not named:
        pytest.skip("needs an x86 host")
    assert read_facts(Host()).vendor in (named[1], "")


def test_it_imports_nothing_slow() -> None:
    slow = ("dataclasses", "typing", "json", "re", "subprocess", "asyncio", "logging")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import hostpart.qemu.mirror;"
        f"print([name for name in {slow} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Laws.


def nested(wide: tuple[int, ...], numa: tuple[int, int, int], missing: frozenset[int] = frozenset()) -> Topology:
    """A host of packages, caches in each, cores in each and threads in each; siblings are numbered far apart.

    :param numa: whether packages, and caches, are nodes of their own, and what is added to their numbers
    :param missing: pCPUs that it does not have
    """
    packages, caches, cores, _ = wide
    pcpus = []
    for cpu in range(math.prod(wide)):
        core = cpu % (packages * caches * cores)
        cache = core // cores
        package = cache // caches
        node = numa[2] + (cache if numa[1] else package if numa[0] else 0)
        pcpus.append(Pcpu(cpu, core, package, package, node, cache))
    kept = tuple(pcpu for pcpu in pcpus if pcpu.cpu not in missing)
    return Topology(kept, CpuSet.of(pcpu.cpu for pcpu in kept))


@st.composite
def placements(draw: st.DrawFn) -> tuple[Topology, list[int]]:
    wide = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)))
    every = range(math.prod(wide))
    missing = draw(st.frozensets(st.sampled_from(every), max_size=len(every) - 1))
    topology = nested(wide, draw(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 9))), missing)
    pcpus = draw(st.lists(st.sampled_from(list(topology.numbers)), min_size=1, unique=True))
    return topology, pcpus


def partition(keys: Sequence[object]) -> list[int]:
    """Say of each which was the first that is like it."""
    return [keys.index(key) for key in keys]


@given(placements(), st.integers(1, 10**6))
def test_the_guest_shares_what_the_host_shares(placement: tuple[Topology, list[int]], steps: int) -> None:
    topology, pcpus = placement
    found = told(topology, pcpus, memory_bytes=steps * 8192 + 64 * MIB)
    host = [topology.pcpu(cpu) for cpu in pcpus]
    assert found.notes == ()
    assert partition([seat[:1] for seat in at(found)]) == partition([pcpu.package for pcpu in host])
    assert partition([seat[:2] for seat in at(found)]) == partition([pcpu.llc for pcpu in host])
    assert partition([seat[:3] for seat in at(found)]) == partition([pcpu.core for pcpu in host])
    assert at(found)[0] == (0, 0, 0, 0)
    assert len(set(at(found))) == len(pcpus)
    nodes = [seat.node for seat in found.seats]
    if len({pcpu.numa for pcpu in topology.pcpus}) > 1:
        assert partition(nodes) == partition([pcpu.numa for pcpu in host])
        assert nodes[0] == 0
        sizes = [re.search(r"size=(\d+)([MK])", text) for text in values(found, "-object")]
        whole = sum(int(size[1]) * {"M": MIB, "K": 1024}[size[2]] for size in sizes if size)
        assert whole == steps * 8192 + 64 * MIB
    else:
        assert set(nodes) == {None}


@given(placements(), st.sampled_from(["x86_64", "aarch64"]), st.booleans())
def test_every_vcpu_has_a_seat_of_its_own_that_qemu_is_told_of(
    placement: tuple[Topology, list[int]], architecture: str, flat: bool
) -> None:
    found = told(*placement, architecture=architecture, flat=flat)
    counts = smp(found)
    levels = [counts[name] for name in ("sockets", "dies" if "dies" in counts else "clusters", "cores", "threads")]
    assert math.prod(levels) == counts["maxcpus"]
    # What QEMU plugs by itself are the first in the order of the ids.
    seats = sorted(at(found))
    every = [
        (socket, die, core, thread)
        for socket in range(levels[0])
        for die in range(levels[1])
        for core in range(levels[2])
        for thread in range(levels[3])
    ]
    plugged = [tuple(int(word.split("=")[1]) for word in text.split(",")[1:]) for text in values(found, "-device")]
    assert sorted([*every[: counts["cpus"]], *plugged]) == seats
    assert len(set(seats)) == len(placement[1])
    assert [seats.index(seat) for seat in at(found)] == [seat.linux_cpu for seat in found.seats]
    if architecture == "x86_64":
        ids = [seat.apic_id for seat in found.seats]
        assert len(set(ids)) == len(ids)
        assert sorted(range(len(ids)), key=lambda vcpu: ids[vcpu] or 0) == [at(found).index(seat) for seat in seats]
    else:
        assert not plugged


# QEMU's word.


async def _asked(arguments: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Start QEMU and return its CPUs, with the APIC id of each, the seats that it has, and its memory."""
    from qemu.qmp import QMPClient

    ours, theirs = socket.socketpair()
    command = [
        *(QEMU, "-machine", "q35", "-accel", "tcg", "-S", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control", *arguments),
    ]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    theirs.close()
    answers: list[Any] = []
    try:
        client = QMPClient("mirror")
        await asyncio.wait_for(client.connect(ours), 30)
        for question in ("query-cpus-fast", "query-hotpluggable-cpus", "query-memdev"):
            answers.append(await client.execute(question))  # noqa: PERF401  one after the other
        for cpu in answers[0]:
            cpu["apic-id"] = await client.execute("qom-get", {"path": cpu["qom-path"], "property": "apic-id"})
        await client.disconnect()
    finally:
        process.kill()
        said = process.communicate()[0].decode()
        sys.stderr.write(said)  # for pytest to show beside what went wrong
    assert "NUMA" not in said  # as of CPUs that have no node
    cpus, seats, memory = answers
    return cpus, seats, memory


THIRDS = [f"{first}-{first + 2}" for first in range(0, 18, 3)]
REAL: dict[str, Callable[[Path], Mirror]] = {
    "even": lambda root: told(read(root), range(8)),
    "a gap in front": lambda root: told(read(root), [1, 0, 4]),
    "caches and a gap": lambda root: told(read(root, caches=("0-1,4-5", "2-3,6-7")), [0, 2, 4, 6, 3]),
    "odd counts": lambda root: told(
        read(root, [str(cpu) for cpu in range(18)], caches=THIRDS, packages=("0-8", "9-17")), [17, *range(12)]
    ),
    "two nodes": lambda root: told(
        read(root, **TWO_NODES), [2, 0, 6], facts=Facts(mems=CpuSet.parse("0")), memory_bytes=257 * MIB + 8192
    ),
    "nodes in a package": lambda root: told(
        read(root, list("012345"), packages=("0-3", "4-5"), nodes=("0-1", "2-3", "4-5")),
        [0, 2, 4],
        facts=Facts(mems=CpuSet.parse("0"), distances=tuple((a, b, 11 + a + b) for a in range(3) for b in range(3))),
    ),
    "bound": lambda root: told(read(root, **TWO_NODES), [0, 2], mems=CpuSet.parse("0")),
    "flat": lambda root: told(read(root, **TWO_NODES), [0, 4, 2], flat=True),
    # One cache whole and a pCPU of each other: 24 dies of five cores would take nine bits.
    "too wide": lambda _: told(
        nested((2, 12, 5, 2), (1, 0, 0)),
        [*range(5), *range(120, 125), *range(5, 120, 5)],
        facts=Facts(mems=CpuSet.parse("0")),
    ),
    # 65 cores and two of other packages: the nodes are told core by core.
    "too wide for sockets": lambda _: told(
        nested((3, 1, 65, 1), (1, 0, 0)), [*range(65), 65, 130], facts=Facts(mems=CpuSet.parse("0"))
    ),
    "a versioned model": lambda root: told(read(root), [1, 0, 4], cpu="qemu64-v1,-svm"),
}


@needs_qemu
@pytest.mark.parametrize("name", REAL)
def test_qemu_seats_each_vcpu_where_it_was_said(tmp_path: Path, name: str) -> None:
    found = REAL[name](tmp_path)
    cpus, every, memory = asyncio.run(_asked(found.arguments))
    assert len(cpus) == len(found.seats)
    for seat in found.seats:
        (cpu,) = [cpu for cpu in cpus if seat.is_of(cpu["props"])]
        assert cpu["apic-id"] == seat.apic_id
        assert cpu["props"].get("node-id") == seat.node
    # Of all seats, those that are taken are just these.
    assert len(every) == smp(found)["maxcpus"]
    taken = [one["props"] for one in every if "qom-path" in one]
    assert len(taken) == len(found.seats)
    assert all(sum(seat.is_of(props) for props in taken) == 1 for seat in found.seats)
    if name == "bound":
        assert [(one["policy"], one["host-nodes"], one["size"]) for one in memory] == [("bind", [0], 128 * MIB)] * 2


# What Linux finds. The guest is a busybox that prints what it reads and powers off.

_INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys
cd /
c=sys/devices/system/cpu n=sys/devices/system/node
for file in $c/online $c/modalias $c/cpu[0-9]*/topology/*_list $c/cpu[0-9]*/topology/*_id \\
        $c/cpu[0-9]*/cache/index*/type $c/cpu[0-9]*/cache/index*/level $c/cpu[0-9]*/cache/index*/shared_cpu_list \\
        $n/online $n/has_memory $n/node*/cpulist $n/node*/distance; do
    if [ -e $file ]; then echo "file $file $($b cat $file)"; fi
done
$b sed -n 's/^\\(processor\\|apicid\\|physical id\\|core id\\)/cpuinfo &/p' proc/cpuinfo
$b od -A n -v -t x1 sys/firmware/acpi/tables/APIC | $b sed 's/^/madt /'
echo whole
$b poweroff -f
"""
_CMDLINE = (
    "console=ttyS0 quiet loglevel=3 panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check cryptomgr.notests"
)
_TRIES = 3


def _archive(files: dict[str, bytes | None]) -> bytes:
    """Pack *files* as the kernel unpacks them (cpio, "newc"); ``None`` makes a folder."""
    packed = bytearray()
    for number, (name, content) in enumerate([*files.items(), ("TRAILER!!!", b"")], 1):
        mode = 0o040755 if content is None else 0o100755
        data, path = content or b"", name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        packed += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        packed += bytes(-len(packed) % 4) + data
        packed += bytes(-len(packed) % 4)
    return bytes(packed)


# On 6.1 interrupts go to masks of CPUs, and what is lost of them is missed.
SERIES = {"a core and an SMT pair": "6.1", "two last-level caches": "6.12", "two NUMA nodes": "6.12"}
BOOTED: dict[str, Callable[[Path], tuple[Topology, list[int], Facts]]] = {
    "a core and an SMT pair": lambda root: (read(root), [1, 0, 4], Facts()),
    "two last-level caches": lambda root: (
        read(root, caches=("0-1,4-5", "2-3,6-7")),
        [0, 2, 4, 6, 3],
        Facts(),
    ),
    "two NUMA nodes": lambda root: (
        read(root, **TWO_NODES),
        [2, 0, 6, 1],
        Facts(mems=CpuSet.parse("0"), distances=((0, 1, 21), (1, 0, 22))),
    ),
}


@pytest.fixture(scope="module")
def consoles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each guest printed; they boot beside each other."""
    missing = debian.lacks() + debian.packages() + ([] if shutil.which(QEMU) else [QEMU])
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    try:
        kernels = {series: debian.kernel(series) for series in set(SERIES.values())}
        busybox = (debian.programs(["busybox-static"]) / "bin/busybox").read_bytes()
    except Unavailable as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("guests")
    (root / "initrd").write_bytes(
        _archive({"bin": None, "dev": None, "proc": None, "sys": None, "init": _INIT.encode(), "bin/busybox": busybox})
    )

    def boot(name: str) -> str:
        topology, pcpus, facts = BOOTED[name](root / name)
        command = [
            *(QEMU, "-machine", "q35", "-accel", "tcg,thread=multi", "-nodefaults", "-no-user-config"),
            *("-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(kernels[SERIES[name]])),
            *("-initrd", str(root / "initrd"), "-append", _CMDLINE, *told(topology, pcpus, facts=facts).arguments),
        ]
        said = ""
        for _ in range(_TRIES):  # QEMU 7.2 with a thread per CPU: now and then the guest falls over its own code
            try:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
            except subprocess.TimeoutExpired as late:
                said = f"(it took more than {late.timeout} s) {(late.stdout or b'')[-2000:]!r}"
                continue
            said = done.stdout.decode(errors="replace").replace("\r", "")
            if "\nwhole\n" in said:
                break
            said += done.stderr.decode()
        return said

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BOOTED, pool.map(boot, BOOTED), strict=True))


@pytest.mark.parametrize("name", BOOTED)
def test_linux_finds_in_the_guest_what_the_pcpus_share(tmp_path: Path, consoles: dict[str, str], name: str) -> None:
    topology, pcpus, facts = BOOTED[name](tmp_path / "host")
    found = told(topology, pcpus, facts=facts)
    console = consoles[name]
    assert "\nwhole\n" in console, console
    guest_root = tmp_path / "guest"
    for path, content in re.findall(r"^file (\S+) (.*)$", console, re.MULTILINE):
        (guest_root / path).parent.mkdir(parents=True, exist_ok=True)
        (guest_root / path).write_text(content + "\n")
    cpuinfo = "\n".join(re.findall(r"^cpuinfo (.*)$", console, re.MULTILINE))
    (guest_root / "proc").mkdir()
    (guest_root / "proc/cpuinfo").write_text(cpuinfo + "\n")
    table = bytes.fromhex("".join(re.findall(r"^madt (.*)$", console, re.MULTILINE)))
    (guest_root / "sys/firmware/acpi/tables").mkdir(parents=True)
    (guest_root / "sys/firmware/acpi/tables/APIC").write_bytes(table)

    guest = read_topology(Host(str(guest_root)), madt=True)
    assert guest.online == CpuSet.of(range(len(pcpus)))
    assert guest.doubts == ()
    there = [guest.pcpu(seat.linux_cpu) for seat in found.seats]
    host = [topology.pcpu(cpu) for cpu in pcpus]
    assert [pcpu.apic_id for pcpu in there] == [seat.apic_id for seat in found.seats]
    for field in ("core", "llc", "package", "numa"):
        assert partition([getattr(pcpu, field) for pcpu in there]) == partition([getattr(pcpu, field) for pcpu in host])
    # The same by the kernel's own files, past our reader: the CPUs beside each in its core and its third-level cache.
    for file, field in (("topology/core_cpus_list", "core"), ("cache/index3/shared_cpu_list", "llc")):
        for seat, pcpu in zip(found.seats, host, strict=True):
            text = (guest_root / f"sys/devices/system/cpu/cpu{seat.linux_cpu}/{file}").read_text()
            with_it = [other for other in pcpus if getattr(topology.pcpu(other), field) == getattr(pcpu, field)]
            sharing = [found.seats[pcpus.index(other)].linux_cpu for other in with_it]
            assert CpuSet.parse(text) == CpuSet.of(sharing)
    if facts.distances:
        assert read_facts(Host(str(guest_root))).distances == ((0, 0, 10), (0, 1, 22), (1, 0, 21), (1, 1, 10))
        assert [pcpu.numa for pcpu in there] == [seat.node for seat in found.seats]

    # The firmware's table lists the empty seats, and not as enabled.
    processors = parse_madt(table)
    assert sorted(one.apic_id for one in processors if one.enabled) == sorted(seat.apic_id or 0 for seat in found.seats)
    assert len(processors) == smp(found)["maxcpus"] > len(pcpus)

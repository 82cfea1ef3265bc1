from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpart.allocator import POLICIES
from hostpart.config import (
    Guest,
    Scenario,
    ServiceVm,
    VmConfig,
    check_name,
    example_names,
    load_scenario,
    parse_scenario,
    parse_sched,
)
from hostpart.cpuset import CpuSet
from hostpart.errors import ConfigError
from hostpart.qemu.config import Disk
from hostpart.toml_table import MAX_BYTES

EXAMPLES = Path(__file__).parents[1] / "hostpart" / "examples"
EVERY_KEY = EXAMPLES / "every-key.toml"
BARE = '[[vm]]\nname = "a"\nvcpus = 1\n'
VM = f'{BARE}command = ["true"]\n'


def faults(text: str | bytes) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_scenario(text, "x.toml")
    assert str(caught.value).startswith("x.toml")
    return caught.value.faults


def only_vm(lines: str) -> VmConfig:
    (vm,) = parse_scenario(f"[[vm]]\n{lines}", "x.toml").vms
    return vm


def test_a_vm_with_only_what_is_needed_has_the_defaults() -> None:
    assert parse_scenario(VM, "x.toml") == Scenario(
        "x.toml", (VmConfig("a", Guest("command", ("true",)), vcpus=1),), ServiceVm(1, CpuSet(), CpuSet())
    )


def test_every_key_arrives() -> None:
    text = """
        [service]
        keep = "0-1"
        reserve = "2"
        [[vm]]
        name = "rt"
        pcpus = [5, 3]
        policy = "llc"
        smt = "whole"
        kind = "performance"
        isolation = "cpuset"
        require = true
        on_drift = "kill"
        user = "nobody"
        group = "nogroup"
        sched = "fifo:50"
        nice = -5
        mlock = true
        smp = "prog 'an argument'"
        cwd = "/tmp"
        env = { B = "2", A = "" }
    """
    guest = Guest("smp", ("prog", "an argument"), "", "/tmp", (("B", "2"), ("A", "")))
    vm = VmConfig(
        name="rt",
        guest=guest,
        vcpus=2,
        pcpus=(5, 3),
        policy="llc",
        smt="whole",
        kind="performance",
        isolation="cpuset",
        require=True,
        on_drift="kill",
        user="nobody",
        group="nogroup",
        sched="fifo",
        priority=50,
        nice=-5,
        mlock=True,
    )
    service = ServiceVm(2, CpuSet.of([0, 1]), CpuSet.of([2]))
    assert parse_scenario(text, "x.toml") == Scenario("x.toml", (vm,), service)


@pytest.mark.parametrize(
    ("lines", "vcpus", "pcpus"),
    [
        pytest.param('vcpus = "rest"', 0, (), id="rest"),
        pytest.param("vcpus = 8192", 8192, (), id="the most"),
        pytest.param('pcpus = "5,3"', 2, (3, 5), id="a CPU list ascends"),
        pytest.param("pcpus = [5, 3]", 2, (5, 3), id="an array keeps its order"),
        pytest.param("vcpus = 2\npcpus = [5, 3]", 2, (5, 3), id="both, and they agree"),
    ],
)
def test_a_vm_says_how_many_pcpus_or_which(lines: str, vcpus: int, pcpus: tuple[int, ...]) -> None:
    vm = only_vm(f'name = "a"\npython = "a.b:c"\n{lines}')
    assert (vm.vcpus, vm.pcpus, vm.guest) == (vcpus, pcpus, Guest("python", target="a.b:c"))


def test_all_faults_are_reported_at_once_and_each_leads_with_its_key() -> None:
    text = """
        colour = 1
        [service]
        keep = 0
        reserv = "1"
        [[vm]]
        name = "Bad"
        vcpus = 1
        command = ["true"]
        [[vm]]
        name = "b"
        vcpus = 0
        command = ["true"]
        env = { HOSTPART_VM = "x", Y = 3, HOSTPART_PROBE_SECONDS = "1" }
        nice = 20
    """
    assert [fault.partition(": ")[0] for fault in faults(text)] == [
        "service.keep",
        "service.reserv",
        "vm[0].name",
        "vm[1].vcpus",
        "vm[1].env.HOSTPART_VM",
        "vm[1].env.Y",
        "vm[1].nice",
        "colour",
    ]


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("vcpus = 0", "vm[0].vcpus: want a whole number from 1, got 0"),
        ("vcpus = -1", "vm[0].vcpus: want a whole number from 1, got -1"),
        ("vcpus = true", 'vm[0].vcpus: want a whole number from 1, or "rest", got true'),
        ("vcpus = 2.0", 'vm[0].vcpus: want a whole number from 1, or "rest", got 2.0'),
        ('vcpus = "all"', 'vm[0].vcpus: want a whole number from 1, or "rest", got "all"'),
        ("vcpus = 8193", "vm[0].vcpus: want a whole number from 1 to 8192, got 8193"),
        (f"vcpus = 0x{'f' * 9000}", "vm[0].vcpus: want a whole number from 1 to 8192, got a number of 36000 bits"),
        ("", 'vm[0].vcpus: is missing: want vcpus = N, vcpus = "rest" or pcpus = [N, ...]'),
        ("vcpus = 3\npcpus = [1, 2]", "vm[0].vcpus: does not agree with pcpus, which lists 2; leave vcpus out"),
        ("pcpus = [1, 2, 1]", "vm[0].pcpus: lists pCPU 1 more than once; each vCPU needs one of its own"),
        ("pcpus = [1, true]", "vm[0].pcpus: want CPU numbers from 0 to 8191, got true in place 1"),
        ("pcpus = [8192]", "vm[0].pcpus: want CPU numbers from 0 to 8191, got 8192 in place 0"),
        ("pcpus = []", "vm[0].pcpus: want at least one CPU, got none"),
        ('pcpus = "1,,2"', "vm[0].pcpus: '' in '1,,2' is not a CPU or a range of CPUs"),
        ("pcpus = 3", 'vm[0].pcpus: want a list of CPU numbers, or a CPU list such as "3,5", got 3'),
    ],
    ids=str,
)
def test_a_faulty_count_is_refused(lines: str, fault: str) -> None:
    assert faults(f'[[vm]]\nname = "a"\ncommand = ["true"]\n{lines}') == (fault,)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ('polcy = "llc"', "vm[0].polcy: is not a key here; did you mean policy?"),
        ('policy = "lcc"', f'vm[0].policy: want one of {", ".join(POLICIES)}, got "lcc"'),
        ('smt = ["shared"]', "vm[0].smt: want one of exclusive, whole, shared, got a list of 1"),
        ('isolation = "all"', 'vm[0].isolation: want one of affinity, sweep, cpuset, full, got "all"'),
        ('on_drift = ""', 'vm[0].on_drift: want one of warn, repin, kill, got ""'),
        ('kind = "big"', 'vm[0].kind: want one of performance, efficiency, got "big"'),
        ("require = 1", "vm[0].require: want true or false, got 1"),
        ("mlock = 1979-05-27", "vm[0].mlock: want true or false, got a date or time"),
        ("foreign_limit = 101", "vm[0].foreign_limit: want a number from 0 to 100, got 101"),
        ("foreign_limit = true", "vm[0].foreign_limit: want a number from 0 to 100, got true"),
        ("foreign_limit = nan", "vm[0].foreign_limit: want a number from 0 to 100, got nan"),
        ("nice = -21", "vm[0].nice: want a whole number from -20 to 19, got -21"),
        ("nice = false", "vm[0].nice: want a whole number from -20 to 19, got false"),
        ('user = ""', 'vm[0].user: want text, got ""'),
        ('group = "a\\u0000b"', 'vm[0].group: want text without NUL, got "a\\x00b"'),
        ('cwd = "\\u001b[2J"\nkind = 1', "vm[0].kind: want one of performance, efficiency, got 1"),
        ('sched = "fifo"', 'vm[0].sched: fifo needs a priority from 1 to 99, such as fifo:50, got "fifo"'),
        ("env = 3", "vm[0].env: want a table, got 3"),
        (
            'env = { "A=B" = "" }',
            "vm[0].env.\"A=B\": is no name for an environment variable: it is empty, or holds '='",
        ),
        ('env = { "" = "" }', 'vm[0].env."": is no name for an environment variable'),
        ('smp = "true"', "vm[0]: want one guest, got command and smp"),
    ],
    ids=str,
)
def test_a_faulty_setting_is_refused(lines: str, fault: str) -> None:
    (found,) = faults(VM + lines)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("", "vm[0]: want a guest: one of command, smp, python, qemu"),
        ("command = []", "vm[0].command: want a program to run, got an empty list"),
        ('smp = ""', 'vm[0].smp: want a program to run, got ""'),
        ('command = [""]', "vm[0].command: want a program to run, got a list of 1"),
        ('command = ["a", 1]', "vm[0].command: want words of text, got 1 in place 1"),
        ('command = ["a", "\\u0000"]', "vm[0].command: want words without NUL"),
        ("command = 3", 'vm[0].command: want ["program", "argument"] or one line of text, got 3'),
        ('command = "a \'b"', 'vm[0].command: cannot be split into words: no closing quotation in "a \'b"'),
        ('python = "a.b"', 'vm[0].python: want "package.module:function", got "a.b"'),
        ('python = "a..b:c"', 'vm[0].python: want "package.module:function", got "a..b:c"'),
        ('python = "a:b:c"', 'vm[0].python: want "package.module:function", got "a:b:c"'),
    ],
    ids=str,
)
def test_a_faulty_guest_is_refused(lines: str, fault: str) -> None:
    assert faults(f'[[vm]]\nname = "a"\nvcpus = 1\n{lines}') == (fault,)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ('keep = "0"\nreserve = ""', None),
        ("keep = true", 'service.keep: want a whole number from 1, or a CPU list such as "0-1", got true'),
        ('keep = ""', "service.keep: want at least one CPU: the service VM never runs without"),
        ("reserve = 2", 'service.reserve: want a CPU list such as "0-2,8", got 2'),
        ('reserve = "2-1"', "service.reserve: '2-1' in '2-1' runs backwards"),
        (f'reserve = "{"9" * 500}"', f'service.reserve: is not a CPU list: "{"9" * 57}..."'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_service_vm_keeps_at_least_one_pcpu_and_its_lists_are_strict(lines: str, fault: str | None) -> None:
    text = f"[service]\n{lines}\n{VM}"
    if fault is None:
        assert parse_scenario(text, "x.toml").service == ServiceVm(1, CpuSet.of([0]), CpuSet())
    else:
        assert faults(text) == (fault,)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param(VM + VM, "vm[1].name: 'a' is vm[0]'s name already", id="name"),
        pytest.param(
            VM.replace("vcpus = 1", "pcpus = [3]") + VM.replace('"a"', '"b"').replace("vcpus = 1", "pcpus = [3]"),
            "vm[1].pcpus: pCPU 3 is vm[0]'s already",
            id="pCPU of two VMs",
        ),
        pytest.param(
            '[service]\nkeep = "3"\n' + VM.replace("vcpus = 1", "pcpus = [3]"),
            "vm[0].pcpus: pCPU 3 is kept by the service VM already",
            id="kept pCPU",
        ),
        pytest.param(
            '[service]\nreserve = "3"\n' + VM.replace("vcpus = 1", "pcpus = [3]"),
            "vm[0].pcpus: pCPU 3 is reserved in [service] already",
            id="reserved pCPU",
        ),
        pytest.param(
            VM.replace("1", '"rest"') + VM.replace('"a"', '"b"').replace("1", '"rest"'),
            'vm[1].vcpus: vm[0] has "rest" already, which leaves nothing',
            id="rest twice",
        ),
    ],
)
def test_what_only_one_can_have_is_claimed_once(text: str, fault: str) -> None:
    assert faults(text) == (fault,)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "vm: want at least one user VM, each under [[vm]]"),
        ("vm = []", "vm: want at least one user VM, each under [[vm]]"),
        ("[vm]\nname = 'a'", "vm: want each user VM under [[vm]], got [vm]"),
        ("vm = 3", "vm: want each user VM under [[vm]], got 3"),
        ("vm = [3]", "vm[0]: want a table, got 3"),
        ("service = 3\n" + VM, "service: want a table, got 3"),
    ],
    ids=str,
)
def test_another_shape_is_refused(text: str, fault: str) -> None:
    assert faults(text) == (fault,)


def test_text_that_is_not_toml_is_refused_with_line_and_column() -> None:
    (fault,) = faults("[service]\nkeep 1\n")
    assert fault.startswith("is not TOML: ")
    assert "line 2, column 6" in fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param(b"# caf\xe9\n", "is not text: byte 5, in line 1, is not UTF-8", id="not UTF-8"),
        pytest.param("# \udc80", "is not text: character 2 is a lone surrogate", id="surrogate"),
        pytest.param(b"#" * (MAX_BYTES + 1), "is too large: more than 1024 KiB", id="too large"),
        pytest.param("a = " + "[" * 5000, "is nothing to read: its lists or tables are nested too deeply", id="deep"),
        pytest.param("a = " + "1" * 5000, "is not TOML: ", id="too many digits"),
    ],
)
def test_what_is_no_text_is_refused(text: str | bytes, fault: str) -> None:
    (found,) = faults(text)
    assert found.startswith(fault)


def test_as_much_as_is_allowed_is_read() -> None:
    assert parse_scenario(VM.encode() + b"#" * (MAX_BYTES - len(VM)), "x.toml").vms[0].name == "a"


def test_a_file_with_very_many_faults_shows_the_first_hundred() -> None:
    found = faults("".join(f"k{number} = 1\n" for number in range(5000)) + VM)
    assert len(found) == 101
    assert found[-1] == "and more than these 100"


def test_no_fault_shows_a_control_character() -> None:
    text = '"\\u001b[2J" = 1\n' + VM + 'policy = "\\u001b[31m\\n"\n'
    assert all(fault.isprintable() for fault in faults(text))
    assert len(faults(text)) == 2


@given(st.binary(max_size=300) | st.text(max_size=300))
def test_random_content_is_a_scenario_or_a_config_error(content: bytes | str) -> None:
    # A scenario needs more than chance can find in 300 bytes, and nothing else may be raised.
    assert faults(content)


# TOML for random structures of the right and the wrong keys, without a writer of our own to trust:
# inline tables and arrays, strings in the form that JSON and TOML share.
SCALARS = st.one_of(
    st.integers(),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["rest", "0-1", "3,5", "fifo:50", "a.b:c", "llc", "shared", "full", "vm0", "uos1", "'", "", "\0"]),
    st.text(st.characters(codec="utf-8"), max_size=12),
)
KEYS = st.sampled_from([*re.findall(r"^#?([a-z_]+) = ", EVERY_KEY.read_text(), re.MULTILINE), "service", "vm", "X"])
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6), max_leaves=25
)


def as_toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(character):08x}" for character in value) + '"'
    return str(value).lower()


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "service": TREES | st.dictionaries(KEYS, TREES, max_size=4),
            "vm": TREES | st.lists(st.dictionaries(KEYS, TREES, max_size=8), max_size=3),
            "X": TREES,
        },
    )
)
def test_random_structures_are_a_scenario_or_faults_led_by_their_keys(tree: dict[str, object]) -> None:
    text = "".join(f"{key} = {as_toml(value)}\n" for key, value in tree.items())
    assert tomllib.loads(text).keys() == tree.keys()
    try:
        scenario = parse_scenario(text, "x.toml")
    except ConfigError as error:
        for fault in error.faults:
            assert re.match(r"(service|vm|X)[][0-9A-Za-z_.]*: ", fault), fault
    else:
        assert {type(vm) for vm in scenario.vms} == {VmConfig}


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("other", ("other", 0)),
        ("batch", ("batch", 0)),
        ("idle", ("idle", 0)),
        ("fifo:1", ("fifo", 1)),
        ("rr:99", ("rr", 99)),
    ],
)
def test_a_scheduling_policy_is_read(text: str, meaning: tuple[str, int]) -> None:
    assert parse_sched(text) == meaning


@pytest.mark.parametrize(
    "text", ["", "FIFO:50", "fifo", "fifo:", "fifo:0", "fifo:100", "rr:-1", "other:1", "other:0", "fifo:٣", "deadline"]
)
def test_a_scheduling_policy_that_is_none_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"(want|needs|takes) .*got"):
        parse_sched(text)


@pytest.mark.parametrize("name", ["a", "0", "uos1", "a.b_c-d", "a" * 63, "vm00", "vm1"])
def test_a_vm_may_be_called(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "A", ".a", "-a", "a b", "a/b", "a\n", "ä", "٣", "a" * 64, "vm0"])
def test_a_vm_may_not_be_called(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        check_name(name)


def test_a_file_is_loaded_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(VM)
    assert load_scenario(str(file)) == parse_scenario(VM, str(file))


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    for name, problem in [
        (str(tmp_path / "none.toml"), "there is no such file"),
        (str(tmp_path), "cannot be read: Is a directory"),
        ("/dev/zero", "too large"),
        ("a\0b", "is no file's name"),
        (
            "example:../first",
            "there is no such example; there are commands, every-key, first, four-core, linux-guest",
        ),
        ("example:", "there is no such example"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(problem)):
            load_scenario(name)


def test_an_example_asked_for_without_its_prefix_is_pointed_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="the example of that name is 'example:first'"):
        load_scenario("first")


@pytest.mark.parametrize("name", example_names())
def test_every_example_is_a_scenario_and_starts_with_what_it_teaches(name: str) -> None:
    assert load_scenario(f"example:{name}").vms
    assert (EXAMPLES / f"{name}.toml").read_text().startswith("# ")


def test_the_first_example_takes_the_rest_of_any_host() -> None:
    (vm,) = load_scenario("example:first").vms
    assert (vm.name, vm.vcpus, vm.pcpus, vm.isolation) == ("uos1", 0, (), "affinity")


def test_the_four_core_example_is_one_kept_pcpu_and_three_vms_of_one_vcpu() -> None:
    scenario = load_scenario("example:four-core")
    assert scenario.service == ServiceVm()
    assert [(vm.name, vm.vcpus) for vm in scenario.vms] == [("uos1", 1), ("uos2", 1), ("uos3", 1)]


def test_the_example_of_every_key_has_every_key_and_the_defaults() -> None:
    text = EVERY_KEY.read_text()
    (vm,) = load_scenario("example:every-key").vms
    assert vm == VmConfig("rt", Guest("command", ("true",)), vcpus=1)
    # What an unknown key is told are all the keys there are; those that are comments count as there.
    unknown = faults("xyzzy = 1\n[[vm]]\nxyzzy = 1\n[vm.qemu]\nxyzzy = 1")
    known = {
        key
        for fault in unknown
        if fault.startswith("vm[0]") and "xyzzy" in fault
        for key in fault.partition("; there are ")[2].split(", ")
    }
    shown = set(re.findall(r"^#?([a-z_]+) = ", text, re.MULTILINE)) | set(
        re.findall(r"^#\[+vm\.(\w+)\]", text, re.MULTILINE)
    )
    assert shown == {*known, "keep", "release", "reserve"}


def test_the_values_that_every_key_shows_as_comments_are_valid() -> None:
    text, _, machine = EVERY_KEY.read_text().partition("#[vm.qemu]")
    for key, value in re.findall(r"^#([a-z_]+) = ([^#\n]*)", machine.partition("#[[")[0], re.MULTILINE):
        boot = "" if key in ("run", "kernel", "disks") else 'run = "true"\n' if key == "output" else 'kernel = "k"\n'
        parse_scenario(f"{BARE}[vm.qemu]\n{boot}{key} = {value}\n", key)
    for key, value in re.findall(r"^#([a-z_]+) = ([^#\n]*)", text, re.MULTILINE):
        section = f"[service]\n{key} = {value}\n{VM}" if key == "keep" else f"{VM}{key} = {value}\n"
        if key in ("smp", "python"):
            section = section.replace('command = ["true"]\n', "")
        if key == "pcpus":
            section = section.replace("vcpus = 1\n", "")
        parse_scenario(section, key)


MACHINE_FAULTS = [
    ("", "vm[0].qemu: want something to boot: kernel = FILE, disks = [FILE], or run = COMMAND for the built-in guest"),
    ('run = "x"\ninitrd = "i"', "vm[0].qemu.run: is for the built-in guest, which has an initrd of its own"),
    ('disks = ["d.raw"]\nappend = "x"', "vm[0].qemu.append: is for a kernel, and none is given"),
    ('disks = ["d.raw"]\ninitrd = "x"', "vm[0].qemu.initrd: is for a kernel, and none is given"),
    ('kernel = "k"\noutput = "o"', "vm[0].qemu.output: is of the built-in guest's command, and there is none"),
    ('kernel = "k"\nmemory = "1.5G"', 'vm[0].qemu.memory: want a size such as "512M" or "2G", got "1.5G"'),
    ('kernel = "k"\nmemory = 512', 'vm[0].qemu.memory: want a size such as "512M" or "2G", got 512'),
    ('kernel = "k"\nmemory = "9M"', 'vm[0].qemu.memory: want whole megabytes, 16M or more, got "9M"'),
    ('kernel = "k"\nmemory = "70000K"', "vm[0].qemu.memory: want whole megabytes"),
    ('kernel = "k"\nmemory = "999999999T"', "vm[0].qemu.memory: want whole megabytes"),
    ('kernel = "k"\nconsole = "tty:"', "vm[0].qemu.console: want one of stdio, none, file:PATH, unix:PATH"),
    ('kernel = "k"\nconsole = "file:"', "vm[0].qemu.console: want one of stdio, none, file:PATH, unix:PATH"),
    ('kernel = "k"\naccelerator = "xen"', "vm[0].qemu.accelerator: want one of auto, kvm, tcg"),
    ('kernel = "k"\ntopology = "flt"', "vm[0].qemu.topology: want one of mirror, flat"),
    ('kernel = "k"\non_reboot = "stay"', "vm[0].qemu.on_reboot: want one of restart, end"),
    ('kernel = "k"\npowerdown = -1', "vm[0].qemu.powerdown: want a number from 0"),
    ('disks = ["d"]', 'vm[0].qemu.disks: "d" does not say its format'),
    ('disks = [{ path = "d", size = 3 }]', "vm[0].qemu.disks: want a file, or a table of path, format and readonly"),
    ('disks = "d.raw"', "vm[0].qemu.disks: want a list of files"),
    ('kernel = "k"\nkernle = "k"', "vm[0].qemu.kernle: is not a key here; did you mean kernel?"),
]


@pytest.mark.parametrize(("keys", "fault"), MACHINE_FAULTS)
def test_a_faulty_machine_is_refused(keys: str, fault: str) -> None:
    assert any(found.startswith(fault) for found in faults(f"{BARE}[vm.qemu]\n{keys}\n")), faults(
        f"{BARE}[vm.qemu]\n{keys}\n"
    )


def test_a_machine_is_read() -> None:
    keys = 'kernel = "k"\nmemory = "2G"\ndisks = ["a.QCOW2", { path = "b", format = "raw", readonly = true }]'
    (vm,) = parse_scenario(f"{BARE}[vm.qemu]\n{keys}\n", "x").vms
    machine = vm.guest.qemu
    assert machine is not None
    assert (vm.threaded, machine.memory_bytes, machine.on_reboot, machine.append) == (True, 2 << 30, "restart", "")
    assert machine.disks == (Disk("a.QCOW2", "qcow2"), Disk("b", "raw", readonly=True))


def test_the_built_in_guest_has_what_it_needs() -> None:
    (vm,) = parse_scenario(f'{BARE}[vm.qemu]\nrun = ["echo", "a b"]\n', "x").vms
    machine = vm.guest.qemu
    assert machine is not None
    assert (machine.kernel, machine.on_reboot, machine.run) == ("host", "end", "echo 'a b'")
    assert "console=ttyS0" in machine.append


MIXED = """[[vm]]
name = "a"
vcpus = 4
[[vm.guest]]
vcpus = 2
[vm.guest.qemu]
kernel = "k"
[[vm.guest]]
vcpus = 1
command = ["true"]
[[vm.guest]]
vcpus = 1
python = "m:f"
"""


def test_a_vm_may_have_several_guests() -> None:
    (vm,) = parse_scenario(MIXED, "x").vms
    assert vm.threaded
    assert [(part.guest.kind, *part.vcpus) for part in vm.parts(4)] == [("qemu", 0, 1), ("command", 2), ("python", 3)]
    (plain,) = parse_scenario(VM, "x").vms
    assert [(part.guest.kind, *part.vcpus) for part in plain.parts(3)] == [("command", 0, 1, 2)]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("vcpus = 4", "vcpus = 5", "vm[0].guest: has 4 vCPUs in all, and the VM has 5; want as many"),
        ("vcpus = 4", 'vcpus = "rest"', "vm[0].guest: has 4 vCPUs in all, and the VM has the rest; want as many"),
        ("vcpus = 4", 'vcpus = 4\nsmp = "x"', "vm[0].smp: belongs under one of [[vm.guest]] where there are such"),
        ("vcpus = 2\n", "", "vm[0].guest[0].vcpus: is missing: want how many of the VM's vCPUs this guest has"),
        ('command = ["true"]', "nice = 1", "vm[0].guest[1]: want a guest: one of command, smp, python, qemu"),
    ],
)
def test_a_faulty_mix_is_refused(old: str, new: str, fault: str) -> None:
    assert fault in faults(MIXED.replace(old, new, 1))


def test_importing_it_loads_nothing_that_is_slow() -> None:
    slow = {"dataclasses", "typing", "pathlib", "json", "tomllib", "contextlib", "logging", "difflib", "shlex"}
    code = "import sys; import hostpart.config; print(*sys.modules)"
    # Without site: an editable install's hook imports some of these by itself.
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(EXAMPLES.parents[1])!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert slow.isdisjoint(loaded)


def test_hello_says_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from workers.probes import hello

    monkeypatch.setattr(hello, "_WORK_S", 0.0)
    for name, value in {"VM": "uos1", "VCPU": "0", "VCPUS": "2", "PCPU": "7"}.items():
        monkeypatch.setenv(f"HOSTPART_{name}", value)
    assert hello.main() == 0
    found = re.fullmatch(
        r"uos1 vCPU 0 of 2 on pCPU 7: Cpus_allowed_list (\S+), running on CPU ([0-9]+)\n", capfd.readouterr().out
    )
    assert found
    assert CpuSet.parse(found[1]) == CpuSet.of(os.sched_getaffinity(0))
    assert int(found[2]) in CpuSet.parse(found[1])

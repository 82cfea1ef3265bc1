"""A VM's evidence for people: a table of a line per vCPU, one of a line per pCPU, the verdict and its reasons."""

from __future__ import annotations

from .table import table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["summary"]

_PCPU_HEADERS = ("pCPU", "others s", "irq ms", "softirq ms", "steal ms", "top interrupt", "top task")


def summary(doc: Mapping[str, Any], *, colour: bool = False) -> str:
    """Return a document of :func:`document` for people: two tables, and the verdict with its reasons below."""
    thread = any(vcpu["tid"] for vcpu in doc["vcpus"])
    who = "thread" if thread else "pid"
    headers = ("vCPU", "pCPU", who, "seen on", "looks", "moved", "waited", "preempted", "run s", "queued ms", "exit")
    rows = []
    for vcpu in doc["vcpus"]:
        run_ns, wait_ns = vcpu["run_ns"]["value"], vcpu["wait_ns"]["value"]
        rows.append(
            (
                vcpu["vcpu"],
                vcpu["pcpus"],
                vcpu["tid"] or vcpu["pid"],
                vcpu["cpus_seen"],
                vcpu["looks"],
                vcpu["migrations"]["value"],
                vcpu["voluntary_switches"]["value"],
                vcpu["involuntary_switches"]["value"],
                None if run_ns is None else round(run_ns / 1e9, 3),
                None if wait_ns is None else round(wait_ns / 1e6, 1),
                _exit_word(vcpu["exit"]),
            )
        )
    lines = [table(headers, rows, colour=colour)] if rows else []
    if doc["pcpus"]:
        lines.append(table(_PCPU_HEADERS, [_pcpu_row(pcpu) for pcpu in doc["pcpus"]], colour=colour))
    lines.append(f"{doc['vm']}: {doc['verdict'] or 'no verdict'}")
    lines += [f"  {text}" for text in (*doc["reasons"], *doc["notes"])]
    lines += [f"  {_machine_text(machine)}" for machine in doc.get("machines", ())]
    return "\n".join(lines)


def _machine_text(machine: Mapping[str, Any]) -> str:
    end = f"; {machine['end']}" if machine["end"] else ""
    resets = f", reset {machine['resets']} times" if machine["resets"] else ""
    why = f" ({machine['accelerator_why'].partition(': ')[0]})" if machine["accelerator_why"] else ""
    text = f"QEMU (pid {machine['pid']}) by {machine['accelerator']}{why}, its own threads on pCPU"
    return f"{text} {machine['emulator_pcpus']}{resets}{end}"


def _pcpu_row(pcpu: Mapping[str, Any]) -> tuple[object, ...]:
    other = pcpu["other_ns"]
    shared = other["over"] != str(pcpu["pcpu"])
    seconds = None if other["value"] is None else round(other["value"] / 1e9, 2)
    return (
        pcpu["pcpu"],
        f"{seconds} on {other['over']}" if shared and seconds is not None else seconds,
        *(None if pcpu[kind] is None else pcpu[kind] // 1_000_000 for kind in ("irq_ns", "softirq_ns", "steal_ns")),
        next((f"{line['count']} {line['name']}" for line in pcpu["interrupts"] or ()), None),
        next((f"{task['comm']} ({task['pid']})" for task in pcpu["foreign_tasks"]), None),
    )


def _exit_word(exit: Mapping[str, int] | None) -> str | None:  # noqa: A002
    if exit is None:
        return None
    return str(exit["code"]) if "code" in exit else f"signal {exit['signal']}"

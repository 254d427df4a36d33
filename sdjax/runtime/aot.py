"""Compiles programs for TPUs on a machine without one, and reports their memory and lower bounds of their time.

    devices = topology("v5e:2x2")                       # needs libtpu
    report = cost(jitted.lower(*shapes).compile(), chip(devices))

The figures are the compiler's.  It counts the body of a loop once, and not the operations of a Pallas kernel, so
operations and times are lower bounds; bytes of memory are exact.
"""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from sdjax.runtime import guard
from sdjax.settings import SettingError

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}  # else 4
# Bytes that one of k chips sends in a ring, per byte of the result (of the operand for reduce-scatter).
SENT = {
    "all-reduce": lambda k: 2 * (k - 1) / k,
    "all-gather": lambda k: (k - 1) / k,
    "reduce-scatter": lambda k: (k - 1) / k,
    "all-to-all": lambda k: (k - 1) / k,
    "collective-permute": lambda k: 1.0,
}
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(SENT)})(?:-start)?\((.*)")


@dataclass(frozen=True)
class Chip:
    """The specifications of one chip.

    flops: bfloat16 operations per second.  memory: bytes.  moved: bytes per second between chip and memory.  sent:
    bytes per second to other chips.
    Source: cloud.google.com/tpu/docs, the pages of v5e, v5p and v6e.
    """

    flops: float
    memory: float
    moved: float
    sent: float


CHIPS = {
    "TPU v5 lite": Chip(197e12, 16e9, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95e9, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32e9, 1640e9, 448e9),
}


def topology(name: str, slices: int = 1) -> list[Any]:
    """Returns the devices of one or several slices with a topology such as "v5e:2x2", for compiling only.

    Raises SettingError without libtpu, and for a name that libtpu does not know.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine has no metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs, so other processes may also compile
    from jax.experimental import topologies

    try:
        several = {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices)
    except Exception as error:  # libtpu raises its own kinds
        expected = "one that libtpu knows, as v5e:2x2, and libtpu"
        raise SettingError("topology", name, expected, guard.first_line(error)) from error


def chip(devices: list[Any]) -> Chip:
    """Returns the specifications of the devices.  Raises SettingError for a kind that is not in CHIPS."""
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise SettingError("topology", kind, f"one of {', '.join(CHIPS)}")
    return CHIPS[kind]


def cost(compiled: Any, of: Chip) -> dict[str, float]:
    """Returns the cost of a compiled program for one chip.

    arguments, outputs, aliased, temporaries, total: bytes of memory; aliased: outputs that reuse arguments' memory.
    fits: 1 or 0.  flops: operations.  moved: bytes to and from its memory.  sent: bytes to other chips.
    seconds: the roofline's time, the longest of seconds_flops, seconds_moved and seconds_sent.
    """
    memory, said = compiled.memory_analysis(), compiled.cost_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    total = arguments + outputs - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    sent = between(compiled.as_text())
    times = {
        "seconds_flops": said["flops"] / of.flops,
        "seconds_moved": said["bytes accessed"] / of.moved,
        "seconds_sent": sent / of.sent,
    }
    return {
        "arguments": arguments,
        "outputs": outputs,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "total": total,
        "fits": int(total <= of.memory),
        "flops": said["flops"],
        "moved": said["bytes accessed"],
        "sent": sent,
        **times,
        "seconds": max(times.values()),
    }


def between(text: str) -> float:
    """Returns the bytes that one chip sends to others in a program, given as its compiled text; loops count once.

    Every collective counts as a ring, see SENT.
    """
    total, found = 0.0, re.search(r"num_partitions=(\d+)", text)
    everyone = int(found[1]) if found else 1
    for line in text.splitlines():
        if found := COLLECTIVE.search(line):
            result, kind, rest = found.groups()
            shapes = _sizes(rest.split(")")[0]) if kind == "reduce-scatter" else _sizes(result)
            if f" {kind}-start(" in line and kind not in ("all-reduce", "reduce-scatter"):
                shapes = _sizes(result.replace("u32[]", ""))  # (operands, results, semaphores)
                shapes = shapes[len(shapes) // 2 :]
            total += sum(shapes) * SENT[kind](_members(line) or everyone)
    return total


def _sizes(text):
    """Returns the bytes of the arrays in a text such as "(f32[8,128]{1,0}, u32[])"."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    return [BYTES.get(kind, 4) * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in found]


def _members(line):
    """Returns the number of chips in a collective; 0 if it names none, which means all."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):  # XLA's MeshAxesReplicaGroupList
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # a whole axis, or 'axis':(before)size of one
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(found[1].split(",")) if found else 0

"""What a compiled step sends and how long it computes, from XLA's scheduled HLO text.

Collectives are named by the mesh axes they run along. The TPU compiler also estimates the cycles of each fusion. Loops
are multiplied out.
"""

import math
import re
from typing import NamedTuple

import numpy as np


class Collective(NamedTuple):
    """One instruction, run `times` in a step."""

    kind: str  # all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute
    axes: tuple[str, ...]  # mesh axes along which it goes; ("?",) where no axes make up its groups
    bytes: int  # of its result on one device; of a reduce-scatter of what it takes in
    size: int  # devices of a group
    times: int
    # Other work may run at the same time: it has a start and an end, or is spread over fusions.
    overlapped: bool
    inside: bool = False  # of one slice, although its axes may lie across slices


class Program(NamedTuple):
    collectives: list[Collective]
    cycles: float  # of everything that the TPU compiler estimates, kernels in Pallas apart; 0 from other compilers
    # Of a GPU: bytes that everything except products and attention reads and writes; else 0.
    traffic: float = 0.0


BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
         "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
INSTRUCTION = re.compile(r" = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")  # result, operation
WITH_OPERANDS = re.compile(  # name, result, operation, operands, the rest
    r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*?)\)(.*)"
)
# TPU slices: each has a program of its own, and sends to the others.
MEGASCALE = "_xla_megascale_transfer_type"


def count(text: str, mesh, slices: int = 1, across: str = "data") -> Program:
    """The program's collectives and cycles. text: scheduled HLO, as `compiled.as_text()`. mesh: names the collectives.

    across: the axis that lies over the slices, if there are several.
    """
    bodies, entry = computations(text)
    shape = dict(mesh.shape)
    each_has_its_own = MEGASCALE in text
    if each_has_its_own:
        shape[across] //= slices
    walk = Walk(bodies, axes_of_groups(shape))
    cycles = walk.run(entry, 1)
    collectives = []
    for one in walk.collectives:
        if one.axes == (MEGASCALE,):
            collectives.append(one._replace(axes=(across,), size=slices))
        else:
            collectives.append(one._replace(inside=each_has_its_own))
    return Program(collectives, cycles)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({computation: its instructions}, the name of the entry)."""
    bodies = {}
    current = None
    entry = ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{\s*$", line)
        if head:
            current = bodies.setdefault(head[2], [])
            if head[1]:
                entry = head[2]
        elif line.rstrip() == "}":
            current = None
        elif current is not None and " = " in line:
            current.append(re.sub(r"/\*index=\d+\*/", "", line))
    return bodies, entry


def called(line: str, key: str) -> str:
    """The computation that an instruction names as its `key`: body, condition, calls or to_apply."""
    return re.search(rf"\b{key}=%?([\w.\-]+)", line)[1]


def branches(line: str) -> list[str]:
    """The computations of a conditional."""
    names = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
    for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
        names += re.findall(r"%?([\w.\-]+)", group)
    return names


class Walk:
    """A run through a program's computations, loops multiplied out, which collects their collectives."""

    def __init__(self, bodies: dict[str, list[str]], axes: dict):
        self.bodies = bodies
        self.axes = axes  # axes_of_groups
        self.collectives = []

    def run(self, name: str, times: int, channels: dict[str, int] | None = None) -> float:
        """Cycles of one run of a computation; notes the collectives of all of its `times`.

        channels: of a fusion's body, {channel: its place in `collectives`} of the fusions beside it. A collective may
        be spread over several, each with the whole instruction.
        """
        total = 0.0
        in_fusion = channels is not None
        fusions = channels if in_fusion else {}
        for line in self.bodies.get(name, []):
            found = INSTRUCTION.search(line)
            if not found:
                continue
            result, op = found.groups()
            if op == "while":
                trips = trip_count(line, self.bodies)
                total += trips * self.run(called(line, "body"), times * trips, channels)
                continue  # the compiler's estimate for the whole loop is of one trip
            if op == "conditional":
                cycles = [self.run(branch, times, channels) for branch in branches(line)]
                total += max(cycles, default=0)
            elif op in ("call", "async-start"):
                key = "to_apply" if "to_apply=" in line else "calls"
                total += self.run(called(line, key), times, channels)
            elif op == "fusion":  # of collectives with what feeds them, or a slice of their result
                self.run(called(line, "calls"), times, fusions)
            elif op.removesuffix("-start") in KINDS:
                found = collective(line, result, op, times, self.axes, name)
                self.note(found, line, channels)
            elif op == "send" and MEGASCALE in line:
                self.collectives.append(sent_to_slices(line, result, times))
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            if cycles and not in_fusion:
                total += int(cycles[1])
        return total

    def note(self, found: Collective, line: str, channels: dict[str, int] | None) -> None:
        """Adds a collective, which is the same as one before if it is on the same channel of fusions side by side."""
        channel = re.search(r"channel_id=(\d+)", line)
        if channels is not None and channel:
            at = channels.setdefault(channel[1], len(self.collectives))
            if at < len(self.collectives):
                self.collectives[at] = self.collectives[at]._replace(overlapped=True)
                return
        self.collectives.append(found)


def sent_to_slices(line: str, result: str, times: int) -> Collective:
    kind = re.search(rf'{MEGASCALE}="(\w+)"', line)[1].lower().replace("_", "-")
    sent = sum(array_bytes(dtype, shape) for dtype, shape in ARRAY.findall(result) if shape)
    return Collective(kind, (MEGASCALE,), sent, 1, times, True)


def traffic(text: str) -> float:
    """Bytes that a GPU's program reads and writes besides its products and attention, which are calls of libraries."""
    bodies, entry = computations(text)
    return traffic_of(entry, bodies)


def traffic_of(name: str, bodies: dict[str, list[str]]) -> float:
    """Of one run of a computation."""
    total = 0.0
    sizes = {}  # of the results so far, in bytes
    for line in bodies.get(name, []):
        found = WITH_OPERANDS.match(line)
        if not found:
            continue
        result_name, result, op, operands, rest = found.groups()
        written = sum(array_bytes(*array) for array in ARRAY.findall(result))
        sizes[result_name] = written
        inner = re.search(r"\b(?:body|to_apply|calls)=%?([\w.\-]+)", rest)
        if op == "while":
            total += trip_count(line, bodies) * traffic_of(inner[1], bodies)
        elif op in ("call", "async-start"):
            total += traffic_of(inner[1], bodies)
        elif op == "fusion" and "kind=kCustom" not in rest:
            body = "\n".join(bodies.get(inner[1], []))
            total += fusion_traffic(body, written, read_bytes(operands, sizes))
        elif op in ("copy", "transpose", "scatter", "sort"):
            total += written + sum(read_bytes(operands, sizes))
    return total


def read_bytes(operands: str, sizes: dict[str, int]) -> list[int]:
    """Of each operand; 0 for what is not the result of an instruction before."""
    read = []
    for operand in operands.split(","):
        name = operand.split(" ")[-1].strip().lstrip("%")
        read.append(sizes.get(name, 0))
    return read


def fusion_traffic(body: str, written: int, read: list[int]) -> float:
    if "dynamic-update-slice(" in body:  # in place: only what is put in is read, and written
        read = [size for size in read if size != written]
        written = sum(read)
    if "dynamic-slice(" in body:  # only a part of an operand is read
        read = [min(size, 2 * written) for size in read]
    return written + sum(read)


def largest_factor(text: str) -> int:
    """Bytes of the largest matrix that a product of the program reads, of a batch of products one alone."""
    arrays = {}
    for name, dtype, shape in re.findall(r"%(\S+) = ([a-z]\w*)\[([\d,]*)\]", text):
        arrays[name] = (dtype, shape)
    largest = 0
    for left, right, rest in re.findall(r" dot\(%([^\s,]+), %([^\s)]+)\)(.*)", text):
        products = 1
        batch = re.search(r"lhs_batch_dims=\{([\d,]+)\}", rest)
        if batch:
            sizes = numbers(arrays[left][1])
            products = math.prod(sizes[dim] for dim in numbers(batch[1]))
        for name in (left, right):
            largest = max(largest, array_bytes(*arrays[name]) // products)
    return largest


def trip_count(line: str, bodies: dict) -> int:
    """How often a loop runs: as the compiler says, else the one bound that its condition compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    condition = bodies.get(called(line, "condition"), [])
    bounds = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    if len(bounds) == 1:
        return int(bounds[0])
    return 1


def collective(line: str, result: str, op: str, times: int, axes: dict, name: str) -> Collective:
    """The collective of an instruction. axes: axes_of_groups. name: of the computation that it stands in."""
    kind = op.removesuffix("-start")
    is_started = op.endswith("-start")
    sizes = []
    for dtype, shape in ARRAY.findall(result):
        if shape or kind == "all-reduce":
            sizes.append(array_bytes(dtype, shape))
    if is_started and kind != "all-reduce":  # what goes in, then what comes out
        sizes = sizes[len(sizes) // 2 :]
    moved = sum(sizes)
    groups = groups_of(line) or group_of_all(axes)
    size = len(groups[0]) if groups else 1
    if kind == "reduce-scatter":
        moved *= size
    elif kind == "all-reduce" and "all-reduce-scatter" in name:
        kind = "reduce-scatter"
    if kind == "collective-permute":
        along = axes_of_pairs(groups, axes)
    else:
        along = axes.get(as_key(groups))
    return Collective(kind, along or ("?",), moved, size, times, is_started)


def array_bytes(dtype: str, shape: str) -> int:
    return BYTES.get(dtype, 0) * math.prod(numbers(shape))


def numbers(text: str) -> list[int]:
    """'8,128' -> [8, 128]; '' -> []."""
    return [int(word) for word in text.split(",") if word]


def group_of_all(axes: dict) -> list[list[int]]:
    """All devices as one group, which is what replica_groups={} means."""
    for groups in axes:
        if len(groups) == 1:
            return [sorted(group) for group in groups]
    return []


def groups_of(line: str) -> list[list[int]]:
    """The devices, by their place in the mesh, that talk to each other; of a permutation its pairs.

    XLA writes them in three ways: one by one, as a reshaped and transposed range, or as axes of a mesh.
    """
    listed = re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,{} ]*\})\}", line)
    if listed:
        return [numbers(group) for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        dims = numbers(iota[2])
        order = range(len(dims))
        if iota[3]:
            order = numbers(iota[3])
        grid = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return grid.reshape(numbers(iota[1])).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:\s*(?:device_ids=)?\([^)]*\))?\s*\{([^}]*)\}", line
    )
    if named:
        shape = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return groups_along(re.findall(r"'(\w+)'", named[2]), shape)
    return []


def groups_along(axes: list[str], shape: dict[str, int]) -> list[list[int]]:
    """The groups of devices of a mesh of this shape that differ in these axes alone."""
    names = list(shape)
    over = [names.index(axis) for axis in axes]
    kept = [i for i in range(len(names)) if i not in over]
    sizes = list(shape.values())
    grid = np.arange(math.prod(sizes)).reshape(sizes).transpose(kept + over)
    return grid.reshape(-1, math.prod(sizes[i] for i in over)).tolist()


def as_key(groups: list[list[int]]) -> frozenset:
    return frozenset(map(frozenset, groups))


def axes_of_groups(shape: dict[str, int]) -> dict[frozenset, tuple[str, ...]]:
    """{groups of devices: the mesh axes along which they lie}, for every set of axes."""
    shape = {name: size for name, size in shape.items() if size > 1}
    names = list(shape)
    table = {}
    for mask in range(1, 2 ** len(names)):
        along = [name for i, name in enumerate(names) if mask >> i & 1]
        table[as_key(groups_along(along, shape))] = tuple(along)
    return table


def axes_of_pairs(pairs: list[list[int]], axes: dict) -> tuple[str, ...] | None:
    """The fewest axes whose groups contain every pair."""
    for groups, names in sorted(axes.items(), key=lambda item: len(item[1])):
        group_of = {}
        for i, group in enumerate(groups):
            group_of |= dict.fromkeys(group, i)
        if all(group_of.get(a) == group_of.get(b) for a, b in pairs):
            return names
    return None

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
    overlapped: (
        bool  # it has a start and an end, or is spread over fusions: other work may run beside it
    )
    inside: bool = False  # of one slice, although its axes may lie across slices


class Program(NamedTuple):
    collectives: list[Collective]
    cycles: float  # of everything that the TPU compiler estimates, kernels in Pallas apart; 0 from other compilers
    traffic: float = (
        0.0  # of a GPU: bytes that all but products and attention read and write; else 0
    )


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


MEGASCALE = (
    "_xla_megascale_transfer_type"  # TPU slices: each has its own program, and sends to the others
)


def count(text: str, mesh, slices: int = 1, across: str = "data") -> Program:
    """text: scheduled HLO, as `compiled.as_text()`. mesh: whose axes the collectives are told by.

    across: the axis that lies over the slices, if there are several.
    """
    bodies, entry = computations(text)
    shape = dict(mesh.shape)
    apart = MEGASCALE in text
    if apart:
        shape[across] //= slices
    program = Program([], 0.0)
    cycles = walk(bodies, entry, 1, axes_of_groups(shape), program)
    found = []
    for one in program.collectives:
        found.append(
            one._replace(axes=(across,), size=slices)
            if one.axes == (MEGASCALE,)
            else one._replace(inside=apart)
        )
    return program._replace(cycles=cycles, collectives=found)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({computation: its instructions}, the name of the entry)."""
    bodies = {}
    current = None
    entry = ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{\s*$", line)
        if head:
            current = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and " = " in line:
            current.append(re.sub(r"/\*index=\d+\*/", "", line))
    return bodies, entry


def walk(
    bodies, name: str, times: int, axes: dict, program: Program, fused: dict | None = None
) -> float:
    """Cycles of one run of a computation; adds to `program` what it does in all of its `times`.

    fused: of a fusion's body, the channels that fusions beside it have told of, and where in `program`: a collective
    may be spread over several, each with the whole instruction.
    """
    total = 0.0
    in_fusion = fused is not None
    channels = {} if fused is None else fused
    for line in bodies.get(name, []):
        found = re.search(r" = (\(.*?\)|\S+) ([a-z][\w\-]*)\(", line)
        if not found:
            continue
        result, op = found.groups()

        def called(key, line=line):
            return re.search(rf"\b{key}=%?([\w.\-]+)", line)[1]

        if op == "while":
            n = trips(line, bodies)
            total += n * walk(bodies, called("body"), times * n, axes, program, fused)
        elif op == "conditional":
            names = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                names += re.findall(r"%?([\w.\-]+)", group)
            total += max(
                (walk(bodies, branch, times, axes, program, fused) for branch in names), default=0
            )
        elif op in ("call", "async-start"):
            key = "to_apply" if "to_apply=" in line else "calls"
            total += walk(bodies, called(key), times, axes, program, fused)
        elif (
            op == "fusion"
        ):  # collectives may be fused with what feeds them, or with a slice of their result
            walk(bodies, called("calls"), times, axes, program, channels)
        elif op.removesuffix("-start") in KINDS:
            channel = re.search(r"channel_id=(\d+)", line)
            if in_fusion and channel:
                if channel[1] in channels:
                    at = channels[channel[1]]
                    program.collectives[at] = program.collectives[at]._replace(overlapped=True)
                    continue
                channels[channel[1]] = len(program.collectives)
            program.collectives.append(collective(line, result, op, times, axes, name))
        elif op == "send" and MEGASCALE in line:
            kind = re.search(rf'{MEGASCALE}="(\w+)"', line)[1].lower().replace("_", "-")
            sent = sum(array_bytes(*found) for found in ARRAY.findall(result) if found[1])
            program.collectives.append(Collective(kind, (MEGASCALE,), sent, 1, times, True))
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        if cycles and op != "while" and not in_fusion:
            total += int(cycles[1])
    return total


def traffic(text: str) -> float:
    """Bytes that a GPU's program reads and writes besides its products and attention, which are calls of libraries."""
    bodies, entry = computations(text)

    def of(name: str) -> float:
        total = 0.0
        sizes = {}
        for line in bodies.get(name, []):
            found = re.match(
                r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*?)\)(.*)", line
            )
            if not found:
                continue
            name, result, op, operands, rest = found.groups()
            sizes[name] = written = sum(array_bytes(*array) for array in ARRAY.findall(result))
            called = re.search(r"\b(?:body|to_apply|calls)=%?([\w.\-]+)", rest)
            if op == "while":
                total += trips(line, bodies) * of(called[1])
            elif op in ("call", "async-start"):
                total += of(called[1])
            elif (op == "fusion" and "kind=kCustom" not in rest) or op in (
                "copy",
                "transpose",
                "scatter",
                "sort",
            ):
                read = []
                for operand in operands.split(","):
                    read.append(sizes.get(operand.split(" ")[-1].strip().lstrip("%"), 0))
                if op == "fusion":
                    body = "\n".join(bodies.get(called[1], []))
                else:
                    body = ""
                if "dynamic-update-slice(" in body:  # in place: what is put in is read, and written
                    read = [size for size in read if size != written]
                    written = sum(read)
                if "dynamic-slice(" in body:  # a part of what is given is read
                    read = [min(size, 2 * written) for size in read]
                total += written + sum(read)
        return total

    return of(entry)


def largest_factor(text: str) -> int:
    """Bytes of the largest matrix that a product of the program reads, of a batch of products one alone."""
    arrays = {
        name: (dtype, shape)
        for name, dtype, shape in re.findall(r"%(\S+) = ([a-z]\w*)\[([\d,]*)\]", text)
    }
    largest = 0
    for *factors, how in re.findall(r" dot\(%([^\s,]+), %([^\s)]+)\)(.*)", text):
        _, shape = arrays[factors[0]]
        batch = re.search(r"lhs_batch_dims=\{([\d,]+)\}", how)
        sizes = shape.split(",")
        if batch:
            parts = math.prod(int(sizes[int(dim)]) for dim in batch[1].split(","))
        else:
            parts = 1
        largest = max(largest, *(array_bytes(*arrays[name]) // parts for name in factors))
    return largest


def trips(line: str, bodies: dict) -> int:
    """How often a loop runs: as the compiler says, else the one bound that its condition compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    condition = bodies.get(re.search(r"condition=%?([\w.\-]+)", line)[1], [])
    bounds = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    if len(bounds) == 1:
        return int(bounds[0])
    return 1


def collective(line: str, result: str, op: str, times: int, axes: dict, name: str) -> Collective:
    kind = op.removesuffix("-start")
    sizes = []
    for found in ARRAY.findall(result):
        if found[1] or kind == "all-reduce":
            sizes.append(array_bytes(*found))
    if op.endswith("-start") and kind != "all-reduce":  # what goes in, then what comes out
        sizes = sizes[len(sizes) // 2 :]
    number = sum(sizes)
    groups = groups_of(line) or [
        sorted(group) for group in next((g for g in axes if len(g) == 1), [])
    ]  # {}: all
    size = len(groups[0]) if groups else 1
    if kind == "reduce-scatter":
        number *= size
    elif kind == "all-reduce" and "all-reduce-scatter" in name:
        kind = "reduce-scatter"
    if kind != "collective-permute":
        along = axes.get(frozenset(frozenset(group) for group in groups))
    else:
        along = axes_of_pairs(groups, axes)
    return Collective(kind, along or ("?",), number, size, times, op.endswith("-start"))


def array_bytes(dtype: str, shape: str) -> int:
    return BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)


def groups_of(line: str) -> list[list[int]]:
    """The devices, by their place in the mesh, that talk to each other; of a permutation its pairs."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", line)
    listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", line)
    if pairs or listed:
        return [
            [int(n) for n in group.split(",")]
            for group in re.findall(r"\{([\d, ]+)\}", (pairs or listed)[1])
        ]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        if iota[3]:
            order = [int(n) for n in iota[3].split(",")]
        else:
            order = range(len(dims))
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:\s*(?:device_ids=)?\([^)]*\))?\s*\{([^}]*)\}", line
    )
    if named:
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'", named[2])
        kept = [i for i, axis in enumerate(sizes) if axis not in along]
        over = [list(sizes).index(axis) for axis in along]
        grid = (
            np.arange(math.prod(sizes.values()))
            .reshape(list(sizes.values()))
            .transpose(kept + over)
        )
        return grid.reshape(-1, math.prod(sizes[axis] for axis in along)).tolist()
    return []


def axes_of_groups(shape: dict[str, int]) -> dict[frozenset, tuple[str, ...]]:
    """{groups of devices: the mesh axes along which they lie}, for every set of axes."""
    names = [name for name in shape if shape[name] > 1]
    grid = np.arange(math.prod(shape.values())).reshape([shape[name] for name in names])
    table = {}
    for mask in range(1, 2 ** len(names)):
        over = [i for i in range(len(names)) if mask >> i & 1]
        kept = [i for i in range(len(names)) if not mask >> i & 1]
        rows = grid.transpose(kept + over).reshape(-1, math.prod(grid.shape[i] for i in over))
        table[frozenset(frozenset(row) for row in rows.tolist())] = tuple(names[i] for i in over)
    return table


def axes_of_pairs(pairs: list[list[int]], axes: dict) -> tuple[str, ...] | None:
    """The fewest axes whose groups contain every pair."""
    for groups, names in sorted(axes.items(), key=lambda item: len(item[1])):
        group_of = {}
        for i, group in enumerate(groups):
            for device in group:
                group_of[device] = i
        if all(group_of.get(a) == group_of.get(b) for a, b in pairs):
            return names
    return None

"""How long a compiled step should take on chips that are not here, in parts, and how good that is.

hlo.py finds work and communication in the program. A chip's data sheet (jaxlm/parallel/chips.py) and the constants
below, each with a meaning and fitted to published measurements (docs/plan.md), turn them into seconds.
"""

import math
from collections import Counter
from typing import NamedTuple

from jaxlm.parallel.chips import Chip
from jaxlm.plan.hlo import Collective, Program
from jaxlm.plan.topology import Topology, wraps

CYCLES = 0.8  # real time of compiled fusions over the TPU compiler's own estimate
KERNELS = 0.65  # part of the peak that kernels in Pallas reach: attention, experts' products
HIDDEN = 0.5  # part of the communication beside work where a schedule does not say (GPUs, arithmetic; not measured)
ERROR = 0.07  # of the step time: the worst of the fit
GPU_PRODUCTS = 0.72  # part of a GPU's peak FLOPs in products, attention included
GPU_BANDWIDTH = 0.62  # part of a GPU's bandwidth in all else
# Part of a GPU's peak FLOPs over a whole step, where no GPU compiler says what else it does.
GPU_WORK = 0.48


class Times(NamedTuple):
    """Seconds of one step."""

    matrix: float  # matrix units at their peak
    work: float  # on the device: matrix units, memory and all else, kernels included
    communication: dict[tuple[tuple[str, ...], str], float]  # {(mesh axes, network): seconds}
    exposed: float  # of the communication, what is waited for
    low: float  # with all communication hidden that fits beside the work, and less by ERROR
    high: float  # with none hidden, and more by ERROR

    @property
    def expected(self) -> float:
        return self.work + self.exposed


class Network(NamedTuple):
    """What the devices of some mesh axes talk over."""

    name: str  # ICI, NVLink, DCN, or "here" of chips that are not known
    bandwidth: float  # bytes a second, one way, of a device to another
    ring: float  # the same in rings through all: along every link of a torus; NCCL has one for each network adapter


def network_of(axes: tuple[str, ...], mesh, topology: Topology, inside: bool = False) -> Network:
    """The slowest network within a group of devices along these mesh axes. inside: of their part in one slice.

    GPUs of one host talk over NVLink, those of several over DCN, whether or not they are of one slice.
    """
    chip = topology.spec
    if not chip.flops:
        return Network("here", math.inf, math.inf)
    group = group_along(axes, mesh)
    place = {device: i for i, device in enumerate(topology.devices)}
    if not chip.dims:
        return gpu_network([place[device] for device in group], topology)
    size = len(topology.devices) // topology.slices
    slices = [getattr(device, "slice_index", place[device] // size) for device in group]
    if inside:
        group = [device for device, number in zip(group, slices) if number == slices[0]]
    elif len(set(slices)) > 1:
        return Network("DCN", chip.network, chip.network)
    links = 0
    for d, is_ring in enumerate(wraps(topology.shape)):
        is_spanned = len({device.coords[d] for device in group}) > 1
        if is_spanned:
            links += 1 + is_ring
    return Network("ICI", chip.link, chip.link * max(links, 1))


def group_along(axes: tuple[str, ...], mesh) -> list:
    """The devices that the first device meets along these axes; ("?",) is all of them."""
    index = []
    for name in mesh.axis_names:
        index.append(slice(None) if name in axes or axes == ("?",) else 0)
    return list(mesh.devices[tuple(index)].flat)


def gpu_network(places: list[int], topology: Topology) -> Network:
    """places: of the group's GPUs among the topology's."""
    chip = topology.spec
    hosts = Counter(place // topology.shape[-1] for place in places)
    if len(hosts) == 1:
        return Network("NVLink", chip.link, chip.link)
    ring = min(chip.link, chip.network * min(hosts.values()))
    return Network("DCN", chip.network, ring)


def seconds(collective: Collective, network: Network) -> float:
    """Of all runs of a collective in a step: each device sends and receives the parts of the others."""
    kind = collective.kind
    sent = (collective.size - 1) / max(collective.size, 1)
    if kind == "all-reduce":
        sent *= 2
    elif kind == "collective-permute":
        sent = 1.0
    bandwidth = network.bandwidth
    if kind in ("all-gather", "reduce-scatter", "all-reduce"):
        bandwidth = network.ring
    return collective.times * collective.bytes * sent / bandwidth


def work_seconds(program: Program, flops: float, kernel_flops: float, chip: Chip) -> float:
    """On the device, by what its compiler says: cycles (TPU), bytes besides products (GPU), or nothing."""
    if program.cycles:
        return CYCLES * program.cycles / chip.clock + kernel_flops / (KERNELS * chip.flops)
    if program.traffic:
        products = flops / (GPU_PRODUCTS * chip.flops)
        return products + program.traffic / (GPU_BANDWIDTH * chip.bandwidth)
    return flops / (GPU_WORK * chip.flops)


def step_times(
    program: Program, flops: float, kernel_flops: float, mesh, topology: Topology
) -> Times:
    """flops: of all matrix products on one device, of which kernel_flops in kernels without an estimate of cycles.

    Products of 8 bits count half.
    """
    chip = topology.spec
    work = work_seconds(program, flops, kernel_flops, chip)
    communication = {}
    exposed = 0.0
    for collective in program.collectives:
        network = network_of(collective.axes, mesh, topology, collective.inside)
        key = (collective.axes, network.name)
        time = seconds(collective, network)
        communication[key] = communication.get(key, 0.0) + time
        if not collective.overlapped:
            exposed += time
    total = math.fsum(communication.values())
    if not program.cycles:  # only a TPU's schedule says what runs beside work
        exposed = total * (1 - HIDDEN)
    return Times(
        matrix=flops / chip.flops,
        work=work,
        communication=communication,
        exposed=max(exposed, total - work),
        low=(1 - ERROR) * max(work, total),
        high=(1 + ERROR) * (work + total),
    )

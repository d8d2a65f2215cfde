"""How long a compiled step should take on chips that are not here, in parts, and how good that is.

hlo.py finds work and communication in the program. A chip's data sheet (jaxlm/parallel/chips.py) and the constants
below, each with a meaning and fitted to published measurements (docs/plan.md), turn them into seconds.
"""

import math
from collections import Counter
from typing import NamedTuple

from jaxlm.plan.hlo import Collective, Program
from jaxlm.plan.topology import Topology, wraps

CYCLES = 0.8  # real time of compiled fusions over the TPU compiler's own estimate
KERNELS = 0.65  # part of the peak that kernels in Pallas reach: attention, experts' products
HIDDEN = 0.5  # part of the communication beside work where a schedule does not say (GPUs, arithmetic; not measured)
ERROR = 0.07  # of the step time: the worst of the fit
# parts of a GPU's peaks: in products, attention included; in all else
GPU_PRODUCTS = 0.72
GPU_BANDWIDTH = 0.62
GPU_WORK = (
    0.48  # part of the first over a whole step, where no GPU's compiler told what else it does
)


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
    ring: float  # the same in rings through all: along every link of a torus; NCCL has one for each adapter of a host


def network_of(axes: tuple[str, ...], mesh, topology: Topology, inside: bool = False) -> Network:
    """The slowest network within a group of devices along these mesh axes. inside: of their part in one slice.

    GPUs of one host talk over NVLink, those of several over DCN, whether or not they are of one slice.
    """
    chip = topology.spec
    names = list(mesh.axis_names)
    index = tuple(slice(None) if name in axes or axes == ("?",) else 0 for name in names)
    place = {device: i for i, device in enumerate(topology.devices)}
    size = len(topology.devices) // topology.slices

    def slice_of(device):
        return getattr(device, "slice_index", place[device] // size)

    group = list(mesh.devices[index].flat)
    if not chip.flops:
        return Network("here", math.inf, math.inf)
    if not chip.dims:
        hosts = Counter(place[device] // topology.shape[-1] for device in group)
        if len(hosts) == 1:
            ring = chip.link
        else:
            ring = min(chip.link, chip.network * min(hosts.values()))
        if len(hosts) == 1:
            return Network("NVLink", chip.link, ring)
        return Network("DCN", chip.network, ring)
    if inside:
        group = [device for device in group if slice_of(device) == slice_of(group[0])]
    else:
        group = group
    if len(set(map(slice_of, group))) > 1:
        return Network("DCN", chip.network, chip.network)
    spans = []
    for d in range(chip.dims):
        spans.append(len({device.coords[d] for device in group}) > 1)
    links = sum(1 + ring for spanned, ring in zip(spans, wraps(topology.shape)) if spanned)
    return Network("ICI", chip.link, chip.link * max(links, 1))


def seconds(collective: Collective, network: Network) -> float:
    """Of all runs of a collective in a step: each device sends and receives the parts of the others."""
    share = (collective.size - 1) / max(collective.size, 1)
    rings = collective.kind in ("all-gather", "reduce-scatter", "all-reduce")
    bandwidth = network.ring if rings else network.bandwidth
    sent = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(collective.kind, share)
    return collective.times * collective.bytes * sent / bandwidth


def step_times(
    program: Program, flops: float, kernel_flops: float, mesh, topology: Topology
) -> Times:
    """flops: of all matrix products on one device, of which kernel_flops in kernels without an estimate of cycles.

    Products of 8 bits count half.
    """
    chip = topology.spec
    matrix = flops / chip.flops
    if program.cycles:
        work = CYCLES * program.cycles / chip.clock + kernel_flops / (KERNELS * chip.flops)
    elif program.traffic:
        work = flops / (GPU_PRODUCTS * chip.flops) + program.traffic / (
            GPU_BANDWIDTH * chip.bandwidth
        )
    else:
        work = flops / (GPU_WORK * chip.flops)
    communication = {}
    waited = 0.0
    for collective in program.collectives:
        network = network_of(collective.axes, mesh, topology, collective.inside)
        key = (collective.axes, network.name)
        time = seconds(collective, network)
        communication[key] = communication.get(key, 0.0) + time
        waited += 0.0 if collective.overlapped else time
    total = math.fsum(communication.values())
    waited = (
        waited if program.cycles else total * (1 - HIDDEN)
    )  # a TPU's schedule says what runs beside work
    exposed = max(waited, total - work)
    low = (1 - ERROR) * max(work, total)
    high = (1 + ERROR) * (work + total)
    return Times(matrix, work, communication, exposed, low, high)

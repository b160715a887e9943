"""How NVIDIA's GPUs reach each other: NVLink, one by one or through a switch, or PCIe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

from msgspec import Struct

from ftplan.launcher.probing.cuda_visible import Slot
from ftplan.launcher.probing.nvml import Session, decoded
from ftplan.planner.hardware_spec import GpuLink
from ftplan.profiles import GpuEntry, link_bytes_per_second

# NVML_NVLINK_MAX_LINKS. A GPU with fewer refuses the higher numbers.
MAX_LINKS = 36

_ACTIVE = 1  # NVML_FEATURE_ENABLED
_REMOTE_SWITCH = 2  # NVML_NVLINK_DEVICE_TYPE_SWITCH
_P2P_READ = 0  # NVML_P2P_CAPS_INDEX_READ
_P2P_OK = 0  # NVML_P2P_STATUS_OK

# nvmlGpuTopologyLevel_t, in the words of `nvidia-smi topo -m`. Two GPUs of one board count as
# behind one switch.
PATHS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}


class _End(Struct, frozen=True, kw_only=True):
    """A GPU's active NVLinks: those into a switch, those to other GPUs by their bus id."""

    index: int
    handle: object
    bus_id: str | None
    to_switch: int
    to_gpus: Counter[str]
    bytes_per_link: float


def gpu_links(
    session: Session, gpus: Sequence[tuple[Slot, GpuEntry]], everything: Sequence[object]
) -> tuple[tuple[GpuLink, ...], dict[int, float]]:
    """The link of each two visible GPUs, and what all NVLinks of each carry in one direction.

    `everything`: handles of all GPUs, the hidden ones too. None with MIG, whose devices reach no
    other.
    """
    if len(gpus) < 2 or any(slot.is_mig for slot, _ in gpus):
        return (), {}
    try:
        bus_ids = {_bus_id(session, handle) for handle in everything} - {None}
        ends = [_end(session, slot, entry, bus_ids) for slot, entry in gpus]
        links = tuple(_link(session, one, other) for one, other in combinations(ends, 2))
    except session.nvml.NVMLError_GpuIsLost:
        session.notes.append(
            "the driver has lost a GPU while its links were read; restart the machine"
        )
        return (), {}
    return links, {e.index: (e.to_switch + e.to_gpus.total()) * e.bytes_per_link for e in ends}


def _end(session: Session, slot: Slot, entry: GpuEntry, bus_ids: set[str | None]) -> _End:
    to_switch, to_gpus = 0, Counter[str]()
    for number in _active_links(session, slot.gpu_handle):
        remote = _remote_gpu(session, slot.gpu_handle, number, bus_ids)
        if remote is None:
            to_switch += 1
        else:
            to_gpus[remote] += 1
    return _End(
        index=slot.index,
        handle=slot.gpu_handle,
        bus_id=_bus_id(session, slot.gpu_handle),
        to_switch=to_switch,
        to_gpus=to_gpus,
        bytes_per_link=link_bytes_per_second("nvlink", entry.nvlink[0], 1) if entry.nvlink else 0.0,
    )


def _active_links(session: Session, handle: object) -> Iterator[int]:
    for number in range(MAX_LINKS):
        state = session.ask(None, session.nvml.nvmlDeviceGetNvLinkState, handle, number)
        if state is None and number == 0:
            return  # no NVLink at all
        if state == _ACTIVE:
            yield number


def _remote_gpu(
    session: Session, handle: object, number: int, bus_ids: set[str | None]
) -> str | None:
    """The bus id of the GPU at the other end, empty if unknown; None for a switch.

    An older driver does not say what is there: what is none of the GPUs is taken for a switch.
    """
    nvml = session.nvml
    kind = session.ask(None, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, number)
    if kind == _REMOTE_SWITCH:
        return None
    info = session.ask(None, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, number)
    remote = "" if info is None else _normal(info.busId)
    return remote if kind is not None or remote in bus_ids else None


def _link(session: Session, one: _End, other: _End) -> GpuLink:
    nvml = session.nvml
    direct = one.to_gpus[other.bus_id] if other.bus_id else 0
    through_switch = min(one.to_switch, other.to_switch)
    count = direct or through_switch
    level = session.ask(None, nvml.nvmlDeviceGetTopologyCommonAncestor, one.handle, other.handle)
    peer = session.ask(None, nvml.nvmlDeviceGetP2PStatus, one.handle, other.handle, _P2P_READ)
    return GpuLink(
        first=one.index,
        second=other.index,
        kind="nvlink" if direct else "nvswitch" if through_switch else "pcie",
        num_links=count,
        bytes_per_second=count * min(one.bytes_per_link, other.bytes_per_link),
        path=None if level is None else PATHS.get(level),
        peer_access=None if peer is None else peer == _P2P_OK,
    )


def _bus_id(session: Session, handle: object) -> str | None:
    info = session.ask(None, session.nvml.nvmlDeviceGetPciInfo, handle)
    return None if info is None else _normal(info.busId)


def _normal(bus_id: str | bytes) -> str:
    """One spelling: `00000000:3B:00.0` and `0000:3b:00.0` are one place."""
    domain, _, place = decoded(bus_id).casefold().partition(":")
    return f"{int(domain or '0', 16):x}:{place}"

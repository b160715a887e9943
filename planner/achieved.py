"""What hardware achieves in training, of what data sheets and benchmarks say: a middle for the
estimate, and the least and the most for its bounds (docs/time-model.md).
"""

from __future__ import annotations

from msgspec import Struct

from ftplan.planner.hardware_spec import DeviceKind


class Share(Struct, frozen=True):
    """A number that is not known exactly."""

    least: float
    middle: float
    most: float


# Of the rate that large square products reach on a card, what those of training reach: their
# shapes leave a part of the last wave of blocks idle, attention's kernel is slower, and the card
# is warm. Training GPT with FlashAttention-2 reaches 225 of an A100's 265 TFLOP/s, its attention
# alone 50 % of 312 at least (arXiv 2307.08691). Taken for every GPU.
TRAINING_SHARE_OF_MATMUL = Share(0.6, 0.85, 1.0)

# Of the dense peak, what large square products reach where nobody measured the card. The middle of
# those that were measured (profiles/matmul_rates.json): 0.74 of an L40S's peak, 0.79 of an H100's,
# 0.85 of an A100's, 1.07 of an RTX 3090's, whose data sheet counts a lower clock.
MATMUL_SHARE_OF_PEAK = Share(0.74, 0.85, 1.0)

# Of a GPU's memory bandwidth, what element-wise kernels reach: copies reach 0.85 to 0.92 of it on
# data-centre cards (nvbandwidth, BabelStream); that strided ones reach 0.7 at least is assumed. On
# the processor it is measured with such kernels.
SHARE_OF_BANDWIDTH: dict[DeviceKind, Share] = {
    "cuda": Share(0.7, 0.85, 0.92),
    "cpu": Share(0.75, 1.0, 1.1),
}

# Of the rates of products that are measured on a processor: what else it does meanwhile, and its
# clock, change between measuring and training. Assumed.
SHARE_OF_MEASURED = Share(0.75, 1.0, 1.1)

# Seconds that the host takes for an operation: Python, torch's dispatcher, autograd. Measured with
# `python -m benchmarks.launching` on one core of an AMD EPYC, torch 2.13 and transformers
# 5.23: 9 to 11 µs, and 15 to 20 µs where checkpointing's hooks see each saved tensor.
HOST_SECONDS = 10.5e-6
HOST_SECONDS_WITH_HOOKS = 17e-6

# What a launch on a GPU adds: some 5 µs a kernel and driver call (RTX 5070 Ti, CUDA 13:
# susun-blog.com, pegainfer 3).
LAUNCH_SECONDS = 5e-6

# How many times as long other hosts take. A server's newest cores are up to 1.4 times as fast as
# those before (arXiv 2603.12465); a shared virtual core of 2 GHz, as notebooks have, takes twice
# as long. Assumed.
HOST_FACTOR = Share(0.5, 1.0, 2.0)

# Bytes a second that an optimizer on the host moves, all processes together. AdamW on 1 billion
# parameters, 28 GB, takes DeepSpeed's CPU-Adam 0.22 s and torch's own loop 1.39 s on a server with
# two sockets (ZeRO-Offload, arXiv 2101.06840, section 6.2); two channels of DDR5 carry 60 to 80.
HOST_BYTES_PER_SECOND = Share(20e9, 60e9, 130e9)

# Where a card's lanes are not known: PCIe 3.0 with 16, as the oldest of the catalog have.
ASSUMED_HOST_LINK_BYTES_PER_SECOND = 12.9e9

# Of a card's rated power, what it draws in training: a node of eight H100 drew 76 % of its rating
# (arXiv 2506.14551).
SHARE_OF_POWER = 0.76


class Achieved(Struct, frozen=True, kw_only=True):
    """One set of assumptions. `overlaps_traffic`: arithmetic and memory traffic go on at the same
    time; `overlaps_links`: so does what is sent to other GPUs and to the host. `host_bandwidth`: of
    an optimizer there."""

    matmul: float
    peak: float
    measured: float
    bandwidth: dict[DeviceKind, float]
    host: float
    host_bandwidth: float
    overlaps_traffic: bool
    overlaps_links: bool


ESTIMATE = Achieved(
    matmul=TRAINING_SHARE_OF_MATMUL.middle,
    peak=MATMUL_SHARE_OF_PEAK.middle,
    measured=SHARE_OF_MEASURED.middle,
    bandwidth={kind: share.middle for kind, share in SHARE_OF_BANDWIDTH.items()},
    host=HOST_FACTOR.middle,
    host_bandwidth=HOST_BYTES_PER_SECOND.middle,
    overlaps_traffic=False,
    overlaps_links=True,
)
FASTEST = Achieved(
    matmul=TRAINING_SHARE_OF_MATMUL.most,
    peak=MATMUL_SHARE_OF_PEAK.most,
    measured=SHARE_OF_MEASURED.most,
    bandwidth={kind: share.most for kind, share in SHARE_OF_BANDWIDTH.items()},
    host=HOST_FACTOR.least,
    host_bandwidth=HOST_BYTES_PER_SECOND.most,
    overlaps_traffic=True,
    overlaps_links=True,
)
SLOWEST = Achieved(
    matmul=TRAINING_SHARE_OF_MATMUL.least,
    peak=MATMUL_SHARE_OF_PEAK.least,
    measured=SHARE_OF_MEASURED.least,
    bandwidth={kind: share.least for kind, share in SHARE_OF_BANDWIDTH.items()},
    host=HOST_FACTOR.most,
    host_bandwidth=HOST_BYTES_PER_SECOND.least,
    overlaps_traffic=False,
    overlaps_links=False,
)

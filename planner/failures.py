"""What failing machines cost a run: Eq. (T11).

A run on many GPUs ends with the first of them that fails, and begins again at its last checkpoint.
Checkpoints that are written often cost time, those that are not cost what is computed again.
"""

from __future__ import annotations

import math
from typing import Any

from msgspec import Struct, structs

from ftplan.planner.units import SECONDS_PER_HOUR

# Mean time between failures of one GPU and its part of the machine and the network: Llama 3 405B
# was interrupted 419 times unexpectedly in 54 days on 16,384 H100 (arXiv 2407.21783, section
# 3.3.4), once in 50,700 hours of one GPU. Two clusters of A100 failed 6.5 and 2.34 times in 1,000
# days of a machine of eight, 29,500 and 82,000 hours of one GPU (arXiv 2410.21680).
GPU_SECONDS_BETWEEN_FAILURES = 54 * 24 * SECONDS_PER_HOUR * 16_384 / 419

# What a shared file system takes of each GPU while all write. Llama 3's has 2 TB/s for 24,000 GPUs
# (arXiv 2407.21783, section 3.3.1): 0.67 GB/s for each machine of eight. Taken for any cluster
# whose storage nobody has described.
ASSUMED_WRITE_BYTES_PER_SECOND_OF_A_GPU = 2e12 / 24_000

# From a failure to the first step of the run that goes on, reading the checkpoint left out: it is
# noticed and scheduled anew, processes and libraries start. Assumed, as the study of Meta's
# clusters does (arXiv 2410.21680).
RESTART_SECONDS = 300.0


class Failures(Struct, frozen=True, kw_only=True):
    """What a run loses where it fails at random. `save_seconds`: to write a checkpoint while
    training waits; `restart_seconds`: from a failure to the next step, reading included.

    `young_seconds`, `daly_seconds`: between checkpoints, what Young (1974) and Daly (2006) say is
    best. `lost_share`: of the time that passes, what is not training, with Daly's.
    """

    seconds_between_failures: float
    save_seconds: float
    restart_seconds: float
    young_seconds: float
    daly_seconds: float
    lost_share: float

    @property
    def training_share(self) -> float:
        return 1 - self.lost_share

    def to_dict(self) -> dict[str, Any]:
        return structs.asdict(self)


def failures_of(
    seconds_between_failures: float,
    checkpoint_bytes: float,
    write_bytes_per_second: float,
    restart_seconds: float = RESTART_SECONDS,
) -> Failures:
    """What a run with checkpoints of so many bytes loses.

    They are read as fast as they are written.
    """
    save = checkpoint_bytes / write_bytes_per_second
    restart = restart_seconds + save
    interval = daly_seconds(save, seconds_between_failures)
    return Failures(
        seconds_between_failures=seconds_between_failures,
        save_seconds=save,
        restart_seconds=restart,
        young_seconds=young_seconds(save, seconds_between_failures),
        daly_seconds=interval,
        lost_share=lost_share(interval, save, restart, seconds_between_failures),
    )


def young_seconds(save_seconds: float, between_failures: float) -> float:
    """Training between two checkpoints, to first order: the root of 2 x save x mean time between
    failures (Young, CACM 17(9), 1974)."""
    return math.sqrt(2 * save_seconds * between_failures)


def daly_seconds(save_seconds: float, between_failures: float) -> float:
    """The same to higher order (Daly, Future Generation Computer Systems 22(3), 2006, Eq. 37); the
    mean time between failures where a checkpoint takes over twice as long."""
    if save_seconds >= 2 * between_failures:
        return between_failures
    share = save_seconds / (2 * between_failures)
    longer = 1 + math.sqrt(share) / 3 + share / 9
    return young_seconds(save_seconds, between_failures) * longer - save_seconds


def lost_share(
    interval: float, save_seconds: float, restart_seconds: float, between_failures: float
) -> float:
    """Of the time that passes, what is not training, where failures come at random at a constant
    rate (Daly 2006, Eq. 20): training for `interval` and saving takes
    `M e^(restart / M) (e^((interval + save) / M) - 1)` in the mean."""
    try:
        passed = between_failures * math.exp(restart_seconds / between_failures)
        passed *= math.expm1((interval + save_seconds) / between_failures)
    except OverflowError:
        return 1.0
    return 1 - interval / passed if passed > 0 else 0.0

"""Counters of the page server. Standard library only."""

from __future__ import annotations


class Stats:
    """Counters reported to the owner, in bytes and seconds.

    Points in time count from when the server received its configuration.
    """

    __slots__ = (
        "bytes_ahead",
        "bytes_cold",
        "bytes_faulted",
        "bytes_rest",
        "bytes_zero",
        "faults",
        "faults_before_first_token",
        "faults_missed",
        "faults_zero",
        "first_placed_s",
        "forks",
        "hot_done_s",
        "listening_s",
        "moved",
        "removed",
        "restored_s",
        "spaces_s",
        "stall_s",
        "stall_worst_s",
    )
    bytes_ahead: float
    bytes_cold: float
    bytes_faulted: float
    bytes_rest: float
    bytes_zero: float
    faults: float
    faults_before_first_token: float
    faults_missed: float
    faults_zero: float
    first_placed_s: float
    forks: float
    hot_done_s: float
    listening_s: float
    moved: float
    removed: float
    restored_s: float
    spaces_s: float
    stall_s: float
    stall_worst_s: float

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    def as_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__slots__}

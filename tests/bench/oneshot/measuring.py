"""CPU time and resident memory of a call, taken inside the process."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_STATM = Path("/proc/self/statm")
SAMPLE_SECONDS = 0.005


def resident() -> tuple[int, int]:
    """Bytes now: resident, and resident without pages of files."""
    _, all_pages, of_files, *_ = map(int, _STATM.read_text().split())
    return all_pages * _PAGE, (all_pages - of_files) * _PAGE


class Memory(threading.Thread):
    """Samples resident memory until stopped. Torch releases the interpreter lock in operators, so it gets its turns."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int, int]] = []
        self._stop_now = threading.Event()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory of the forwards hides what the call needs
        self.before, self.before_anonymous = resident()
        self._start = time.monotonic()

    def run(self) -> None:
        while not self._stop_now.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        now, anonymous = resident()
        self.samples.append((time.monotonic() - self._start, now - self.before, anonymous - self.before_anonymous))

    def finish(self) -> None:
        """Stop and take a last sample."""
        self._stop_now.set()
        self.join()
        self._sample()

    @property
    def peak(self) -> int:
        return max(sample[1] for sample in self.samples)

    @property
    def peak_anonymous(self) -> int:
        return max(sample[2] for sample in self.samples)


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU seconds that the process spends in a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def max_rss() -> int:
    """Highest resident bytes of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

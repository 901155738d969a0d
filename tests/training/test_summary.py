import re
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from immiscible.training.summary import peak_memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own count is read from /proc")
def test_peak_memory_is_the_kernels_in_mebibytes():
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    assert peak_memory() == pytest.approx(peak, rel=0.05)


def test_peak_memory_of_macos_is_counted_in_bytes(monkeypatch):
    found = SimpleNamespace(getrusage=lambda who: SimpleNamespace(ru_maxrss=3 * 2**20), RUSAGE_SELF=0)
    monkeypatch.setitem(sys.modules, "resource", found)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory() == 3


def test_peak_memory_without_the_module_that_windows_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5 * 2**20)))
    assert peak_memory() == 5

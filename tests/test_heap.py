"""A large array that is freed and made anew costs no pages, in processes of their own."""

import platform
import subprocess
import sys

import pytest

from ldm_jax import heap

PAGES = """
import resource, sys
from ldm_jax import heap

if sys.argv[1] == "keep":
    assert heap.keep()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = bytearray(2**26)
    array[::4096] = bytes(2**14)  # a byte of each of its pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


def pages(how):
    done = subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or heap.has_accelerator(), reason="nothing is kept here"
)
def test_what_was_freed_is_there_when_it_is_needed_again():
    assert pages("keep") < 1000
    assert pages("as it is") > 10_000


def test_other_machines_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not heap.keep()
    monkeypatch.undo()
    monkeypatch.setattr(heap, "has_accelerator", lambda: True)
    assert not heap.keep()

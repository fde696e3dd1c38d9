"""Launches that begin while the kernel before them ends (programmatic dependent launch, Hopper and newer)."""

import triton
import triton.language as tl


@triton.jit
def await_previous(overlap: tl.constexpr):
    """Wait for the kernel before this one: before anything is read or written."""
    if overlap:
        tl.extra.cuda.gdc_wait()


@triton.jit
def announce_next(overlap: tl.constexpr):
    """Let the next kernel be launched now, to wait; where it would not be in the way of this one's programs."""
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()

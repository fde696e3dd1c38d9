"""What compute-sanitizer reports, apart from what it cannot follow, with a control that shows that it cannot.

Two things on Hopper are outside of what its tools track: that an mbarrier orders accesses of shared memory (racecheck),
and that the bulk copy engine writes memory (initcheck). `control` does both, correctly. Where a tool reports it all the
same, reports of accesses that flexmsa orders or fills in this way are set aside. So are, always, those of the accesses
with which Triton hands work to other warps and ends it: they are in no line of flexmsa, and Triton's named barriers
order them. Every other report counts. Where so many are set aside that the tool drops some, others may be among them:
for initcheck, that the results do not depend on what lay in memory shows that they are not.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flexmsa.kernels.triton.backward import gradient_sm90, reduce
from flexmsa.kernels.triton.common.gluon_sm90 import lanes, make_barriers, shared_box
from flexmsa.kernels.triton.forward import combine, copies, key_major_sm90, query_major_sm90
from flexmsa.kernels.triton.loss import given_teacher_sm90
from flexmsa.kernels.triton.selection import kernel_sm90

ROWS = gl.constexpr(8)
OVERFLOW = "Error buffer overflow"


@gluon.jit
def take(boxes, number, rows, full, empty):
    """Store the number that `leave` left, with the bulk copy engine."""
    mbarrier.wait(full.index(0), 0)
    value = gl.max(number.load(lanes(gl.num_warps())), axis=0)
    mbarrier.arrive(empty.index(0), count=1)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows.store(gl.full([ROWS, 64], value, gl.int32, layout).to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(boxes, [0, 0], rows)
    tma.store_wait(0)


@gluon.jit
def leave(boxes, number, rows, full, empty):
    """Leave a number for `take`."""
    number.store(gl.full([1], 3, gl.int32, lanes(gl.num_warps())))
    mbarrier.arrive(full.index(0), count=1)
    mbarrier.wait(empty.index(0), 0)


@gluon.jit
def write_kernel(boxes):
    """Fill [ROWS, 64] with the number 3, which one warp hands to the others."""
    number = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    rows = gl.allocate_shared_memory(gl.bfloat16, [ROWS, 64], boxes.layout)
    full, empty = make_barriers(1, 1), make_barriers(1, 1)
    fence_async_shared()
    arguments = boxes, number, rows, full, empty
    gl.warp_specialize([(take, arguments), (leave, arguments)], [1], [24])


@triton.jit
def read_kernel(x, y):
    """y = x, [512]."""
    place = tl.arange(0, 512)
    tl.store(y + place, tl.load(x + place))


def control() -> None:
    """Write and read 512 numbers, correctly, in ways that the tools do not follow."""
    x = torch.empty(ROWS.value, 64, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    write_kernel[(1,)](shared_box(x, list(x.shape)), num_warps=4)
    read_kernel[(1,)](x, y)
    assert torch.equal(y.cpu(), torch.full(x.shape, 3, dtype=torch.bfloat16)), y


def lines_of(functions: Iterable[Any], keep: Callable[[str], bool] = lambda line: True) -> set[tuple[str, int]]:
    """(file, line) of the source of kernels' functions, of those lines that `keep` takes."""
    found = set()
    for function in functions:
        name = inspect.getsourcefile(function.fn).rsplit("/", 1)[-1]  # type: ignore[union-attr]
        lines, first = inspect.getsourcelines(function.fn)
        found |= {(name, first + number) for number, line in enumerate(lines) if keep(line)}
    return found


def is_hand_over(line: str) -> bool:
    """Whether a line is where Triton hands work to other warps, or ends it: the kernel's first, that call, its if."""
    return line.startswith(("def ", "    if ")) or "gl.warp_specialize(" in line


SPECIALIZED = [
    *(kernel_sm90.selection_sm90_kernel, query_major_sm90.query_major_sm90_kernel),
    *(key_major_sm90.key_major_sm90_kernel, gradient_sm90.gradient_sm90_kernel),
    given_teacher_sm90.given_teacher_sm90_kernel,
]
ORDERED = [kernel_sm90.write_block, kernel_sm90.await_block, key_major_sm90.hand_over, copies.exchange_rows]
# By tool, the lines whose accesses the compiler makes.
GENERATED = {"racecheck": lines_of(SPECIALIZED, is_hand_over)}
# By tool, the lines whose accesses are ordered by an mbarrier, or read what the bulk copy engine wrote.
UNTRACKED = {
    "racecheck": lines_of(ORDERED),
    "initcheck": lines_of((combine.combine_rows, reduce.sum_slots_kernel, given_teacher_sm90.copy_vectors)),
}


def reports_of(output: str) -> list[str]:
    """The reports in a tool's output.

    >>> start = "========= COMPUTE-SANITIZER\\n========= Error: Race\\n"
    >>> reports_of(start + "=========     and Write\\n========= \\n========= SUMMARY: 1 hazard")
    ['Error: Race\\nand Write']
    """
    text = re.sub(r"^========= COMPUTE-SANITIZER$", "", output, flags=re.MULTILINE)
    text = re.sub(r"^========= ?(.*)$", lambda match: match[1].strip(), text, flags=re.MULTILINE)
    blocks = (block.strip() for block in re.split(r"\n\s*\n", text))
    return [block for block in blocks if re.match(r"(Error: |Warning: |Uninitialized |Invalid |Host API )", block)]


def counted(output: str, tool: str, blind: bool) -> list[str]:
    """The reports that count; blind: the tool reports the control.

    >>> counted("========= Error: Race between Write access at k+0x10 in other.py:12", "racecheck", blind=True)
    ['Error: Race between Write access at k+0x10 in other.py:12']
    """
    aside = GENERATED.get(tool, set()) | (UNTRACKED.get(tool, set()) if blind else set())

    def places(report: str) -> set[tuple[str, int]]:
        return {(name, int(line)) for name, line in re.findall(r"in (\w+\.py):(\d+)", report)}

    found = reports_of(output)
    left = [report for report in found if not places(report) or not places(report) <= aside]
    # Thousands of reads that are set aside fill the tool's memory: that it then drops some says nothing more.
    return [] if len(left) < len(found) and all(OVERFLOW in report for report in left) else left

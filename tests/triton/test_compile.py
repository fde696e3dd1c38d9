"""Build the launches of whole operations for GPUs that need not be present, and check what the compiler says."""

import itertools
import os
import random
import re
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from flexmsa.kernels.triton.common.launch import compile_key, record  # noqa: E402
from flexmsa.kernels.triton.selection.launch import choose_config, select_blocks  # noqa: E402
from flexmsa.testing import launches as recorded  # noqa: E402
from flexmsa.testing.compiled import lone_products, report  # noqa: E402
from flexmsa.testing.launches import TARGETS, TRAINING, CacheFormat, Layer  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

PAGES = CacheFormat(paged=True)
E4M3 = CacheFormat(paged=True, scaled=True, index_dtype=torch.float8_e4m3fn)
INT8 = CacheFormat(paged=True, index_dtype=torch.int8)
M3, LLAMA, SMALL = Layer(), Layer(num_heads=32, num_kv_heads=8), Layer(num_heads=16, num_kv_heads=2, head_dim=64)
# Bytes per thread that a kernel may spill, by kernel; other kernels spill nothing.
SPILLS = {
    # With Triton 3.7 some numbers live through the loops in memory, spilled once, outside the loops.
    "query_major_kernel": 40,
    # On sm_100 and sm_80, numbers of a step, and more of them with a teacher.
    "gradient_kernel": 64,
    # With the teacher, and the addresses of rows that are copied one by one. On an H200, with groups of 4, fewer stages
    # and so fewer numbers take a third more time.
    "gradient_sm90_kernel": 120,
    # Where rows are copied one by one, once per program, before the copies.
    "key_major_sm90_kernel": 8,
    # Numbers of a work item, while its steps run.
    "given_teacher_sm90_kernel": 88,
}
if not triton.__version__.startswith(("3.6.", "3.7.")):
    # With Triton 3.9 more numbers live in memory; nobody has timed it.
    SPILLS |= {"gradient_sm90_kernel": 344, "query_major_kernel": 64, "key_major_kernel": 248, "marked_kernel": 16}
    # No register is spilled, but masks of pairs of bytes are put together in memory.
    SPILLS |= {"choose_kernel": 8}
# What this process has compiled: layers share many kernels.
COMPILED = {}
# What sm_86 runs fits into sm_80, whose shared memory is larger: there, M3's layer and the sample are enough.
OTHERS = [name for name in TARGETS if name != "sm_80"]
ELSEWHERE = [name for name in OTHERS if name != "sm_90"]


def build(launches, target, spills=None):
    """Each distinct kernel of the launches, compiled: it fits the shared memory and spills no more than it may."""
    found = {}
    for launch in launches:
        name, key = launch.kernel.__name__, (target, compile_key(launch))
        if key not in COMPILED:
            compiled = launch.compile(target)
            COMPILED[key] = compiled, report(compiled)
        found[name], says = COMPILED[key]
        assert says.shared <= target.shared_memory, name
        # Columns of tensor memory (sm_100); of a kernel that needs more, the compiler leaves a trap.
        assert (getattr(found[name].metadata, "tmem_size", 0) or 0) <= 512, name
        assert says.spilled <= (SPILLS.get(name, 0) if spills is None else spills), name
    return found


@pytest.fixture(params=OTHERS)
def target(request):
    return TARGETS[request.param]


def check_products(kernels, names):
    """On Hopper these kernels multiply by wgmma, and not all of their products wait for the one before."""
    for name in names:
        compiled = kernels[name]
        assert "wgmma.mma_async" in compiled.asm["ptx"] and "mma.sync" not in compiled.asm["ptx"], name
        products, ends = lone_products(compiled.asm["cubin"])
        assert 0 < ends < products, name


def label(value):
    """A parameter in the name of a test."""
    if isinstance(value, str):
        return value
    sizes = f"{value.num_heads}/{value.num_kv_heads}/{value.head_dim}, blocks of {value.block_size}"
    return f"{sizes}, {str(value.dtype).removeprefix('torch.')}"


# M3's layer on all targets; others on Hopper, and on the newest or AMD's.
TRAINED = [
    *((M3, name) for name in TARGETS),
    *((LLAMA, name) for name in ("sm_90", "sm_100")),
    *((SMALL, name) for name in ("sm_90", "gfx942")),
]


@pytest.mark.parametrize("task", TRAINING)
@pytest.mark.parametrize(("layer", "name"), TRAINED, ids=label)
def test_training(layer, name, task):
    target = TARGETS[name]
    kernels = build(TRAINING[task](layer, target), target)
    if target.arch == 90:
        check_products(kernels, PRODUCTS & kernels.keys())
        assert PRODUCTS & kernels.keys(), kernels.keys()


# Kernels whose time is that of their products, which must be Hopper's asynchronous ones there.
PRODUCTS = {
    *("selection_kernel", "query_major_kernel", "query_major_sm90_kernel", "key_major_kernel", "key_major_sm90_kernel"),
    *("gradient_kernel", "gradient_sm90_kernel", "index_loss_kernel", "block_lse_kernel"),
    *("given_teacher_kernel", "given_teacher_sm90_kernel", "scan_kernel", "again_kernel", "marked_kernel"),
}


@pytest.mark.parametrize(
    ("block_size", "index_head_dim", "name"),
    [(128, 128, "sm_80"), (128, 128, "sm_90"), (128, 128, "gfx942"), (64, 32, "sm_90")],
)
def test_certified_selection(block_size, index_head_dim, name):
    layer, target = Layer(block_size=block_size, index_head_dim=index_head_dim), TARGETS[name]
    given = *layer.index(), layer.sequences(), layer.rule
    with record(target) as launches:
        select_blocks(*given, config=replace(choose_config(*given), certified=True))
    assert launches[0].kernel.__name__ == "quantise_keys_kernel"
    build(launches, target)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(32, 4), (64, 1)], ids=["groups of 8", "groups of 64"])
def test_gluon_kernels(heads, head_dim):
    """On Hopper, with their products in flight: each ends a group, as each is the only one of its warps."""
    layer = Layer(num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, index_head_dim=head_dim)
    target = TARGETS["sm_90"]
    launches = recorded.forward_launches(layer, target) + recorded.joint_backward_launches(layer, target)
    kernels = build(launches, target)
    block = layer.block_size
    # Scores and values: once per half of the warps query-major, once key-major. Backward: five products, in steps with
    # masks and without. Index loss: three.
    expected = {
        "query_major_sm90_kernel": (2 * (head_dim + block) // 16, 4),
        "key_major_sm90_kernel": ((head_dim + block) // 16, 2),
        "gradient_sm90_kernel": (2 * (2 * head_dim + 2 * 64 + block) // 16, 10),
        "given_teacher_sm90_kernel": ((head_dim + 64 + block) // 16, 3),
    }
    assert {name: lone_products(kernels[name].asm["cubin"]) for name in expected} == expected
    # Two programs share a multiprocessor's 228 KiB, of which each takes 1 KiB for itself.
    assert 2 * (kernels["key_major_sm90_kernel"].metadata.shared + 1024) <= 228 << 10


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group_size", [1, 4, 5, 12])
def test_gluon_forward_of_short_entries(group_size, head_dim, block_size):
    """On Hopper, queries come and outputs go in 16 bytes at a time, beside products as those of longer entries."""
    layer = Layer(num_heads=2 * group_size, num_kv_heads=2, head_dim=head_dim, block_size=block_size)
    launches = recorded.forward_launches(layer, TARGETS["sm_90"])
    launches = [launch for launch in launches if launch.kernel.__name__ == "key_major_sm90_kernel"]
    kernel = build(launches, TARGETS["sm_90"])["key_major_sm90_kernel"]
    assert lone_products(kernel.asm["cubin"]) == ((head_dim + block_size) // 16, 2)
    # Four warps copy 64 rows, and write as many.
    copies = 64 * head_dim * 2 // (128 * 16)
    assert kernel.asm["ptx"].count("cp.async.cg.shared.global") == copies
    assert len(re.findall(r"st\.global\S*\.v4\.b32", kernel.asm["ptx"])) == copies
    assert 2 * (kernel.metadata.shared + 1024) <= 228 << 10


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("forward", "key_major_sm90_kernel"),
        ("backward", "gradient_sm90_kernel"),
        ("joint_backward", "given_teacher_sm90_kernel"),
    ],
)
def test_rows_as_far_apart_as_the_bulk_copy_engine_needs(task, name):
    """On Hopper, rows that are multiples of 16 bytes apart, but not of 32, are copied 16 bytes at a time too."""
    copies = []
    for strided in (False, True):
        layer = Layer(num_heads=32, num_kv_heads=8, strided=strided)
        launches = [x for x in TRAINING[task](layer, TARGETS["sm_90"]) if x.kernel.__name__ == name]
        ptx = build(launches, TARGETS["sm_90"])[name].asm["ptx"]
        # cg: 16 bytes; ca: 4 or 8.
        copies.append([ptx.count(f"cp.async.{kind}.shared.global") for kind in ("cg", "ca")])
    assert copies[0] == copies[1] and copies[0][0] > 0


@pytest.mark.parametrize("task", ["forward", "backward", "loss"])
def test_warm_up(target, task):
    build(TRAINING[task](M3, target, dense=True), target)


def test_loss_without_gradient(target):
    build(recorded.loss_launches(M3, target, with_grad=False), target)


@pytest.mark.parametrize("task", TRAINING)
@pytest.mark.parametrize(("fragments", "name"), [*((1, name) for name in OTHERS), (2, "sm_90"), (2, "gfx942")])
def test_packed_documents(name, fragments, task):
    build(TRAINING[task](Layer(packed=True, fragments=fragments), TARGETS[name]), TARGETS[name])


@pytest.mark.parametrize("task", ["forward", "joint_backward", "loss"])
def test_fragments_of_small_groups(task):
    """Rows are gathered otherwise than those of large groups."""
    build(TRAINING[task](replace(LLAMA, fragments=2), TARGETS["sm_90"]), TARGETS["sm_90"])


DECODED = {
    "contiguous": (1, CacheFormat()),
    "pages": (1, PAGES),
    "e4m3": (1, E4M3),
    "int8": (1, INT8),
    "contiguous, int8": (1, CacheFormat(index_dtype=torch.int8)),
    "drafts, e4m3": (16, E4M3),
    "drafts, int8": (16, INT8),
    "chunk, pages": (1024, PAGES),
    "chunk, e4m3": (1024, E4M3),
    "chunk, int8": (1024, INT8),
}
# On Hopper all; elsewhere those that have most of the kernels.
DECODED_ON = [
    *(("sm_90", way) for way in DECODED),
    *((name, way) for name in ELSEWHERE for way in DECODED if way.startswith(("pages", "drafts", "chunk"))),
]


@pytest.mark.parametrize(("name", "way"), DECODED_ON)
def test_decoding(name, way):
    """One token, a few drafts, and a chunk of a prompt, whose kernels are those of training if it is contiguous."""
    target, (tokens, cache) = TARGETS[name], DECODED[way]
    kernels = build(recorded.decode_launches(M3, target, cache, tokens), target)
    if cache.index_dtype == torch.int8:
        # Multiplied as they are, with sums in int32.
        compiled = next(kernel for name, kernel in kernels.items() if name.startswith("selection"))
        product = {90: "wgmma.mma_async.*s32.s8.s8", "gfx942": "v_mfma_i32_.*i8"}.get(
            target.arch, "mma.sync.*s32.s8.s8"
        )
        assert re.search(product, compiled.asm["amdgcn" if target.backend == "hip" else "ptx"])


STORED = {"contiguous": CacheFormat(), "e4m3": E4M3, "int8": INT8}
# On Hopper all; elsewhere two that have most of the kernels.
SCORED = [
    *(("sm_90", *given) for given in itertools.product((2048, 1 << 20), STORED, (1, 16))),
    *((name, 2048, "e4m3", 16) for name in ELSEWHERE),
    *((name, 1 << 20, "int8", 1) for name in ELSEWHERE),
]


@pytest.mark.parametrize(("name", "keys", "stored", "tokens"), SCORED)
def test_scored_blocks(name, keys, stored, tokens):
    """The best blocks with their scores, of caches whose keys are split and of one that is short."""
    target, cache = TARGETS[name], STORED[stored]
    kernels = build(recorded.scored_launches(replace(M3, tokens=keys), target, cache, tokens), target)
    assert "merge_kernel" in kernels


def test_selection_of_e4m3_queries(target):
    kernels = build(recorded.selection_launches(M3, target, torch.float8_e4m3fn), target)
    if target.arch == 90:
        ptx = kernels["selection_kernel"].asm["ptx"]
        assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3" in ptx


@pytest.mark.parametrize("index_head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("cache", [CacheFormat(), E4M3, INT8], ids=["bf16", "pages, e4m3", "pages, int8"])
def test_selection_of_few_queries_on_hopper(index_head_dim, block_size, cache):
    layer = Layer(tokens=1 << 20, index_head_dim=index_head_dim, block_size=block_size)
    kernels = build(recorded.decode_launches(layer, TARGETS["sm_90"], cache), TARGETS["sm_90"])
    assert "wgmma.mma_async" in kernels["selection_sm90_kernel"].asm["ptx"]


# A layer of the grid for every task, on Hopper and on one other target each, and the widest heads in training. A kernel
# for wide heads can take the compiler a minute.
GRID = [layer for layer in recorded.grid() if layer.head_dim <= 128]
NOT_HOPPER = itertools.cycle(name for name in TARGETS if name != "sm_90")
SAMPLE = [
    (task, target, random.Random(f"{task} {target}").choice(GRID))
    for task in recorded.TASKS
    for target in ("sm_90", next(NOT_HOPPER))
] + [(task, "sm_90", Layer(num_heads=8, head_dim=192, index_head_dim=192)) for task in TRAINING]


@pytest.mark.parametrize(("task", "target", "layer"), SAMPLE, ids=label)
def test_a_sample_of_what_the_functions_accept(task, target, layer):
    """`make compile-all` builds the whole grid.

    Known: on sm_90, attention at head dims of 80 to 128 with small blocks spills 536 to 640 bytes per thread, and in
    fp32 at a head dim of 256 with blocks of 16 up to 12 KiB; on sm_86, in fp32 at a head dim of 128, 1464 bytes.
    """
    spills = 1536 if layer.dtype == torch.float32 else 1024
    build(recorded.TASKS[task](layer, TARGETS[target]), TARGETS[target], spills)

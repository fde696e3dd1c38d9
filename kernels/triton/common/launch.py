"""One description of a launch: which kernel, on which grid, with which arguments, constants and options.

`Launch.run` compiles the kernel for the types of its arguments on first use, keeps it, and calls it directly. The types
come from dtypes, alignment and constants alone, never from the value of a length, so nothing is compiled again when
lengths change. Inside `record` launches are collected instead of run: the compile tests, the compiler's report and a
warm-up call the same functions as a user, on meta tensors.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .target import Target, assume_target, target_of

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
DIVISIBLE = [["tt.divisibility", 16]]


class View(NamedTuple):
    """A tensor [B, H, S, D] as one argument of a kernel: the address of its first element, and its strides (elements).

    Kernels take a stride of D that is 1 as a constant. `aligned`: the address and the other strides are multiples of
    16, which lets the compiler load 16 bytes at once.
    """

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_s: Any
    stride_d: Any


class Options(NamedTuple):
    """What the compiler is told beside the constants; max_registers: a limit per thread, for NVIDIA GPUs.

    overlap: the launch begins while the kernel before it ends (programmatic dependent launch).
    """

    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None
    overlap: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The options by Triton's names."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        if self.overlap:
            options["launch_pdl"] = True
        return options


def view(x: torch.Tensor) -> View:
    """The View of a tensor of four dimensions; e4m3 numbers are taken as uint8, which every GPU reads."""
    if x.dtype == torch.float8_e4m3fn:
        x = x.view(torch.uint8)
    return View(x, *x.stride())


def describe(arguments: Iterable[Any], kinds: list[Any], values: list[Any]) -> None:
    """Add what the compiled kernel depends on of each argument to `kinds`, and what it is launched with to `values`.

    Every launch does this: it is written to take little time. Addresses as numbers spare the launcher a question to
    the driver for each tensor.
    """
    for x in arguments:
        kind = type(x)
        if kind is View:
            address = x.ptr.data_ptr()
            kinds += x.ptr.dtype, (address | x.stride_b | x.stride_h | x.stride_s) & 15 == 0, x.stride_d == 1
            values.append((address, *x[1:]))
        elif kind is int or kind is float or x is None:
            kinds.append(kind)
            values.append(x)
        elif isinstance(x, tuple):
            fields: list[Any] = []
            kinds.append(kind)
            describe(x, kinds, fields)
            values.append(tuple(fields))
        elif isinstance(x, torch.Tensor):
            address = x.data_ptr()
            kinds += x.dtype, address & 15 == 0
            values.append(address)
        else:
            kinds += x.base.dtype, tuple(x.block_shape), getattr(x, "layout", None)
            values.append(x)


def signature_of(x: Any, place: tuple[int, ...], constants: dict[tuple[int, ...], Any], attributes: dict) -> Any:
    """Triton's type of the argument at `place`; adds what is constant and what is divisible by 16."""
    if isinstance(x, View):
        dense = x.stride_d == 1
        if (x.ptr.data_ptr() | x.stride_b | x.stride_h | x.stride_s) & 15 == 0:
            attributes |= {(*place, field): DIVISIBLE for field in range(4)}
        if dense:
            constants[*place, 4] = 1
        # Rows lie less than 2^31 elements apart; heads and batches may lie further.
        return View(f"*{TYPES[x.ptr.dtype]}", "i64", "i64", "i32", "constexpr" if dense else "i32")
    if x is None:
        constants[place] = None
        return "constexpr"
    if isinstance(x, (int, float)):
        return "i32" if isinstance(x, int) else "fp32"
    if isinstance(x, torch.Tensor):
        if x.data_ptr() & 15 == 0:
            attributes[place] = DIVISIBLE
        return f"*{TYPES[x.dtype]}"
    if isinstance(x, (TensorDescriptor, GluonDescriptor)):
        layout = f",{x.layout!r}" if isinstance(x, GluonDescriptor) else ""
        return f"tensordesc<{TYPES[x.base.dtype]}{list(x.block_shape)}{layout}>"
    fields = [signature_of(field, (*place, i), constants, attributes) for i, field in enumerate(x)]
    return type(x)(*fields)


class Compiled:
    """A compiled kernel, ready to be launched on the device that was current when it was made."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.run, self.function, self.metadata = kernel.run, kernel.function, kernel.packed_metadata

    def launch(self, grid: tuple[int, int, int], values: list[Any], constants: Iterable[Any]) -> None:
        """Launch on the current stream."""
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if enter.calls or leave.calls:
            # A profiler listens.
            self.kernel[grid](*values, *constants)
            return
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        self.run(*grid, stream, self.function, self.metadata, None, None, None, *values, *constants)


_compiled: dict[Any, Compiled] = {}
_recording: ContextVar[list["Launch"] | None] = ContextVar("recording", default=None)


def choose(implementations: tuple[Any, ...], problem: Any, target: Target, config: Any) -> Any:
    """The first of a folder's implementations that supports a problem; the last one supports all."""
    return next(x for x in implementations if x.supports(problem, target, config))


def num_compiled() -> int:
    """Kernels that this process has compiled, or read from Triton's cache."""
    return len(_compiled)


def compiled_keys() -> set[tuple[Any, ...]]:
    """The `compile_key` of each of these kernels."""
    return {key for _, key in _compiled}


class Launch(NamedTuple):
    """A kernel with all that it is launched with.

    arguments and constants are in the order of the kernel's parameters, by name. An argument is a tensor, a View, an
    int (32 bits), a float, None, a descriptor of the bulk copy engine, or a NamedTuple of such. A constant is known to
    the compiler and hashable; a frozen dataclass gives a kernel its constants by field.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: Options = Options()

    def run(self) -> None:
        """Launch on the current stream of the current device; inside `record`, note the launch instead."""
        launches = _recording.get()
        if launches is not None:
            launches.append(self)
            return
        if knobs.runtime.interpret:
            self.kernel[self.grid](**self.arguments, **self.constants)
            return
        device = torch.cuda.current_device()
        key, values = self.key_and_values()
        compiled = _compiled.get((device, key))
        if compiled is None:
            compiled = _compiled[device, key] = Compiled(self.compile(target_of(torch.device("cuda", device))))
        compiled.launch(self.grid, values, self.constants.values())

    def key_and_values(self) -> tuple[tuple[Any, ...], list[Any]]:
        """All that the compiled kernel depends on, and what it is launched with."""
        kinds: list[Any] = [self.kernel.fn, self.options, *self.constants.values()]
        values: list[Any] = []
        describe(self.arguments.values(), kinds, values)
        return tuple(kinds), values

    def compile(self, target: Target) -> Any:
        """The kernel compiled for a target, which need not be present."""
        names = [*self.arguments, *self.constants]
        assert names == self.kernel.arg_names, f"{self.kernel.__name__}: {names} for {self.kernel.arg_names}"
        constants: dict[tuple[int, ...], Any] = {
            (self.kernel.arg_names.index(name),): value for name, value in self.constants.items()
        }
        attributes: dict[tuple[int, ...], Any] = {}
        signature = {
            name: signature_of(value, (place,), constants, attributes)
            for place, (name, value) in enumerate(self.arguments.items())
        }
        signature |= dict.fromkeys(self.constants, "constexpr")
        source_of = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = source_of(self.kernel, signature, constants, attributes)
        lanes = 64 if target.backend == "hip" else 32
        gpu = GPUTarget(target.backend, target.arch, lanes)
        return triton.compile(source, target=gpu, options=self.options.as_dict())


def compile_key(launch: Launch) -> tuple[Any, ...]:
    """All that the compiled kernel of a launch depends on: launches of equal keys share it."""
    return launch.key_and_values()[0]


@contextlib.contextmanager
def record(target: Target) -> Iterator[list[Launch]]:
    """Collect the launches of what this thread calls inside, on meta tensors, as they would be made on `target`."""
    launches: list[Launch] = []
    token = _recording.set(launches)
    try:
        with assume_target(target):
            yield launches
    finally:
        _recording.reset(token)


def on_meta(x: Any, keys: int | None = None) -> Any:
    """A contiguous meta tensor like x, with `keys` in place of its third dimension if given; None for None."""
    if x is None:
        return None
    shape = x.shape if keys is None else (*x.shape[:2], keys, *x.shape[3:])
    return torch.empty(shape, dtype=x.dtype, device="meta")


def compile_ahead(calls: Iterable[Callable[[], object]]) -> None:
    """Compile what these calls on meta tensors launch, side by side, for the current device; launches nothing."""
    if knobs.runtime.interpret or _recording.get() is not None:
        return
    device = torch.cuda.current_device()
    target = target_of(torch.device("cuda", device))
    with record(target) as launches:
        for call in calls:
            call()
    missing = {compile_key(launch): launch for launch in launches}
    missing = {key: launch for key, launch in missing.items() if (device, key) not in _compiled}
    with ThreadPoolExecutor() as pool:
        kernels = pool.map(lambda launch: launch.compile(target), missing.values())
        for key, kernel in zip(missing, kernels, strict=True):
            _compiled[device, key] = Compiled(kernel)

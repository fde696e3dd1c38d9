"""One description of a launch: which kernel, on which grid, with which arguments, constants and options.

`Launch.run` compiles the kernel for the types of its arguments on first use, keeps it, and calls it directly. The types
come from dtypes, alignment and constants alone, never from the value of a length, so nothing is compiled again when
lengths change. Inside `record` launches are collected instead of run: the compile tests and the compiler's report call
the same functions as a user, on meta tensors. `compile_ahead` compiles side by side what it has recorded, for a warm-up
and for the first launch of a step that is `expected`.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar, Token
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from .compiled import Compiled, Source, begin_to_hash, begin_to_prepare, compile_alone, compile_sources
from .target import Target, assume_target, target_of

TYPES = {
    torch.float64: "fp64",
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


if not knobs.runtime.interpret:
    # While the kernels are imported.
    begin_to_hash()


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
        # From Triton 3.10 on, products are added in one rounding only where this is asked for.
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
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
            # The launcher would cut an int to 32 bits without a word.
            assert kind is not int or -0x80000000 <= x < 0x80000000, f"a kernel's argument: expected 32 bits, got {x}"
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


_compiled: dict[Any, Compiled] = {}
_begun: set[Hashable] = set()
_recording: ContextVar[Any] = ContextVar("recording", default=None)
_is_ahead: ContextVar[bool] = ContextVar("is_ahead", default=False)
_step: ContextVar[Callable[[], object] | None] = ContextVar("step", default=None)


def choose(implementations: tuple[Any, ...], problem: Any, target: Target, config: Any) -> Any:
    """The first of a folder's implementations that supports a problem; the last one supports all."""
    return next(x for x in implementations if x.supports(problem, target, config))


class expected:
    """Inside, the first launch of a kernel that is not compiled yet compiles all that `step()` launches, side by side.

    `step` is called only then, with its launches recorded. The outermost step counts. A class, as every call of an
    operator enters it.
    """

    __slots__ = ("step", "token")

    def __init__(self, step: Callable[[], object]) -> None:
        self.step = step

    def __enter__(self) -> None:
        self.token: Token | None = _step.set(self.step) if _step.get() is None else None

    def __exit__(self, *error: object) -> None:
        if self.token is not None:
            _step.reset(self.token)


def is_ahead() -> bool:
    """Whether launches are recorded to be compiled ahead: then also record those that other lengths need."""
    return _is_ahead.get()


@contextlib.contextmanager
def for_one_length() -> Iterator[None]:
    """Inside, `is_ahead` is False: record what the length at hand needs."""
    token = _is_ahead.set(False)
    try:
        yield
    finally:
        _is_ahead.reset(token)


def compile_other_lengths(key: Hashable) -> None:
    """Compile the expected step for all lengths, unless one with this key was: others may have compiled its start."""
    step = _step.get()
    if step is None or key in _begun or knobs.runtime.interpret or _recording.get() is not None:
        return
    if not torch.cuda.is_current_stream_capturing():
        _begun.add(key)
        compile_ahead([step])


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

    def run(self) -> tuple[Compiled, list[Any]] | None:
        """Launch on the current stream of the current device; inside `record`, note the launch instead.

        Returns what was launched: the compiled kernel, and the values of its arguments.
        """
        launches = _recording.get()
        if launches is not None:
            launches.append(self)
            return None
        if knobs.runtime.interpret:
            self.kernel[self.grid](**self.arguments, **self.constants)
            return None
        device = torch.cuda.current_device()
        key, values = self.key_and_values()
        compiled = _compiled.get((device, key)) or self.compile_first(device, key)
        compiled.launch(self.grid, values, self.constants.values())
        return compiled, values

    def compile_first(self, device: int, key: tuple[Any, ...]) -> Compiled:
        """Compile this kernel, and with it those of the expected step."""
        step = _step.get()
        if step is not None and not torch.cuda.is_current_stream_capturing():
            compile_ahead([step])
        if (device, key) not in _compiled:
            _compiled[device, key] = compile_alone(self.source(), target_of(torch.device("cuda", device)))
        return _compiled[device, key]

    def key_and_values(self) -> tuple[tuple[Any, ...], list[Any]]:
        """All that the compiled kernel depends on, and what it is launched with."""
        kinds: list[Any] = [self.kernel.fn, self.options, *self.constants.values()]
        values: list[Any] = []
        describe(self.arguments.values(), kinds, values)
        return tuple(kinds), values

    def compile(self, target: Target) -> Any:
        """The kernel compiled for a target, which need not be present."""
        return self.source().compile(target)

    def source(self) -> "Source":
        """What to compile."""
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
        return Source(
            self.kernel.__name__, source_of(self.kernel, signature, constants, attributes), self.options.as_dict()
        )


class Missing:
    """In place of a list of recorded launches: what to compile of those that are not compiled for a device.

    Without their arguments, whose memory would add up over a step.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.sources: dict[Any, Source] = {}

    def append(self, launch: Launch) -> None:
        """Note what is new of a launch."""
        key = self.device, compile_key(launch)
        if key not in _compiled and key not in self.sources:
            self.sources[key] = launch.source()


def compile_key(launch: Launch) -> tuple[Any, ...]:
    """All that the compiled kernel of a launch depends on: launches of equal keys share it."""
    return launch.key_and_values()[0]


@contextlib.contextmanager
def record(target: Target, into: Any = None) -> Iterator[Any]:
    """Collect the launches of what this thread calls inside, on meta tensors, as they would be made on `target`.

    They are appended to a list, or to `into`.
    """
    launches: Any = [] if into is None else into
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


def compile_ahead(
    calls: Iterable[Callable[[], object]], report: Callable[[int, int, str], object] = lambda done, total, name: None
) -> int:
    """Compile what these calls launch, and would launch for other lengths, side by side, for the current device.

    Nothing is launched. The number of kernels is returned, and `report` called with how many are done, of how many, and
    the newest one's name. A kernel that does not compile is left out: it raises if it is launched.
    """
    if knobs.runtime.interpret or _recording.get() is not None:
        return 0
    device = torch.cuda.current_device()
    target = target_of(torch.device("cuda", device))
    begin_to_prepare(target)
    token = _is_ahead.set(True)
    try:
        with torch.no_grad(), record(target, Missing(device)) as missing:
            for call in calls:
                call()
    finally:
        _is_ahead.reset(token)
    _compiled.update(compile_sources(missing.sources, device, target, report))
    return len(missing.sources)

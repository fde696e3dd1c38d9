"""How an operator is made: `torch.library.Library`, one level below `torch.library.custom_op`.

The first call of a custom_op imports the compiler, which takes seconds, and each call costs the host twice as much.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _after_autograd_keyset, _AutoDispatchBelowAutograd
from torch._C._dynamo import eval_frame
from torch.autograd.graph import increment_version

from .autocast import autocast_rule

LIBRARY = torch.library.Library("flexmsa", "DEF")

Function = Callable[..., Any]


def operator(
    schema: str,
    *,
    fake: Function,
    backward: Function | None = None,
    setup_context: Function | None = None,
    has_gradient: bool = True,
    cast: int | None = None,
) -> Callable[[Function], torch._ops.OpOverload]:
    """Make the decorated function, which serves every device, an operator of flexmsa.

    Args:
        schema: name, arguments and results, as torch.library reads them; "(a!)" marks arguments that are written.
        fake: the results for tensors without values.
        backward, setup_context: as for `torch.library.register_autograd`. Without them, a backward raises.
        has_gradient: False for results that never have a gradient, such as ids: the call then costs half.
        cast: how many of the first arguments autocast casts; None without a rule for autocast.
    """

    def define(function: Function) -> torch._ops.OpOverload:
        name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        op = getattr(torch.ops.flexmsa, name).default
        torch.library.register_fake(op, fake, lib=LIBRARY)
        if has_gradient:
            LIBRARY.impl(op, untraced(function), "CompositeExplicitAutograd")
            LIBRARY.impl(op, untraced(_autograd_rule(op, backward, setup_context)), "Autograd", with_keyset=True)
        else:
            LIBRARY.impl(op, untraced(_without_gradient(op, function)), "CompositeExplicitAutograd")
            LIBRARY.impl(op, torch.library.fallthrough_kernel, "Autograd")
        if cast is not None:
            for device in ("cpu", "cuda"):
                LIBRARY.impl(op, untraced(autocast_rule(op, device, cast)), f"Autocast{device.upper()}")
        return op

    return define


def untraced(function: Function) -> Function:
    """Keep torch.compile out of the function and of all that it calls; `torch.compiler.disable` would import it."""
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function


def _autograd_rule(op: torch._ops.OpOverload, backward: Function | None, setup_context: Function | None) -> Function:
    """What `torch.library.register_autograd` registers, but for default values, which take it most of a call's time."""

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        with _AutoDispatchBelowAutograd():
            results = op.redispatch(keyset & _after_autograd_keyset, *inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, results)
        return results

    def differentiate(ctx: Any, *grads: Any) -> Any:
        if backward is None:
            raise RuntimeError(
                f"{op} has no gradient: second derivatives (create_graph=True) are not supported; backend='reference' "
                "has them"
            )
        return *backward(ctx, *grads), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    gradient: Any = type(f"flexmsa_{op._opname}_", (torch.autograd.Function,), methods)

    def rule(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            # Read for each call, because `Function.apply` raises about itself in these cases.
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(
                    f"{op}: torch.func transforms (grad, vjp, jacrev, ...) are not supported; use backward() or "
                    "torch.autograd.grad, or backend='reference'"
                )
            return gradient.apply(*args, keyset)
        return op.redispatch(keyset & _after_autograd_keyset, *args)

    return rule


def _without_gradient(op: torch._ops.OpOverload, function: Function) -> Function:
    """The function under no_grad; autograd hears of the arguments that it writes, so that a backward of them raises."""
    written = [place for place, x in enumerate(op._schema.arguments) if x.alias_info and x.alias_info.is_write]

    def run(*args: Any) -> Any:
        if written:
            increment_version([args[n] for n in written if args[n] is not None and not args[n].is_inference()])
        if not torch.is_grad_enabled():
            return function(*args)
        with torch.no_grad():
            return function(*args)

    return run

"""How an operator is made: `torch.library.Library`, one level below `torch.library.custom_op`.

The first call of a custom_op imports the compiler, which takes seconds, and every call costs the host twice as much.
"""

from collections.abc import Callable
from typing import Any

import torch
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
            LIBRARY.impl(op, function, "CompositeExplicitAutograd")
            rule = backward or _refuse(name)
            torch.library.register_autograd(op, rule, setup_context=setup_context, lib=LIBRARY)
        else:
            LIBRARY.impl(op, _without_gradient(function, op), "CompositeExplicitAutograd")
            LIBRARY.impl(op, torch.library.fallthrough_kernel, "Autograd")
        if cast is not None:
            for device in ("cpu", "cuda"):
                LIBRARY.impl(op, autocast_rule(op, device, cast), f"Autocast{device.upper()}")
        return op

    return define


def _without_gradient(function: Function, op: torch._ops.OpOverload) -> Function:
    """The function under no_grad; autograd hears of the arguments that it writes, so that a backward of them raises."""
    written = [place for place, x in enumerate(op._schema.arguments) if x.alias_info and x.alias_info.is_write]

    def run(*args: Any) -> Any:
        if written:
            increment_version([args[n] for n in written if args[n] is not None and not args[n].is_inference()])
        with torch.no_grad():
            return function(*args)

    return run


def _refuse(name: str) -> Function:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name} has no gradient: call it with detached tensors, or under torch.no_grad()")

    return backward

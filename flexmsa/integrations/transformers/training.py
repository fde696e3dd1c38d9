"""The two phases that train a converted model: as functions for any training loop, and as a Trainer callback.

Phase 1, the warm-up: the base is frozen, its attention is dense, and the index branches learn from the KL divergence
over all visible keys. Phase 2: the selection is on, and all weights train on

    model's own loss + index_loss_weight * sum over layers of KL

In training mode, `outputs.loss` of a converted model has the gradient of this sum. In phase 1 only the KL has one. The
backward computes the KL, so the value of `outputs.loss` is the model's own loss; `log_entries` returns both.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from flexmsa.integrations.transformers.convert import conversion_of, set_warm_up
from flexmsa.integrations.transformers.data_parallel import is_sharded_flat, prepare_shards, renew_shards
from flexmsa.integrations.transformers.health import LayerHealth
from flexmsa.integrations.transformers.index_branch import INDEX_MODULES, first_adapted, is_index_weight

__all__ = [
    "ConversionCallback",
    "begin_sparse",
    "begin_warm_up",
    "check_optimizer",
    "clip_gradients",
    "log_entries",
    "parameter_groups",
]

# The names by which wrappers hold the module inside.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# The attribute of TrainingArguments with the user's max_grad_norm inside a step. Not of the callback: after an
# interrupted step the next run may have another one.
_MAX_GRAD_NORM = "_flexmsa_max_grad_norm"


def begin_warm_up(model: nn.Module) -> None:
    """Enter phase 1: dense attention, and only the index weights train."""
    model = _inside_wrappers(model)
    _check_adapters(model)
    conversion = conversion_of(model)
    set_warm_up(model, True)
    # Here too, as a compiled forward cannot.
    prepare_shards(model, returns_losses=True)
    for name, parameter in _named_parameters(model):
        if is_index_weight(name):
            parameter.requires_grad_(True)
        elif parameter.requires_grad:
            parameter.requires_grad_(False)
            conversion.frozen.add(name)


def begin_sparse(model: nn.Module) -> None:
    """Enter phase 2: sparse attention, and the weights that `begin_warm_up` froze train again.

    Raises:
        ValueError: such a weight is not in the model any more.
    """
    model = _inside_wrappers(model)
    conversion = conversion_of(model)
    found = dict(_named_parameters(model))
    lost = sorted(conversion.frozen - found.keys())
    if lost:
        raise ValueError(
            f"model: expected the {len(conversion.frozen)} weights that begin_warm_up froze, but {len(lost)} are not "
            f"in it, such as {lost[0]}; add or merge adapters, and shard by FSDP1, before begin_warm_up or after "
            "begin_sparse"
        )
    set_warm_up(model, False)
    for name in conversion.frozen:
        found[name].requires_grad_(True)
    if conversion.frozen:
        renew_shards(model)
    conversion.frozen.clear()


def _check_adapters(model: nn.Module) -> None:
    """Raise if PEFT adapts the model without the index weights, which train all the same."""
    if first_adapted(model) is None:
        return
    raw = next((name for name, _ in _named_parameters(model) if name.split(".")[-2] in INDEX_MODULES), None)
    if raw is not None:
        raise ValueError(
            f"model: expected index branches that PEFT saves, got {raw} outside its modules; give PEFT's "
            "configuration modules_to_save=[*INDEX_MODULES]"
        )


def _inside_wrappers(model: nn.Module) -> nn.Module:
    """Return the converted model inside wrappers that hand on its attributes: torch.compile's, FSDP's, PEFT's."""
    conversion = conversion_of(model)
    return next(module for module in model.modules() if module.__dict__.get("flexmsa") is conversion)


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the converted model by their names without wrappers; FSDP2 replaces the parameters."""
    for name, parameter in _inside_wrappers(model).named_parameters(remove_duplicate=False):
        yield ".".join(part for part in name.split(".") if part not in _WRAPPERS), parameter


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return all parameters for one optimizer of both phases: the base, then the index weights.

    Call it once, before or after `begin_warm_up`: an optimizer skips weights without a gradient.
    """
    branches: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        branches[is_index_weight(name)].append(parameter)
    return [{"params": branches[False]}, {"params": branches[True]}]


def clip_gradients(model: nn.Module, max_norm: float) -> tuple[Tensor, Tensor]:
    """Clip the gradients of the base and of the index weights separately, so that neither loss scales the other's step.

    Gradients may be sharded by FSDP2, tensor parallel, or both: call it on every process.

    Returns:
        The norms of both before clipping, of whole gradients.
    """
    base, index = (_clip(group["params"], max_norm) for group in parameter_groups(model))
    return base, index


def _clip(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip as `clip_grad_norm_`, which takes DTensors of one mesh, or plain tensors, but not both."""
    by_placement: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            placement = getattr(parameter.grad, "device_mesh", None), getattr(parameter.grad, "placements", None)
            by_placement.setdefault(placement, []).append(parameter)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in by_placement.values()]  # type: ignore[misc]
    if not norms:
        return torch.zeros(())
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack([norm.to(whole[0].device) for norm in whole]))
    for group in by_placement.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, *, resumed: bool = False) -> None:
    """Raise if an index branch would not train, or would not continue its earlier training.

    Args:
        optimizer: the optimizer of both phases.
        resumed: whether its state was loaded from a checkpoint of a conversion.

    Raises:
        ValueError: a parameter is not in the optimizer, index weights are frozen, or their state is missing.
    """
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    conversion = conversion_of(model)
    _check_adapters(model)
    parameters = list(_named_parameters(model))
    index = [(name, parameter) for name, parameter in parameters if is_index_weight(name)]
    frozen = [name for name, parameter in index if not parameter.requires_grad]
    _refuse(frozen, "index weights that train, got frozen ones", "call begin_warm_up or begin_sparse")
    trained = [(name, p) for name, p in parameters if p.requires_grad or name in conversion.frozen]
    outside = [name for name, parameter in trained if parameter not in known]
    _refuse(outside, "every weight that a phase trains, got one without some", "make it after convert, before freezing")
    if resumed and not _keeps_no_state(optimizer):
        stateless = [name for name, parameter in index if parameter not in optimizer.state]
        _refuse(stateless, "the state of the index weights, got none", "resume from a checkpoint of this conversion")


def _keeps_no_state(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether this is SGD without momentum."""
    # accelerate, and therefore Trainer, wraps the optimizer.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups)


def _refuse(names: list[str], expected: str, advice: str) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"optimizer: expected {expected}: {names[0]}{more}; {advice}")


def log_entries(model: nn.Module, group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """Return the results of the last forward pass in training mode and of its backward, for a log.

    Args:
        group: processes to average over, such as `torch.distributed.group.WORLD`; each of them must call it. What some
            of them lack, such as lm_loss without labels, is an average over the others.

    Returns:
        lm_loss; kl, the sum over the layers, and kl/layer_N, NaN before the backward. If `model.flexmsa.with_health`
            was set: block_recall and score_recall, means over the layers, of the index branch, of an untrained branch,
            and of a window of as many blocks; block_recall/layer_N and score_recall/layer_N.
    """
    conversion = conversion_of(model)
    report = conversion.report
    lm_loss, index_losses, health = report.lm_loss, report.index_losses, report.health
    entries: dict[str, float] = {}
    if lm_loss is not None:
        entries["lm_loss"] = lm_loss.item()
    if index_losses is not None:
        by_layer = index_losses.tolist()
        entries["kl"] = sum(by_layer)
        entries |= {f"kl/layer_{layer}": kl for layer, kl in zip(conversion.layers, by_layer, strict=True)}
    if health:
        entries |= _recalls(conversion.layers, health)
    if group is None:
        return entries
    # By name: a process whose rows had no labels has no lm_loss.
    found: list[dict[str, float]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(found, entries, group)
    values = {name: [each[name] for each in found if name in each] for name in dict.fromkeys(chain(*found))}
    return {name: sum(each) / len(each) for name, each in values.items()}


def _recalls(layers: Iterable[int], health: tuple[LayerHealth, ...]) -> dict[str, float]:
    entries: dict[str, float] = {}
    for kind in ("block", "score"):
        for name, suffix in (("learned", ""), ("untrained", "_untrained"), ("window", "_window")):
            recalls = [getattr(getattr(layer, name), kind).item() for layer in health]
            entries[f"{kind}_recall{suffix}"] = sum(recalls) / len(recalls)
            if name == "learned":
                entries |= {f"{kind}_recall/layer_{n}": x for n, x in zip(layers, recalls, strict=True)}
    return entries


class ConversionCallback(TrainerCallback, ExportableState):
    """Both phases of a conversion in one run of `transformers.Trainer`, on a model that `convert` made.

    It freezes and unfreezes weights, switches the selection on, clips the gradients of the base and of the index
    branches separately, and adds `log_entries`, averaged over all processes, to every log, with the norms before
    clipping as grad_norm/base and grad_norm/index. Each gradient is clipped to `TrainingArguments.max_grad_norm`; with
    fp16, FSDP1 or DeepSpeed, whose gradients the callback cannot read, Trainer clips both jointly. A run that resumes
    from a checkpoint of either phase continues as without the interruption.

    Args:
        warm_up_steps: optimizer steps of phase 1; the rest of the run is phase 2.
        index_loss_weight: factor of the sum over layers of the KL.
    """

    def __init__(self, warm_up_steps: int, index_loss_weight: float = 1.0) -> None:
        self.warm_up_steps, self.index_loss_weight = warm_up_steps, index_loss_weight
        self._settings: dict[str, Any] = {}
        self._clips = False
        self._norms: tuple[Tensor, Tensor] | None = None

    def state(self) -> dict[str, Any]:
        """Return the entry of trainer_state.json, which is checked when a run resumes."""
        arguments = {"warm_up_steps": self.warm_up_steps, "index_loss_weight": self.index_loss_weight}
        return {"args": arguments, "attributes": {"_settings": self._settings}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter the phase of the next step, and check the optimizer and the resumed settings."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        conversion = conversion_of(model)
        # An earlier run may have been interrupted inside a step.
        self._leave_step(args, model)
        stored = model.config.get_text_config().flexmsa
        self._settings = {name: value for name, value in stored.items() if name not in ("warm_up", "fallback")}
        if state.global_step > 0:
            callbacks: Any = state.stateful_callbacks
            self._compare(callbacks.get(type(self).__name__))
        conversion.index_loss_weight = self.index_loss_weight
        self._enter(model, state.global_step)
        check_optimizer(model, optimizer, resumed=state.global_step > 0)
        self._clips = not (args.fp16 or args.deepspeed or is_sharded_flat(model))

    def _compare(self, before: dict[str, Any] | None) -> None:
        if before is None:
            raise ValueError("resume_from_checkpoint: expected a run with a ConversionCallback, got one without")
        now = self.state()
        there, here = (x["args"] | x["attributes"]["_settings"] for x in (before, now))
        changed = [
            f"{name} is {there.get(name)} there and {here[name]} here" for name in here if there.get(name) != here[name]
        ]
        if changed:
            raise ValueError(f"resume_from_checkpoint: expected a run with the same settings, but {'; '.join(changed)}")

    def _enter(self, model: nn.Module, step: int) -> None:
        (begin_warm_up if step < self.warm_up_steps else begin_sparse)(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch to phase 2 before its first step; measure the steps that are logged; stop Trainer's clipping."""
        model = kwargs["model"]
        if state.global_step == self.warm_up_steps:
            begin_sparse(model)
        step, every = state.global_step + 1, max(1, int(state.logging_steps))
        conversion_of(model).with_health = step % every == 0 or (step == 1 and args.logging_first_step)
        # Trainer clips right before on_pre_optimizer_step. Only for the step, since checkpoints store the arguments.
        if self._clips and args.max_grad_norm > 0:
            setattr(args, _MAX_GRAD_NORM, args.max_grad_norm)
            args.max_grad_norm = 0.0

    def _leave_step(self, args: TrainingArguments, model: nn.Module) -> None:
        """Stop measuring, so that evaluations are not measured, and restore Trainer's clipping."""
        conversion_of(model).with_health = False
        # After an interrupted step the user may have set another.
        args.max_grad_norm = args.max_grad_norm or vars(args).get(_MAX_GRAD_NORM, 0.0)
        vars(args).pop(_MAX_GRAD_NORM, None)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip the gradients."""
        if _MAX_GRAD_NORM in vars(args):
            args.max_grad_norm = vars(args).pop(_MAX_GRAD_NORM)
            self._norms = clip_gradients(kwargs["model"], args.max_grad_norm)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the step before Trainer evaluates or saves."""
        self._leave_step(args, kwargs["model"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the entries to the log and to the history in checkpoints."""
        if logs is not None and "loss" in logs:
            entries = log_entries(kwargs["model"], dist.group.WORLD if dist.is_initialized() else None)
            if self._norms is not None:
                entries |= {
                    f"grad_norm/{part}": x.item() for part, x in zip(("base", "index"), self._norms, strict=True)
                }
            logs.update(entries)
            state.log_history[-1].update(entries)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave a step that another callback stopped between its micro-batches."""
        self._leave_step(args, kwargs["model"])

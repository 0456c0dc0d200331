"""ZeRO by DeepSpeed: the optimiser's state, gradients and weights in shards, on the devices or in the machine's memory.

Rajbhandari et al., 2020, ZeRO (arXiv 1910.02054); Ren et al., 2021, ZeRO-Offload (arXiv 2101.06840). The optimiser is
torch's AdamW over DeepSpeed's fp32 partitions, with offload too, so no operator is compiled. Frozen weights keep
their dtype beside adapters in fp32; a full fine-tuning in bf16 uses DeepSpeed's bf16 with fp32 masters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from agentft.distributed.engines import ShardedEngine, blocks_of, sharded_dtype, wanted_dtype, whole_shape
from agentft.model.labelled_loss import LabelledLoss, causal_model
from agentft.runtime import World
from agentft.training.checkpoint import TensorSpec, TensorStream
from agentft.training.config import TrainingConfig

_STEP = "step"
"""The one slot of AdamW that is a number: DeepSpeed keeps it once for a whole partition."""


class DeepSpeedEngine(ShardedEngine):
    """A DeepSpeed engine with the loop's rules: sums over ranks, its micro-batches, its clipping, its checkpoints."""

    name = "deepspeed"

    def __init__(
        self,
        objective: LabelledLoss,
        config: TrainingConfig,
        *,
        world: World,
        settings: Mapping[str, Any],
        fp16: bool = False,
        frozen: torch.dtype | None = None,
    ) -> None:
        deepspeed, dtype = _import_deepspeed(), sharded_dtype(objective)
        self.stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        # Before weights are cut into shards, which makes all of them vectors: decay is for matrices.
        super().__init__(objective, config, fp16=fp16, world=world)
        if self.stage == 3:
            # Blocks are gathered whole, since our layers read weights without calling the modules that own them.
            deepspeed.utils.set_z3_leaf_modules(objective, [type(blocks_of(self.model, self.name)[0])])
            # It lets go of a block's weights once the gradient of its input is there; above frozen embeddings the first
            # block would have none, and lose its weights before its backward pass.
            causal_model(self.model).get_input_embeddings().register_forward_hook(_require_gradient)
        configuration = _configuration(settings, config, dtype)
        _cast(objective, dtype or torch.float32, frozen, cut_by=configuration if self.stage == 3 else None)
        self.objective, *_ = deepspeed.initialize(
            model=objective, optimizer=self.optimizer, config=configuration, dist_init_required=False
        )
        self._zero: Any = self.objective.optimizer
        self._api: Any = deepspeed.utils
        self._gathered: Any = deepspeed.zero.GatheredParameters

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        # DeepSpeed multiplies the loss by it, and takes it out again when it clips; `backward` multiplies by the ranks.
        self._zero.loss_scaler.cur_scale = self._divisor()
        self.objective.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, share: torch.Tensor) -> None:
        # DeepSpeed takes the mean over ranks; the step's loss is a sum, whose denominator all ranks share already.
        self.objective.backward(share * self.world.size, scale_wrt_gas=False)

    def clip(self, limit: float) -> torch.Tensor:
        # The limit stands in DeepSpeed's configuration, which clips in `step`.
        groups = self._zero._get_norm_groups() if self.stage == 3 else None
        norm = torch.linalg.vector_norm(torch.stack(list(groups))) if groups else self._zero.scaled_global_norm()
        norm = torch.as_tensor(norm) / self._divisor()
        # It is -1 where a gradient is not finite.
        invalid = norm < 0 if groups is None else torch.stack(list(groups)).min() < 0
        norm = torch.where(invalid, torch.full_like(norm, torch.nan), norm)
        self._scale.check(norm)
        return norm

    def _divisor(self) -> float:
        """Return what the mean over ranks of the gradients is to be divided by.

        Under fp16 the loss goes through the model at the size that it has on one process, so that the same steps overflow.
        """
        return self._scale.factor / self.world.size if self._scale.enabled else 1.0

    def step(self) -> None:
        if not self._scale.finite:
            self.zero_grad()
            return
        self.objective.step()
        self._scale.update()

    def zero_grad(self) -> None:
        self._scale.update()
        self._zero.zero_grad(set_to_none=True)
        gradients = self._zero.averaged_gradients
        for group in list(gradients):
            gradients[group] = None

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        offload = self._zero.parameter_offload
        # With the hooks in place each pass would gather weights, and ranks that answer different questions make
        # different numbers of passes.
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            for parameter in self.model.parameters():
                parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
            with self._gathered(list(self.model.parameters())):
                yield
        finally:
            # DeepSpeed sets its hooks up in its constructor alone.
            offload._register_deepspeed_module(offload.module)

    def optimizer_state(self) -> TensorStream:
        self._link()
        slots = sorted({slot for state in self.optimizer.state.values() for slot in state} - {_STEP})
        steps = [state[_STEP] for state in self.optimizer.state.values() if _STEP in state]
        wanted = {f"{name}.{slot}": (p, slot) for name, p in self._trained().items() for slot in [*slots, _STEP]}

        def gather(key: str) -> torch.Tensor:
            parameter, slot = wanted[key]
            whole: torch.Tensor = (
                steps[0] if slot == _STEP else self._api.safe_get_full_optimizer_state(parameter, slot)
            )
            return whole.view(specs[key].shape)

        specs = {
            key: TensorSpec(torch.float32, () if slot == _STEP else whole_shape(parameter))
            for key, (parameter, slot) in wanted.items()
        }
        return TensorStream(specs, gather)

    def load(
        self, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
    ) -> None:
        kept, states = self._take_up(weights, optimizer, settings)
        self._make_room(states)
        for name, parameter in kept.items():
            value = weights[name].to(self.objective.device)
            with torch.no_grad(), self._gathered([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.data.copy_(value)
            self._api.safe_set_full_fp32_param(parameter, value)
            for slot, tensor in states.get(name, {}).items():
                if slot != _STEP:
                    self._api.safe_set_full_optimizer_state(parameter, tensor.to(self.objective.device), slot)

    def _make_room(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Make the state that AdamW makes in its first step, for `load` to fill."""
        if not states:
            return
        slots = next(iter(states.values()))
        zero = self._zero
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            self.optimizer.state[flat] = {
                slot: tensor.clone() if slot == _STEP else torch.zeros_like(flat) for slot, tensor in slots.items()
            }
        self._link()

    def _link(self) -> None:
        """Tie parameters to their places in the flat states. DeepSpeed does so after the first group's first update, when
        the states of further groups are not there yet."""
        if self.stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._link_all_hp_params()
            self._zero._lazy_init_hp_params_optimizer_state()

    def _stream(self, tensors: Mapping[str, Any]) -> TensorStream:
        def gather(name: str) -> torch.Tensor:
            parameter: nn.Parameter = tensors[name]
            if parameter.requires_grad:
                whole: torch.Tensor = self._api.safe_get_full_fp32_param(parameter)
                return whole.view(specs[name].shape)
            with self._gathered([parameter], enabled=self.stage == 3):
                return parameter.detach().clone()

        specs = {
            name: TensorSpec(torch.float32 if parameter.requires_grad else parameter.dtype, whole_shape(parameter))
            for name, parameter in tensors.items()
        }
        return TensorStream(specs, gather)


def _configuration(settings: Mapping[str, Any], config: TrainingConfig, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the user's keys, and those that the training loop decides."""
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        **settings,
        # Micro-batches, their weights and the end of a step are the loop's.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": dtype is torch.bfloat16},
        **({"communication_data_type": "fp32"} if dtype is torch.bfloat16 else {}),
    }


def _import_deepspeed() -> Any:
    """Import DeepSpeed quietly and let it use the connections that are there.

    On a CPU it would compile collectives over shared memory at this point; gloo has them already.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed import comm

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not comm.is_initialized():
        comm.init_distributed(dist_init_required=False)
    return deepspeed


def _require_gradient(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _cast(
    objective: LabelledLoss, trained: torch.dtype, frozen: torch.dtype | None, *, cut_by: Mapping[str, Any] | None
) -> None:
    """Cast the weights as loaded to what they are kept in; with `cut_by`, stage 3's configuration, block by block.

    A block is then cut into shards before the next one is cast. Where nothing is to be cast DeepSpeed cuts by itself,
    parameter by parameter; but on a CPU it writes rank 0's values over each, which would copy the mapped file page by page.
    """
    written_over = cut_by is not None and not torch.cuda.is_available()
    if not written_over and all(wanted_dtype(p, trained, frozen) is p.dtype for p in objective.parameters()):
        return
    from deepspeed import zero

    for module in [*blocks_of(objective.model, "deepspeed"), objective]:
        whole = [p for p in module.parameters() if not hasattr(p, "ds_id")]
        for parameter in whole:
            parameter.data = parameter.data.to(wanted_dtype(parameter, trained, frozen), copy=written_over)
        if cut_by is not None and whole:
            cut: Any = next((p for p in objective.parameters() if hasattr(p, "ds_id")), None)
            if cut is None:
                zero.Init(module=module, config_dict_or_path=dict(cut_by))
            else:
                cut.convert_to_zero_parameters(param_list=whole)
    if cut_by is not None:  # DeepSpeed moves no module whose parameters are cut already
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        for buffer in objective.buffers():
            buffer.data = buffer.data.to(device)

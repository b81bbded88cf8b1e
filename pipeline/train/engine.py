"""DeepSpeed behind a few calls. This is the only file that knows how ZeRO cuts the weights.

`Engine.shards` says, at every ZeRO stage, which slice of which parameter's fp32 master this rank owns and where the slice
lies in the optimizer. The teacher, the checkpoints and the export are written against shards, so they know neither a ZeRO
stage nor a world size.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.train.config import EngineConfig, OptimConfig, computed_stage
from pipeline.train.deepspeed_config import deepspeed_config
from pipeline.train.distributed import World, average_over_ranks, gather_uneven, limit_collectives, sum_over_ranks
from pipeline.train.muon import Muon, over_shards
from pipeline.train.optim import Trainable, make_optimizer, moments_of
from pipeline.train.shard import Shard


class Engine:
    """A model under training. A loss calls `Engine.model`; gradients are averaged over ranks and micro-batches.

    Args:
        model: The network, whole and on any device.
        world: The processes.
        optim: The optimizer's settings.
        config: How the work is distributed; `self.config` has the ZeRO stage that is computed.
        micro_batch: Samples of the first stream that a process computes at once.
        accumulation: Micro-batches per optimizer step.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        optim: OptimConfig,
        config: EngineConfig,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        import deepspeed

        config = config.model_copy(update={"zero_stage": computed_stage(config.zero_stage, world.size)})
        self.world, self.config = world, config
        if config.activation_checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        if config.compile:
            model.compile()  # in place: the names of the weights stay
        optimizer = make_optimizer(cast(Trainable, model), optim)
        self.moments = moments_of(model, optimizer)
        if isinstance(optimizer, Muon):
            optimizer.orthogonalise = over_shards(self)
        self._deepspeed, self._optimizer, *_ = deepspeed.initialize(
            model=model.to(world.device),
            optimizer=optimizer,
            config=deepspeed_config(optim, config, micro_batch, accumulation),
        )
        limit_collectives(config.timeout_seconds)
        self.model: nn.Module = self._deepspeed
        if config.zero_stage in (1, 2) and not config.offload_optimizer:
            self._optimizer.get_grad_norm_direct = self._norm_of_partition
        if config.zero_stage == 0:
            self._reduce = self._deepspeed.buffered_allreduce_fallback
            self._deepspeed.buffered_allreduce_fallback = self._average_gradients
        self.base_optimizer: torch.optim.Optimizer = optimizer
        self._clip_norm = optim.clip_norm
        if self._clip_norm:  # before a teacher adds its hooks: a pull by the gradient is not clipped
            optimizer.register_step_pre_hook(self._clip)
        self.named_parameters = [(n, p) for n, p in self._deepspeed.module.named_parameters() if p.requires_grad]
        self.shards = self._find_shards()
        self._clear_padding()
        self.replicated = config.zero_stage == 0 or world.size == 1
        self._norm = torch.zeros(())
        self._layout: list[list[tuple[str, int, int]]] | None = None

    @property
    def module(self) -> nn.Module:
        """The bare module. Evaluations run it, in fp32 whatever the precision of training."""
        return self._deepspeed.module

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Trained parameter -> its shape, however it is cut."""
        return {name: full_shape(p) for name, p in self.named_parameters}

    @property
    def num_weights(self) -> int:
        """Number of trained weights of the whole model, however they are cut."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 tensors that this rank's optimizer steps: flat partitions under ZeRO 1 to 3, whole parameters under ZeRO 0."""
        return list({id(shard.flat): shard.flat for shard in self.shards}.values())

    def precision(self) -> AbstractContextManager[Any]:
        """Return a context with the compute precision, also for forward passes outside of `model`."""
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's loss."""
        self._deepspeed.backward(loss)

    def step(self, lr: float, step: int = 0) -> bool:
        """Count one micro-batch, and update the weights after the last one of the accumulation.

        Args:
            lr: Learning rate of the step, before layer decay.
            step: Number of the optimizer step, for layers that join later (`optim.unfreeze_every`).

        Returns:
            Whether the weights moved: false between updates, and for a skipped update.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"] if step >= group["joins"] else 0.0
        before = self._deepspeed.skipped_steps
        boundary = self._deepspeed.is_gradient_accumulation_boundary()
        if boundary and self.config.zero_stage == 0:  # DeepSpeed keeps no norm there
            gradients = [p.grad for _, p in self.named_parameters if p.grad is not None]
            self._norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        self._deepspeed.step()
        return bool(boundary) and self._deepspeed.skipped_steps == before

    def grad_norm(self) -> float:
        """Return the global norm of the gradient at the last update, before clipping."""
        return float(self._norm if self.config.zero_stage == 0 else self._deepspeed.get_global_grad_norm())

    def _norm_of_partition(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], _: float = 2.0) -> Tensor:
        """Return the norm of a group's gradients over all ranks (collective).

        It stands in for DeepSpeed's own, which launches three kernels for each parameter and copies a number from the host.
        """
        own = [g for g in gradients if not getattr(g, "_zero_padding", False)][: len(parameters)]
        norms = torch._foreach_norm(own, 2, dtype=torch.float32) if own else [torch.zeros((), device=self.world.device)]
        total = torch.stack(list(norms)).square().sum()
        sum_over_ranks(total)
        return total.sqrt()

    def _average_gradients(self, grads: None = None, elements_per_buffer: int = 0) -> None:
        """Average the gradients over the ranks (collective); a weight that had no part in the loss gets a gradient of zeros.

        It stands in for DeepSpeed's own, which copies all gradients into one tensor and back, on one process too.
        """
        for _, parameter in self.named_parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if not average_over_ranks([p.grad for _, p in self.named_parameters]):
            self._reduce(grads, elements_per_buffer)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Clip the gradients of one call of the optimizer; DeepSpeed calls it group by group, and would wait for each."""
        norm: Tensor = self._norm if self.config.zero_stage == 0 else self._optimizer._global_grad_norm
        factor = 1.0 / ((norm + 1e-6) / self._clip_norm).clamp(min=1.0)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))

    def weight_norm(self) -> float:
        """Return the global norm of the fp32 weights, which is not finite if a weight is not (collective)."""
        squares = [torch.linalg.vector_norm(shard.of(shard.flat)).square() for shard in self.shards]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self.world.device)
        return float(self.all_reduce(total).sqrt())

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum a value over the owners of shards; where every rank holds everything it is returned as it is."""
        if self.replicated:
            return value
        on_device = value.to(self.world.device)  # NCCL reduces no tensors in the host's memory
        sum_over_ranks(on_device)
        return on_device.to(value.device)

    def gather(self, tensors: Mapping[Tensor, Tensor] | None, into: Mapping[str, Tensor]) -> None:
        """Assemble whole parameters from the ranks' shards (collective).

        Args:
            tensors: Master -> a tensor of its layout; None for the masters themselves.
            into: Name of a parameter -> the tensor that receives it, for some parameters or all. The bytes travel in
                the dtype of the receivers.
        """
        dtype = next(iter(into.values())).dtype
        shards = [shard for shard in self.shards if shard.name in into]
        if self.config.zero_stage == 0:  # whole parameters, so nothing is cut or put together
            whole = [(shard.flat if tensors is None else tensors[shard.flat]).detach() for shard in shards]
            torch._foreach_copy_([into[shard.name] for shard in shards], whole)
            return
        own = [shard.of(shard.flat if tensors is None else tensors[shard.flat]) for shard in shards]
        if self.replicated:
            sources, places = own, [(shard.name, shard.start, shard.numel) for shard in shards]
        else:
            layout = [[shard for shard in rank if shard[0] in into] for rank in self._gathered_layout()]
            flat = torch.cat([o.to(dtype) for o in own]) if own else torch.empty(0, dtype=dtype)
            rows = gather_uneven(flat.to(self.world.device), [sum(numel for *_, numel in rank) for rank in layout])
            places = [place for rank in layout for place in rank]
            sources = []
            for row, rank in zip(rows, layout, strict=True):
                if rank:  # a rank may own none of these
                    sources += row.split([numel for *_, numel in rank])
        with torch.no_grad():  # one call: a kernel for each of hundreds of small parameters would keep the host busy
            receivers = [into[name].view(-1)[start : start + numel] for name, start, numel in places]
            torch._foreach_copy_(receivers, sources)

    def buffers(self) -> dict[str, Tensor]:
        """Return the running statistics and all else that the model saves beside its weights, equal on all ranks."""
        weights = dict(self.module.named_parameters())
        return {name: value for name, value in self.module.state_dict().items() if name not in weights}

    def full_weights(self) -> dict[str, Tensor]:
        """Return the whole state dict on the CPU, parameters from the fp32 masters (collective; all ranks get it)."""
        full = {name: torch.empty(shape, device=self.world.device) for name, shape in self.shapes.items()}
        self.gather(None, full)
        # ZeRO-3 also cuts the frozen parameters (fixed position embeddings), and no optimizer has masters of them.
        frozen = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        with self._whole(frozen.values()):
            fixed = {name: p.detach().cpu().clone() for name, p in frozen.items()}
        return fixed | {name: value.cpu().clone() for name, value in {**self.buffers(), **full}.items()}

    def _whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        """While inside, parameters that ZeRO-3 has cut are whole on every rank (collective)."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), enabled=self.config.zero_stage == 3)

    def restore(
        self,
        read: Callable[[str, str, int, int], Tensor],
        optimizer_step: float,
        kinds: Mapping[str, Mapping[Tensor, Tensor]],
    ) -> None:
        """Restore masters, moments, every extra kind, and the copies that compute (collective).

        Where every rank holds everything, rank 0 reads it and sends it to the others.

        Args:
            read: (kind, name, start, numel) -> elements (numel,) of a saved whole parameter.
            optimizer_step: What `optimizer_step` returned.
            kinds: Name of an extra kind -> {master: the tensor to fill}.
        """
        state, moments = self.base_optimizer.state, set(itertools.chain.from_iterable(self.moments.values()))
        layouts: dict[str, dict[Tensor, Tensor]] = {"master": {flat: flat for flat in self.masters}}
        for flat, name in {shard.flat: shard.name for shard in self.shards}.items():
            state.pop(flat, None)
            if optimizer_step:
                state[flat] = {moment: torch.zeros_like(flat.detach()) for moment in self.moments[name]}
                for moment, values in state[flat].items():
                    layouts.setdefault(moment, {})[flat] = values
                if "exp_avg_sq" in state[flat]:
                    state[flat]["step"] = torch.tensor(optimizer_step, device=flat.device)  # where fused AdamW keeps it
        for kind, tensors in {**layouts, **kinds}.items():
            shards = [shard for shard in self.shards if kind not in moments or shard.flat in tensors]
            own = [shard.of(tensors[shard.flat]) for shard in shards]
            if self.world.is_main or not self.replicated:
                for shard, values in zip(shards, own, strict=True):
                    values.copy_(read(kind, shard.name, shard.start, shard.numel))
            if self.replicated and self.world.size > 1:
                flat = torch.cat(own)
                dist.broadcast(flat, src=0)
                for values, sent in zip(own, flat.split([len(values) for values in own]), strict=True):
                    values.copy_(sent)
        self.refresh_weights()

    def optimizer_step(self) -> float:
        """Return AdamW's own count of updates, without skipped ones; 1 for what counts none, once it has a momentum."""
        known = [self.base_optimizer.state.get(flat, {}) for flat in self.masters]
        count = next((state["step"] for state in known if "step" in state), None)
        return float(any(value is not None for state in known for value in state.values()) if count is None else count)

    def close(self) -> None:
        """Release DeepSpeed; this must happen before the process group ends, or ZeRO-3 may abort at exit."""
        self._deepspeed.destroy()

    def _find_shards(self) -> list[Shard]:
        stage, zero = self.config.zero_stage, self._optimizer
        shards = []
        for name, p in self.named_parameters:
            if stage == 0:
                shards.append(Shard(name, 0, p.numel(), p, 0))
            elif stage in (1, 2):
                if (mapping := p._hp_mapping) is not None:
                    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                    owned, lies = mapping.lp_fragment_address, mapping.hp_fragment_address
                    shards.append(Shard(name, owned.start, owned.numel, flat, lies.start))
            else:
                group, offset, padded = zero.grad_position[zero.get_param_id(p)]
                start = self.world.rank * padded  # every rank's partition has the same, padded, length
                numel = min(padded, p.ds_numel - start)
                if numel > 0:
                    shards.append(Shard(name, start, numel, zero.fp32_partitioned_groups_flat[group], offset))
        return shards

    def _clear_padding(self) -> None:
        """Set the padding of flat tensors to zero.

        DeepSpeed pads a rank's slice of a parameter with uninitialised memory, by chance a huge number or a NaN, which
        would count in every norm over a whole flat tensor. The padding's gradient is zero, so it stays zero.
        """
        for flat in self.masters:
            own = sorted((shard.offset, shard.offset + shard.numel) for shard in self.shards if shard.flat is flat)
            ends, starts = [0, *(end for _, end in own)], [*(start for start, _ in own), flat.numel()]
            for end, start in zip(ends, starts, strict=True):
                flat.detach().view(-1)[end:start].zero_()

    def refresh_weights(self) -> None:
        """Bring the weights that compute up to date; under ZeRO 1 to 3 they are copies of the masters (collective)."""
        if self.config.zero_stage in (1, 2):
            self.gather(None, {name: p.data for name, p in self.named_parameters})
        elif self.config.zero_stage == 3:
            own = {shard.name: shard for shard in self.shards}
            for name, p in self.named_parameters:
                if name in own:
                    p.ds_tensor.data[: own[name].numel].copy_(own[name].of(own[name].flat))
            persistent = self._optimizer.persistent_parameters
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)

    def _gathered_layout(self) -> list[list[tuple[str, int, int]]]:
        if self._layout is None:
            self._layout = [[] for _ in range(self.world.size)]
            dist.all_gather_object(self._layout, [(s.name, s.start, s.numel) for s in self.shards])
        return self._layout


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the unpartitioned parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)

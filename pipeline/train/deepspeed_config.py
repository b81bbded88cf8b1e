"""The whole of DeepSpeed's config, made of ours."""

from typing import Any

import torch

from pipeline.train.config import EngineConfig, OptimConfig


def deepspeed_config(optim: OptimConfig, config: EngineConfig, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """Return the whole DeepSpeed config; it states what matters, since defaults surprise (DeepSpeed clips at 1.0)."""
    elements = config.bucket_bytes // 4
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "round_robin_gradients": False,
        # cuDNN reads four numbers at a time from where a weight begins. Without this, a parameter behind one of nine numbers
        # ended a run on a GPU with a misaligned address. DeepSpeed applies it at ZeRO 1 and 2 only.
        "parameter_alignment": True,
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": config.keep_whole,
            "stage3_prefetch_bucket_size": elements,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
            "sub_group_size": 10**12,  # a group is stepped at once, since Muon gathers its matrices
        }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # the engine clips
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps what is offloaded too
        # Unless it is told here, DeepSpeed switches off an autocast around its forward. No module is on the list of those
        # whose gradients travel in bf16.
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
    }

"""What a GRACE run does with each field of `transformers.TrainingArguments`: works, refused with a reason, or no effect.

GRACE replaces Trainer's loss, its order of samples and its final save, so some fields would be accepted and then do nothing.
Each field of the released transformers has an entry in `ARGUMENTS`; a test compares the names with the installed version. A
field that the installed version has and the table lacks is refused when it is given, because nobody has checked it; a field
that the installed version lacks is an unknown name there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["ARGUMENTS", "DEFAULTS", "NEEDS", "SCHEDULE_FREE_DEFAULTS", "Rule"]

#: defaults of train() that differ from Trainer's own
DEFAULTS: dict[str, Any] = {
    "save_strategy": "no",
    "logging_steps": 10,
    "lr_scheduler_type": "cosine",
    # a share of the steps, as everything below 1
    "warmup_steps": 0.05,
    "logging_nan_inf_filter": False,
    "report_to": "none",
}

#: transformers hands `warmup_steps` to these optimizers as it is, and a share of 0.05 multiplies the first step's rate by 20
#: there; averaging replaces the schedule
SCHEDULE_FREE_DEFAULTS: dict[str, Any] = {"lr_scheduler_type": "constant", "warmup_steps": 0}


@dataclass(frozen=True)
class Rule:
    """What happens with a field.

    status: "works"; "refused" for any value but Trainer's default and `accepted`; "no effect" by nature, whatever its value.
    reason: why, and what to do instead. values: single values of a field that works, each refused with its reason.
    low, high: bounds of a number; above: a bound that is excluded. extra: one more value, outside of the bounds.
    """

    status: Literal["works", "refused", "no effect"]
    reason: str = ""
    accepted: tuple[Any, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    low: float | None = None
    above: float | None = None
    high: float | None = None
    extra: Any = None


def _refused(reason: str, *accepted: Any) -> Rule:
    return Rule("refused", reason, accepted)


_NO_EVALUATION = (
    "train() takes no evaluation set and evaluates nothing; score the checkpoint of the run, or its resume states"
)
_NO_UPLOAD = (
    "it would upload the run folder with its raw float32 weights and never the checkpoint; upload the verified checkpoint "
    "after the run: hf upload NAME OUTPUT_DIR"
)
_OWN_ORDER = (
    "the order of samples is a hash of seed, epoch and number, grouped by length, the same for any number of processes"
)
_WHOLE = "it shards the student, and GRACE trains with a whole student in every process"
_IN_BACKWARD = (
    "it steps in the backward pass, where gradients of quantized weights are not complete and no step can be skipped"
)
_STEPS_IN_BACKWARD = (
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
    "lomo",
    "adalomo",
)

#: fields that work with any value of their type
_WORKS = """
    lr_scheduler_kwargs optim_args optim_target_modules bf16 tf32 gradient_checkpointing gradient_checkpointing_kwargs
    logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    skip_memory_metrics save_on_each_node restore_callback_states_from_checkpoint full_determinism use_cpu
    ddp_find_unused_parameters ddp_broadcast_buffers ddp_backend dataloader_drop_last dataloader_pin_memory
    dataloader_persistent_workers dataloader_multiprocessing_context train_sampling_strategy
""".split()

_EVALUATION = """
    eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval
    load_best_model_at_end metric_for_best_model greater_is_better do_eval do_predict
""".split()

_HUB = """
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
""".split()

ARGUMENTS: dict[str, Rule] = {
    **dict.fromkeys(_WORKS, Rule("works")),
    **dict.fromkeys(_EVALUATION, _refused(_NO_EVALUATION)),
    **dict.fromkeys(_HUB, _refused(_NO_UPLOAD)),
    # ---- length, batch, rate
    "output_dir": _refused("train() has its own output_dir; Trainer's files go to <output_dir>.run"),
    "per_device_train_batch_size": Rule("works", low=1),
    "num_train_epochs": Rule("works", above=0),
    "max_steps": Rule("works", low=1, extra=-1),
    "learning_rate": Rule("works", low=0),
    "lr_scheduler_type": Rule("works", values=dict.fromkeys(("reduce_lr_on_plateau", "greedy"), _NO_EVALUATION)),
    "warmup_steps": Rule("works", low=0),
    "optim": Rule("works", values=dict.fromkeys(_STEPS_IN_BACKWARD, _IN_BACKWARD)),
    "weight_decay": Rule("works", low=0),
    "adam_beta1": Rule("works", low=0, high=1),
    "adam_beta2": Rule("works", low=0, high=1),
    "adam_epsilon": Rule("works", low=0),
    "gradient_accumulation_steps": Rule("works", low=1),
    "max_grad_norm": Rule("works", low=0),
    "auto_find_batch_size": _refused(
        "the length of the run must be known before it starts; set per_device_train_batch_size and gradient_accumulation_steps"
    ),
    # ---- loss
    "average_tokens_across_devices": _refused("the loss is always a mean over the supervised tokens of all devices"),
    "label_smoothing_factor": _refused("GRACE computes its own loss, whose soft targets are the teacher's"),
    "neftune_noise_alpha": Rule("works", above=0),
    # ---- precision, memory, speed
    "fp16": _refused(
        "its loss scaling skips steps on purpose, which GRACE counts as non-finite ones; use bf16, or neither"
    ),
    "torch_compile": _refused(
        "even with a backend that changes no kernel, a compiled student ends the run with other weights"
    ),
    "torch_compile_backend": _refused("it turns on torch_compile, which is refused"),
    "torch_compile_mode": _refused("it turns on torch_compile, which is refused"),
    "use_liger_kernel": _refused("it replaces layers of the student; GRACE has its own fused head and losses"),
    "liger_kernel_config": _refused("use_liger_kernel is refused"),
    "use_cache": _refused("a training step has no use for a key-value cache"),
    "torch_empty_cache_steps": Rule("works", low=1),
    # ---- logs
    "logging_steps": Rule("works", above=0),
    "debug": _refused("its hooks would stay on the student; non-finite steps are skipped, counted and logged", "", []),
    "do_train": Rule("no effect", "a flag for scripts, which Trainer itself does not read"),
    # ---- resume states
    "save_strategy": Rule("works", values={"best": _NO_EVALUATION}),
    "save_steps": Rule("works", above=0),
    "save_total_limit": Rule("works", low=1),
    "save_only_model": _refused(
        "it leaves out optimizer and schedule, and a resumed run would start both again; save_total_limit bounds the space "
        "that resume states take"
    ),
    "enable_jit_checkpoint": _refused(
        "the run would end at the signal and save its unfinished weights as the checkpoint; use save_strategy=steps"
    ),
    "ignore_data_skip": _refused(
        "a resumed run goes on at its sample, so that it ends with the bits of an uninterrupted run"
    ),
    "resume_from_checkpoint": _refused("it is an argument of train() itself"),
    # ---- seeds
    "seed": Rule("works", low=0, high=2**32 - 1),
    "data_seed": Rule("works", low=0, high=2**32 - 1),
    # ---- devices
    "accelerator_config": _refused(
        "accumulation is gradient_accumulation_steps, and how batches are dealt to processes is GRACE's own", {}
    ),
    "parallelism_config": _refused(_WHOLE),
    "local_rank": _refused("the launcher (torchrun, accelerate launch) decides it"),
    "ddp_bucket_cap_mb": Rule("works", low=1),
    "ddp_static_graph": _refused("a micro-batch without images uses other parameters than one with images", False),
    "ddp_timeout": Rule("works", low=1),
    "fsdp": _refused(_WHOLE, "", []),
    "fsdp_config": _refused(_WHOLE, {}),
    "deepspeed": _refused(_WHOLE),
    # ---- data
    # of each rank; a zero too many would start enough processes to fill the machine's memory
    "dataloader_num_workers": Rule("works", low=0, high=256),
    "dataloader_prefetch_factor": Rule("works", low=1),
    "dataloader_in_order": _refused("without it the speed of workers decides the order of batches, and no seed"),
    "remove_unused_columns": _refused("samples are not columns of the model's forward; it is always False", False),
    "label_names": _refused('labels are made by the collator; it is always ["labels"]', ["labels"]),
    "length_column_name": _refused(f"lengths are measured, not read from a column: {_OWN_ORDER}"),
}

_STATES = ("save_strategy", ("steps", "epoch"), "save_strategy=steps or epoch")
_WORKERS = ("dataloader_num_workers", None, "dataloader_num_workers of at least 1")
_TRACKIO = ("report_to", ("trackio", "all"), "report_to=trackio")

#: a field that does nothing unless another one has one of these values (None: any but its empty one), and that in words
NEEDS: dict[str, tuple[str, tuple[Any, ...] | None, str]] = {
    "save_steps": ("save_strategy", ("steps",), "save_strategy=steps"),
    "save_total_limit": _STATES,
    "save_on_each_node": _STATES,
    "logging_steps": ("logging_strategy", ("steps",), "logging_strategy=steps"),
    "dataloader_prefetch_factor": _WORKERS,
    "dataloader_persistent_workers": _WORKERS,
    "dataloader_multiprocessing_context": _WORKERS,
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", None, "gradient_checkpointing=True"),
    "run_name": ("report_to", None, "report_to"),
    "project": _TRACKIO,
    "trackio_space_id": _TRACKIO,
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
}

"""Make the model of each method in the demo's table, all from the same bundled student.

Round-to-nearest and GPTQ come from llm-compressor. The fine-tuned student uses the same Trainer, steps, batches and data
without teacher and without quantization. QAT + plain KL adds learned scales, the same teacher and standard distillation
(`plain.PlainObjective`) in place of GRACE's terms. GRACE is the recipe in recipes/. Every quantized model is scored after being
reloaded from disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader

from examples.bundled_demo.plain import PlainObjective
from examples.bundled_demo.scenes import TRAINING_SEED, training_samples
from examples.bundled_demo.score import Encoded
from examples.bundled_demo.shared import SharedTeacher
from grace_plugin.data import ConversationCollator
from grace_plugin.export.write import rewrite_ignore
from grace_plugin.modifier import GraceModifier
from grace_plugin.run import TrainResult, train
from grace_plugin.run.inputs import grace_modifier, read_recipe
from grace_plugin.upstream import oneshot
from grace_plugin.vlm import family_of

__all__ = [
    "ASSETS",
    "Budget",
    "fine_tune",
    "grace",
    "load_model",
    "low_bit_groups",
    "plain_kl",
    "post_training",
    "scored_model",
]

ASSETS = Path(__file__).parent / "assets"
TEACHER, STUDENT = ASSETS / "teacher", ASSETS / "student"
GROUP = 128


class Budget:
    """Steps, batch size and learning rate of the runs, which all see the same questions in the same order, each once.

    For cross-entropy alone 5e-4 and 1e-3 are equally good, 2e-3 is worse (benchmarks/results/demo_pilot.md).
    """

    steps = 200
    batch_size = 128
    learning_rate = 1.0e-3
    warmup_steps = 30
    seed = 0
    data_seed = TRAINING_SEED
    calibration_samples = 512


def arguments() -> dict[str, Any]:
    """Return the TrainingArguments of a demo run."""
    return {
        "max_steps": Budget.steps,
        "warmup_steps": Budget.warmup_steps,
        "learning_rate": Budget.learning_rate,
        "seed": Budget.seed,
        "per_device_train_batch_size": Budget.batch_size,
        "data_seed": Budget.seed,
        "logging_steps": 25,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_num_workers": 0,
        "adam_beta2": 0.99,
        "disable_tqdm": True,
    }


def low_bit_groups(bits: int) -> dict[str, Any]:
    """Return the config_groups of symmetric integer weights of `bits` bits in groups of GROUP."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def load_model(folder: Path, dtype: Any = "auto", attention: str | None = None) -> Any:
    """Load a checkpoint, in its stored dtype by default; packed layers are decompressed in the first forward pass."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def load_to_train(folder: Path, dtype: Any) -> Any:
    """Load a model for a training run: on a CPU with eager attention.

    For two dozen tokens torch's fused attention is slower there, its backward pass 1.6 times in float32.
    """
    return load_model(folder, dtype, None if torch.cuda.is_available() else "eager")


def multiplies_bfloat16() -> bool:
    """Return whether bfloat16 products are fast here: on a GPU, and on a CPU with instructions for them.

    An x86 processor with plain AVX-512 computes them in software, 4.6 times slower than float32; without AVX-512 11 times.
    """
    if torch.cuda.is_available():
        return True
    x86 = torch.cpu._is_avx2_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (not x86 or torch.cpu._is_avx512_bf16_supported())


def scored_model(folder: Path, encoded: Encoded, wide: bool | None = None) -> Any:
    """Load a model for scoring; wide: in float32 (default: where bfloat16 is slow); encoded: any batch, for one forward
    pass.
    """
    model = load_model(folder)
    wide = not multiplies_bfloat16() if wide is None else wide
    return in_float32(model, encoded) if wide else model


def serving_dtype() -> str:
    """Return the `--dtype` for vLLM: the stored one where it has an INT4 kernel, float32 where weights are made dense."""
    return "auto" if torch.cuda.is_available() or torch.cpu._is_avx512_supported() else "float32"


@torch.no_grad()
def in_float32(model: Any, encoded: Encoded) -> Any:
    """Cast the model to float32, value for value."""
    # Packed layers are decompressed by their first forward pass; a cast before it would leave them in bfloat16.
    model(**{k: v[:1].bfloat16() if v.is_floating_point() else v[:1] for k, v in encoded.inputs.items()})
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def read_modifier(recipe: Path, bits: int) -> GraceModifier:
    """Return the GraceModifier of a recipe file, with groups of `bits` bits in place of its scheme where that is not 4."""
    asked = grace_modifier(read_recipe(recipe))
    if bits == 4:
        return asked
    fields = asked.model_dump(exclude={"scheme", "config_groups", "index", "group"})
    own = {key: value for key, value in fields.items() if not key.endswith("_") and value is not None}
    return GraceModifier(**own, config_groups=low_bit_groups(bits))


def grace(recipe: Path, bits: int, output_dir: Path, callbacks: Sequence[Any] = (), *, shared: Path) -> TrainResult:
    """Train the bundled student with GRACE under its teacher and write a verified checkpoint.

    The teacher's bfloat16 weights are multiplied in float32 where bfloat16 is slow. shared: folder of the teacher's states,
    which runs on the same batches share.
    """
    return _distilled(read_modifier(recipe, bits), output_dir, callbacks, shared)


def plain_kl(bits: int, output_dir: Path, callbacks: Sequence[Any] = (), *, shared: Path) -> TrainResult:
    """Train the same student under the same teacher by mean CE + mean KL * T^2 with learned scales, nothing else of GRACE.

    Learning rate, steps and temperature are GRACE's; its weight, 1, was not searched. The recipe in its checkpoint has the
    blocks that are switched off, and does not say that KL replaced the decoupled divergence.
    """
    modifier = GraceModifier(
        targets=["Linear"],
        config_groups=low_bit_groups(bits),
        distill={"gate_sharpness": 0.0},
        relational={"enabled": False},
        controller={"enabled": False, "beta_start": 1.0},
    )
    modifier.use_objective(PlainObjective)
    return _distilled(modifier, output_dir, callbacks, shared)


def _distilled(modifier: GraceModifier, output_dir: Path, callbacks: Sequence[Any], shared: Path) -> TrainResult:
    """Train the bundled student by a modifier under the bundled teacher, whose states are shared between runs."""
    samples = training_samples(Budget.data_seed, Budget.steps * Budget.batch_size)
    teacher = SharedTeacher(load_to_train(TEACHER, "auto" if multiplies_bfloat16() else torch.float32), shared)
    return train(
        load_to_train(STUDENT, torch.float32),
        recipe=modifier,
        teacher=teacher,
        dataset=samples,
        output_dir=output_dir,
        callbacks=callbacks,
        **arguments(),
    )


def fine_tune(output_dir: Path, callbacks: Sequence[Any] = ()) -> TrainResult:
    """Train the student on the same samples with cross-entropy alone and save it in BF16."""
    off = {"enabled": False}
    modifier = GraceModifier(quantize=False, distill=off, relational=off, controller=off)
    samples = training_samples(Budget.data_seed, Budget.steps * Budget.batch_size)
    return train(
        load_to_train(STUDENT, torch.float32),
        recipe=modifier,
        dataset=samples,
        output_dir=output_dir,
        callbacks=callbacks,
        **arguments(),
    )


def post_training(method: str, bits: int, output_dir: Path, processor: Any) -> Path:
    """Quantize the student by llm-compressor, round-to-nearest ("rtn") or "gptq", and save it as compressed-tensors."""
    model = load_model(STUDENT)
    patterns = family_of(model).quantization_ignore()
    options: dict[str, Any] = {"config_groups": low_bit_groups(bits), "ignore": patterns}
    if method == "gptq":
        samples: Any = list(training_samples(Budget.data_seed, Budget.calibration_samples))
        collator = ConversationCollator(processor)
        loader: Any = DataLoader(samples, batch_size=8, collate_fn=lambda part: _without_labels(collator(part)))
        oneshot(model=model, recipe=GPTQModifier(**options), dataset=loader, processor=processor, pipeline="basic")
    else:
        oneshot(model=model, recipe=QuantizationModifier(**options), processor=processor)
    model.save_pretrained(str(output_dir), save_compressed=True)
    rewrite_ignore(output_dir, model, patterns)
    processor.save_pretrained(output_dir)
    return output_dir


def _without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}

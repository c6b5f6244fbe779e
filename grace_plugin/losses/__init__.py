"""What the student is trained on: gated decoupled distillation and relational alignment. Pure torch, float32, nats."""

from grace_plugin.losses.distill import confidence_gate, decoupled_kd, full_precision
from grace_plugin.losses.fused_head import HeadOutput, distillation_head, teacher_gates
from grace_plugin.losses.fused_head_chunks import Head, cut, positions_per_chunk
from grace_plugin.losses.relational import RelationalOutput, countable_images, linear_cka, relational_loss

__all__ = [
    "Head",
    "HeadOutput",
    "RelationalOutput",
    "confidence_gate",
    "countable_images",
    "cut",
    "decoupled_kd",
    "distillation_head",
    "full_precision",
    "linear_cka",
    "positions_per_chunk",
    "relational_loss",
    "teacher_gates",
]

"""What the student is trained on: gated decoupled distillation and relational alignment. Pure torch, float32, nats."""

from grace_plugin.losses.distill import confidence_gate, decoupled_kd
from grace_plugin.losses.head import HeadOutput, distillation_head, teacher_gates
from grace_plugin.losses.relational import RelationalOutput, countable_images, linear_cka, relational_loss

__all__ = [
    "HeadOutput",
    "RelationalOutput",
    "confidence_gate",
    "countable_images",
    "decoupled_kd",
    "distillation_head",
    "linear_cka",
    "relational_loss",
    "teacher_gates",
]

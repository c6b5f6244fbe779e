"""A cap in the decoder's config reaches cross-entropy, distillation and gates; transformers' Gemma 3 itself leaves it out."""

from __future__ import annotations

import pytest

from tests.objective.parts import Set
from tests.pairs import mixed_samples


@pytest.mark.slow
def test_cross_entropy__softcap__of_capped_logits() -> None:
    made = Set("gemma3")
    batch = made.collate(mixed_samples(4))
    losses = []
    for cap in (None, 0.5):
        for model in (made.student, made.teacher):
            model.config.text_config.final_logit_softcapping = cap
        made.grace.begin_step([batch])
        made.grace.compute_loss(made.student, batch)
        record = made.grace.reduce_metrics()
        logits = made.student(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1, : made.size]
        logits = logits if cap is None else cap * (logits / cap).tanh()
        wanted = batch["labels"][:, 1:]
        kept = wanted != -100
        own = logits[kept].log_softmax(-1).gather(1, wanted[kept][:, None]).neg().mean().item()
        assert record.ce == pytest.approx(own, rel=2e-6)
        losses.append((record.ce, record.gdkd, record.gate_mean))
    assert all(abs(a - b) > 1e-2 * abs(a) for a, b in zip(*losses, strict=True))

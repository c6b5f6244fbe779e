"""The two heads with cross-entropy and gated distillation, against their matrix products, plain torch and Liger-Kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.speed.timing import extra_gib, graphed, median_ms, paired_ms
from grace_plugin.losses import decoupled_kd, distillation_head, teacher_gates
from grace_plugin.losses import fused_head_chunks as chunks

__all__ = ["chunks_by_turns", "head"]


class _Case:
    """Random hidden states and heads whose logits have a standard deviation of 2, in the type that trains."""

    def __init__(
        self, tokens: int, vocabulary: int, student: int, teacher: int, device: str, dtype: torch.dtype
    ) -> None:
        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        self.vocabulary = vocabulary
        self.hidden_s = draw(tokens, student).requires_grad_()
        self.weight_s = draw(vocabulary, student, scale=2 / student**0.5).requires_grad_()
        self.hidden_t = draw(tokens, teacher)
        self.weight_t = draw(vocabulary, teacher, scale=2 / teacher**0.5)
        self.targets = torch.randint(vocabulary, (tokens,), device=device)
        self.gate, _, self.teacher_logsumexp = self.gates()
        self.scales = {"ce_weight": 1.0 / tokens, "kd_weight": 0.5 / self.gate.sum()}

    def gates(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return teacher_gates(self.hidden_t, self.weight_t, None, self.targets, vocabulary=self.vocabulary)

    def ours(self, **options: Any) -> tuple[Tensor, ...]:
        options = {"teacher_logsumexp": self.teacher_logsumexp, **options}
        out = distillation_head(
            self.hidden_s,
            self.weight_s,
            None,
            self.hidden_t,
            self.weight_t,
            None,
            self.targets,
            self.gate,
            vocabulary=self.vocabulary,
            **self.scales,
            **options,
        )
        return out.loss.detach(), *torch.autograd.grad(out.loss, [self.hidden_s, self.weight_s])

    @torch.no_grad()
    def products(self) -> None:
        """logits_t, logits_s, dL/dh and dL/dW with the fewest calls."""
        logits = self.hidden_s @ self.weight_s.T
        self.hidden_t @ self.weight_t.T
        logits @ self.weight_s
        logits.T @ self.hidden_s

    def torch_alone(self) -> tuple[Tensor, ...]:
        """Logits of all positions at once, the losses in float32, autograd."""
        student, teacher = (self.hidden_s @ self.weight_s.T).float(), (self.hidden_t @ self.weight_t.T).float()
        ce = functional.cross_entropy(student, self.targets, reduction="sum") * self.scales["ce_weight"]
        column, off = self.targets[:, None], torch.zeros_like(student, dtype=torch.bool)
        off.scatter_(1, column, True)

        def split(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scaled = logits / 2.0
            hit = scaled.log_softmax(1).gather(1, column).squeeze(1)
            others = scaled.masked_fill(off, -1e9)
            return hit, torch.logsumexp(others, 1) - torch.logsumexp(scaled, 1), others.log_softmax(1)

        hit_s, miss_s, others_s = split(student)
        hit_t, miss_t, others_t = split(teacher)
        tckd = hit_t.exp() * (hit_t - hit_s) + miss_t.exp() * (miss_t - miss_s)
        nckd = (others_t.exp() * (others_t - others_s)).sum(1)
        loss = ce + self.scales["kd_weight"] * (self.gate * 4 * (tckd + 4 * nckd)).sum()
        return loss.detach(), *torch.autograd.grad(loss, [self.hidden_s, self.weight_s])

    def liger(self) -> Any:
        """Liger-Kernel's fused linear divergence (forward KL at T = 2, no gate, no cross-entropy, no decoupling)."""
        from liger_kernel.transformers import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=2.0)(
            self.hidden_s, self.weight_s, self.hidden_t, self.weight_t, None
        )
        return torch.autograd.grad(loss, [self.hidden_s, self.weight_s])

    def exact(self) -> tuple[Tensor, ...]:
        """Value and gradients in float64, by chunk."""
        weight_s, weight_t = self.weight_s.detach().double(), self.weight_t.double()
        total = weight_s.new_zeros(())
        grad_h, grad_w = torch.zeros_like(self.hidden_s, dtype=torch.float64), torch.zeros_like(weight_s)
        for start in range(0, len(self.targets), 256):
            rows = slice(start, start + 256)
            hidden = self.hidden_s.detach()[rows].double()
            student = (hidden @ weight_s.T).requires_grad_()
            _, _, dkd = decoupled_kd(student, self.hidden_t[rows].double() @ weight_t.T, self.targets[rows])
            ce = functional.cross_entropy(student, self.targets[rows], reduction="sum")
            loss = (
                self.scales["ce_weight"] * ce
                + self.scales["kd_weight"].double() * (self.gate[rows].double() * dkd).sum()
            )
            (grad,) = torch.autograd.grad(loss, student)
            total += loss.detach()
            grad_h[rows] = grad @ weight_s
            grad_w += grad.T @ hidden
        return total, grad_h, grad_w


def _errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    names = ("value", "hidden", "weight")
    return {name: _error(a, b) for name, a, b in zip(names, found, exact, strict=True)}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _graphs(works: dict[str, Any]) -> dict[str, Any]:
    return {name: graphed(work) for name, work in works.items()}


def head(sizes: dict[str, int], device: str, dtype: torch.dtype, *, rivals: bool = True) -> dict[str, Any]:
    """Times in ms, extra memory in GiB, relative errors against float64, for one size."""
    case = _Case(sizes["tokens"], sizes["vocabulary"], sizes["student"], sizes["teacher"], device, dtype)
    low = {"weight_grad_dtype": dtype}
    works = {"products_ms": case.products, "ours_ms": lambda: case.ours(**low)}
    found: dict[str, Any] = {
        **paired_ms(works),
        **{name.replace("_ms", "_without_host_ms"): ms for name, ms in paired_ms(_graphs(works)).items()},
        "ours_gib": extra_gib(lambda: case.ours(**low)),
        "ours_float32_sum_ms": median_ms(case.ours),
        "ours_float32_sum_gib": extra_gib(case.ours),
        "ours_without_sums_ms": median_ms(lambda: case.ours(teacher_logsumexp=None, **low)),
        "gates_ms": median_ms(case.gates),
        "gates_product_ms": median_ms(lambda: case.hidden_t @ case.weight_t.T),
    }
    if not rivals:
        return found
    exact = case.exact()
    found["error_ours"] = _errors(case.ours(**low), exact)
    found["error_ours_float32_sum"] = _errors(case.ours(), exact)
    found["error_torch"] = _errors(case.torch_alone(), exact)
    low = {"weight_grad_dtype": torch.bfloat16, "chunk": -(-sizes["tokens"] // 8)}
    found["error_of_8_chunks_in_bfloat16"] = _errors(case.ours(**low), exact)["weight"]
    found["error_of_one_rounding_to_bfloat16"] = _error(exact[2].bfloat16(), exact[2])
    del exact
    found["torch_ms"], found["torch_gib"] = median_ms(case.torch_alone, 5), extra_gib(case.torch_alone)
    try:
        found["liger_ms"], found["liger_gib"] = median_ms(case.liger, 5), extra_gib(case.liger)
    except ImportError:
        found["liger_ms"] = None
    return found


def _slices(chunk: int, vocabulary: int, device: str) -> list[int]:
    """Columns of the teacher whose product with `chunk` rows fills all multiprocessors some whole number of times; two others.

    A product works in tiles of 128 x 256 here; what is left over after a whole round of tiles costs as much as a round.
    """
    units = torch.cuda.get_device_properties(device).multi_processor_count if device == "cuda" else 2
    a_round = units // -(-chunk // 128) * 256
    return [a_round * rounds for rounds in (1, 2, 3, 4, 6)] + [-(-vocabulary // part // 2048) * 2048 for part in (9, 6)]


def chunks_by_turns(sizes: dict[str, int], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Device times of the heads in chunks of other sizes and other slices of the teacher's vocabulary, and of the products."""
    case = _Case(sizes["tokens"], sizes["vocabulary"], sizes["student"], sizes["teacher"], device, dtype)
    ids, tokens, low = sizes["vocabulary"], sizes["tokens"], {"weight_grad_dtype": dtype}
    works: dict[str, Any] = {"products_ms": graphed(case.products)}
    rows, usual = [], chunks.SLICE
    for chunk in (tokens // 8, tokens // 7 + 7, tokens // 32 * 5):
        for columns in _slices(chunk, ids, device):
            chunks.SLICE = columns
            work = partial(case.ours, chunk=chunk, **low)
            works[str(len(rows))] = graphed(work)  # recorded now, with this slice
            rows.append({"chunk": chunk, "slice": columns, "ours_gib": extra_gib(work)})
    chunks.SLICE = usual
    times = paired_ms(works, 12)
    return {
        "products_ms": times["products_ms"],
        "rows": [row | {"ours_ms": times[str(i)]} for i, row in enumerate(rows)],
    }

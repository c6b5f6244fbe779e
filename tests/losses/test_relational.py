"""Centred kernel alignment against the definition with its centring matrix, its invariances, and what is skipped."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from grace_plugin.losses import countable_images, linear_cka, relational_loss
from tests.reference import relational as oracle
from tests.reference.footprint import Footprint


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SHAPES = [(9, 4, 3), (5, 40, 30), (12, 12, 12), (20, 3, 50), (20, 50, 3), (4, 1, 1)]


@pytest.mark.parametrize(("n", "d_t", "d_s"), SHAPES)
def test_linear_cka__every_shape__equals_definition(n, d_t, d_s):
    teacher, student = normal(n, d_t, seed=1) + 0.5, normal(n, d_s, seed=2) - 1.0
    assert linear_cka(teacher, student).item() == pytest.approx(oracle.cka(teacher, student), rel=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 12), st.integers(1, 8), st.integers(1, 8), st.integers(0, 10_000), st.floats(-6, 6))
def test_linear_cka__rotation_scale_and_shift__same_value(n, d_t, d_s, seed, exponent):
    teacher, student = normal(n, d_t, seed=seed), normal(n, d_s, seed=seed + 1)
    rotation, _ = torch.linalg.qr(normal(d_s, d_s, seed=seed + 2))
    shift = normal(1, d_s, seed=seed + 3)
    want = linear_cka(teacher, student).item()
    assert -1e-12 <= want <= 1 + 1e-12
    assert linear_cka(teacher, student @ rotation).item() == pytest.approx(want, rel=1e-8, abs=1e-12)
    assert linear_cka(teacher, student * 10**exponent).item() == pytest.approx(want, rel=1e-8, abs=1e-12)
    assert linear_cka(teacher * 10**exponent, student).item() == pytest.approx(want, rel=1e-8, abs=1e-12)
    assert linear_cka(teacher, student + shift).item() == pytest.approx(want, rel=1e-8, abs=1e-12)
    assert linear_cka(student, teacher).item() == pytest.approx(want, rel=1e-10, abs=1e-12)
    assert linear_cka(student, student @ rotation).item() == pytest.approx(1.0, rel=1e-9)


def test_linear_cka__order_changed_on_one_side__another_value():
    teacher, student = normal(8, 5, seed=1), normal(8, 5, seed=2)
    assert abs(linear_cka(teacher, student.flip(0)) - linear_cka(teacher, student)) > 1e-3


def test_linear_cka__both_sides__pass_gradcheck():
    teacher, student = normal(6, 3, seed=1).requires_grad_(), normal(6, 4, seed=2).requires_grad_()
    assert gradcheck(linear_cka, (teacher, student))


def test_linear_cka__degenerate_view__zero_without_nan():
    flat = torch.ones(6, 3, requires_grad=True)
    value = linear_cka(normal(6, 4, dtype=torch.float32), flat)
    value.backward()
    assert value.item() == 0
    assert torch.equal(flat.grad, torch.zeros(6, 3))
    zero = torch.zeros(6, 3, requires_grad=True)
    linear_cka(normal(6, 4, dtype=torch.float32), zero).backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("shapes", [((5, 2), (4, 2)), ((5,), (5, 2)), ((5, 2), (5,))])
def test_linear_cka__rows_that_differ__refused(shapes):
    with pytest.raises(ValueError, match="two matrices with the same rows"):
        linear_cka(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


SIZES = [[5, 7, 5, 3, 4], [4], [6, 6, 6], [3, 2, 1], [0, 5, 0], [30, 4, 30]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("d_t", "d_s"), [(3, 4), (16, 9)])
def test_relational_loss__images__sum_of_definition(sizes, d_t, d_s):
    m = sum(sizes)
    teacher, student = normal(m, d_t, seed=1) + 0.3, normal(m, d_s, seed=2)
    out = relational_loss(student, teacher, sizes)
    want, counted = oracle.relational(student, teacher, sizes)
    assert out.loss_sum.item() == pytest.approx(want, rel=1e-10, abs=1e-12)
    assert out.images.item() == counted
    assert out.skipped.item() == len(sizes) - counted
    assert countable_images(teacher, sizes).tolist() == [size >= 4 for size in sizes]


def test_relational_loss__both_product_forms__pass_gradcheck():
    teacher, student = normal(15, 2, seed=1), normal(15, 3, seed=2).requires_grad_()
    assert gradcheck(lambda s: relational_loss(s, teacher, [5, 5, 2, 3]).loss_sum, (student,))
    wide_t, wide_s = normal(9, 12, seed=1), normal(9, 11, seed=2).requires_grad_()
    assert gradcheck(lambda s: relational_loss(s, wide_t, [4, 5]).loss_sum, (wide_s,))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 10_000))
def test_relational_loss__images_in_micro_batches__same_result(sizes, seed):
    m = sum(sizes)
    teacher = normal(m, 4, seed=seed)
    whole, cut = (normal(m, 5, seed=seed + 1).requires_grad_() for _ in range(2))
    out = relational_loss(whole, teacher, sizes)
    out.loss_sum.backward()
    total, images, start = 0.0, 0, 0
    for size in sizes:
        part = relational_loss(cut[start : start + size], teacher[start : start + size], [size])
        part.loss_sum.backward()
        total, images, start = total + part.loss_sum.item(), images + part.images.item(), start + size
    assert out.loss_sum.item() == pytest.approx(total, rel=1e-11, abs=1e-12)
    assert out.images.item() == images
    torch.testing.assert_close(whole.grad, cut.grad, rtol=1e-9, atol=1e-12)


def test_relational_loss__lengths_of_rows__do_not_matter():
    teacher, student = normal(6, 4, seed=1), normal(6, 3, seed=2)
    lengths = torch.tensor([1e-3, 1.0, 50.0, 2.0, 1e4, 0.1], dtype=torch.float64).unsqueeze(1)
    want = relational_loss(student, teacher, [6]).loss_sum.item()
    assert relational_loss(student * lengths, teacher, [6]).loss_sum.item() == pytest.approx(want, rel=1e-10)
    assert relational_loss(student, teacher * lengths, [6]).loss_sum.item() == pytest.approx(want, rel=1e-10)


def test_relational_loss__rotated_teacher_as_student__zero():
    teacher = normal(10, 6, seed=1)
    rotation, _ = torch.linalg.qr(normal(6, 6, seed=2))
    assert relational_loss(teacher @ rotation, teacher, [4, 6]).loss_sum.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_relational_loss__degenerate_image__skipped_and_counted(side):
    teacher, student = normal(10, 4, seed=1, dtype=torch.float32), normal(10, 3, seed=2, dtype=torch.float32)
    {"student": student, "teacher": teacher}[side][5:] = 0.7
    student.requires_grad_()
    out = relational_loss(student, teacher, [5, 5])
    out.loss_sum.backward()
    want, _ = oracle.relational(student.detach()[:5], teacher[:5], [5])
    assert out.loss_sum.item() == pytest.approx(want, rel=1e-5)
    assert [out.images.item(), out.skipped.item()] == [1, 1]
    assert torch.equal(student.grad[5:], torch.zeros(5, 3))
    assert student.grad[:5].abs().sum() > 0
    assert countable_images(teacher, [5, 5]).tolist() == [True, side == "student"]


def test_relational_loss__measurable_in_float32__not_skipped():
    """Rows that differ by 1e-3 are an image; rows that differ by 1e-6 are rounding."""
    base = torch.ones(8, 16)
    noise = normal(8, 16, seed=3, dtype=torch.float32)
    student = normal(8, 5, seed=4, dtype=torch.float32)
    assert relational_loss(student, base + 1e-3 * noise, [8]).images.item() == 1
    assert relational_loss(student, base + 1e-6 * noise, [8]).images.item() == 0
    want, _ = oracle.relational(student, base.double() + 1e-3 * noise.double(), [8])
    assert relational_loss(student, base + 1e-3 * noise, [8]).loss_sum.item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("n", [8, 640])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_linear_cka__threshold__relative_to_lengths_of_rows(n, unit):
    noise, other = normal(n, 8, seed=3), normal(n, 5, seed=4)
    base = torch.zeros(n, 8, dtype=torch.float64)
    base[:, 0] = 1.0
    assert linear_cka(unit * (base + 1e-4 * noise), other).item() > 0
    assert linear_cka(unit * (base + 1e-5 * noise), other).item() == 0
    assert linear_cka(other, unit * (base + 1e-5 * noise)).item() == 0


def test_linear_cka__one_float64_view__computed_in_float64():
    a, b = normal(6, 3, seed=1), normal(6, 4, seed=2)
    assert linear_cka(a.float(), b).dtype == torch.float64
    assert linear_cka(a, b.float()).dtype == torch.float64
    assert linear_cka(a.float(), b.float()).dtype == torch.float32


def test_relational_loss__threshold__independent_of_token_count():
    noise = normal(64, 8, seed=3, dtype=torch.float64)
    base = torch.zeros(64, 8, dtype=torch.float64)
    base[:, 0] = 1.0
    for spread, counts in ((1e-4, 1), (1e-5, 0)):
        for n in (8, 64):
            teacher = base[:n] + spread * noise[:n]
            assert relational_loss(noise[:n], teacher, [n]).images.item() == counts, (spread, n)


def test_relational_loss__row_of_zeros__finite():
    teacher, student = normal(6, 4, seed=1, dtype=torch.float32), normal(6, 3, seed=2, dtype=torch.float32)
    student[2] = 0
    student.requires_grad_()
    out = relational_loss(student, teacher, [6])
    out.loss_sum.backward()
    assert 0 < out.loss_sum.item() < 1
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 100


def test_relational_loss__non_finite_state__loss_is_nan():
    teacher, student = normal(8, 4, seed=1, dtype=torch.float32), normal(8, 3, seed=2, dtype=torch.float32)
    student[1, 0] = math.nan
    out = relational_loss(student, teacher, [4, 4])
    assert math.isnan(out.loss_sum.item())
    assert out.images.item() == 2


@pytest.mark.parametrize("sizes", [[], [0, 0], [3]])
def test_relational_loss__no_images__exact_zero_with_gradient(sizes):
    student = torch.full((sum(sizes), 4), math.inf, requires_grad=True)
    out = relational_loss(student, torch.zeros(sum(sizes), 3), sizes)
    out.loss_sum.backward()
    assert out.loss_sum.item() == 0
    assert out.loss_sum.dtype == torch.float32
    assert out.images.item() == 0
    assert out.skipped.item() == len(sizes)
    assert torch.equal(student.grad, torch.zeros(sum(sizes), 4))
    found = countable_images(torch.zeros(sum(sizes), 3), sizes)
    assert found.dtype == torch.bool
    assert found.tolist() == [False] * len(sizes)


def test_relational_loss__teacher__no_gradient():
    teacher, student = normal(6, 4, seed=1).requires_grad_(), normal(6, 3, seed=2).requires_grad_()
    relational_loss(student, teacher, [6]).loss_sum.backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_relational_loss__bfloat16_and_autocast__computed_in_float32():
    teacher, student = normal(24, 16, seed=1, dtype=torch.bfloat16), normal(24, 8, seed=2, dtype=torch.bfloat16)
    want, _ = oracle.relational(student.double(), teacher.double(), [10, 14])
    plain = relational_loss(student, teacher, [10, 14])
    leaf = student.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = relational_loss(leaf, teacher.float(), [10, 14])
        counted = countable_images(teacher, [10, 14])
    assert plain.loss_sum.dtype == torch.float32
    assert plain.loss_sum.item() == pytest.approx(want, rel=1e-5)
    assert torch.equal(plain.loss_sum, cast.loss_sum.detach())
    assert counted.all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_cka(teacher.float(), student.float())
    assert torch.equal(inside, linear_cka(teacher, student))


@pytest.mark.parametrize("sizes", [[4, 4], [12], [-2, 12], [5, 5, 1]])
def test_relational_loss__sizes_that_do_not_add_up__refused(sizes):
    features = torch.zeros(10, 3)
    with pytest.raises(ValueError, match="sizes must add up to the rows"):
        relational_loss(features, features, sizes)
    with pytest.raises(ValueError, match="sizes must add up to the rows"):
        countable_images(features, sizes)


def test_relational_loss__sides_of_different_rows__refused():
    with pytest.raises(ValueError, match=r"\(9, 3\) do not split into images of \[10\]"):
        relational_loss(torch.zeros(10, 3), torch.zeros(9, 3), [10])
    with pytest.raises(ValueError, match="do not split"):
        relational_loss(torch.zeros(10), torch.zeros(10, 3), [10])


def test_relational_loss__images_of_one_size__one_batch():
    """The number of matrix products does not grow with the number of images: no Python loop over images does work."""

    def products(count):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            relational_loss(normal(6 * count, 3), normal(6 * count, 4), [6] * count)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::bmm")

    assert products(2) == products(12)
    assert products(12) > 0


@pytest.mark.parametrize(
    ("n", "d_t", "d_s"), [(4, 60, 50), (60, 5, 4), (30, 4, 200), (30, 200, 4), (60, 5, 50), (60, 50, 5)]
)
def test_relational_loss__products__smaller_form(n, d_t, d_s):
    """No kernel over widths when tokens are few, none over tokens when widths are small."""
    teacher, student = normal(n, d_t), normal(n, d_s, seed=1)
    with Footprint() as seen:
        relational_loss(student, teacher, [n])
    cross = min(n * n, d_t * d_s) if n * (d_t + d_s) > d_t * d_s else n * n
    own = max(min(n, d_t), min(n, d_s)) ** 2
    assert seen.largest == max(n * d_t, n * d_s, cross, own)


@pytest.mark.parametrize("double", ["student", "teacher"])
def test_relational_loss__one_float64_side__computed_in_float64(double):
    teacher, student = normal(9, 3, seed=1).float(), normal(9, 4, seed=2).float()
    raised = (student.double(), teacher) if double == "student" else (student, teacher.double())
    out = relational_loss(*raised, [4, 5])
    want = relational_loss(student.double(), teacher.double(), [4, 5])
    assert out.loss_sum.dtype == torch.float64
    assert torch.equal(out.loss_sum, want.loss_sum)


def test_countable_images__bfloat16__agree_with_loss():
    """One number in the last bit of bfloat16 makes an image; normalised in bfloat16 it is often lost."""
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        width = int(torch.randint(2, 64, (1,), generator=g))
        hidden = (torch.rand(width, generator=g) + 0.5).bfloat16().repeat(4, 1)
        assert countable_images(hidden, [4]).tolist() == [False]
        column = int(torch.randint(0, width, (1,), generator=g))
        hidden[0, column] = torch.nextafter(hidden[0, column], torch.tensor(9.0, dtype=torch.bfloat16))
        assert countable_images(hidden, [4]).tolist() == [True]
        assert relational_loss(hidden, hidden, [4]).images.item() == 1


def test_relational_loss__empty_batch__int64_and_float32():
    empty = torch.zeros(0, 4, dtype=torch.bfloat16)
    for sizes in ([], [0]):
        out = relational_loss(empty, empty, sizes)
        assert (out.loss_sum.dtype, out.images.dtype, out.skipped.dtype) == (torch.float32, torch.int64, torch.int64)


def test_oracle__simple_case__known_value():
    features = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert oracle.cka(features, features) == pytest.approx(1.0)
    assert oracle.cka(features[:, :1], features[:, 1:]) == pytest.approx(0.0, abs=1e-15)

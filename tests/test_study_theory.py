"""What the studies of theory rest on: their data, their closed forms, their solvers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core.call import Call
from regard.core.errors import ArgumentError
from regard.core.recurrent import Recurrent, recur
from regard.operators.softmax import softmax
from regard.studies.attention_svm import AttentionSvm, Problems, correlation, descend, outputs
from regard.studies.fact_sequences import facts, sequences
from regard.studies.icl_regression import Prompts, shape
from regard.studies.in_context import answers, circuits, reader
from regard.studies.linear_estimators import best_mu, estimate, gradient_step, ridge, risk
from regard.studies.max_margin import constraints, least_norm, margins
from regard.studies.scan_and_snap import next_token_loss, shares
from regard.studies.softmax_regression import compared
from regard.studies.softmax_tasks import Tasks, predicted


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# scan and snap


def test_facts_number_every_token_once() -> None:
    known = facts(2, 3, 4, 1, 5)
    assert [fact.last for fact in known] == [36, 36, 36, 37, 37, 37]
    assert [fact.answer for fact in known] == list(range(38, 44))
    assert known[0].tokens.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert known[5].tokens.tolist() == [0, 1, 2, 3, 5, 31, 32, 33, 34, 35]
    own = [token for fact in known for token in fact.distinct]
    assert own == list(range(6, 36))
    assert known[0].probs.sum() == pytest.approx(1)
    assert known[0].probs[-1] == known[0].probs[0]
    assert known[0].probs[5] == pytest.approx(0.1 * float(known[0].probs[0]))


def test_sequences_follow_their_facts() -> None:
    known = facts(2, 1, 2, 0, 3)
    x, answer = sequences(known, 4000, 501, generator())
    for fact in known:
        rows = x[answer == fact.answer]
        assert (rows[:, -1] == fact.last).all()
        counts = torch.bincount(rows[:, :-1].flatten(), minlength=16)[fact.tokens]
        assert counts.sum() == rows[:, :-1].numel()
        torch.testing.assert_close(counts / counts.sum(), fact.probs, atol=0.002, rtol=0)


def test_shares_are_what_long_sequences_give() -> None:
    known = facts(1, 1, 3, 0, 4)
    z = torch.randn(9, 9, generator=generator())
    x, _ = sequences(known, 200, 500, generator(1))
    keys = F.one_hot(x[:, :-1], 9).float()[:, None]
    c = softmax(z[x[:, -1]][:, None, None], keys, keys, Call(scale=1.0)).output[:, 0, 0].mean(0)
    torch.testing.assert_close(c[known[0].tokens], shares(z, known[0]), atol=0.01, rtol=0)


def test_loss_starts_at_the_vocabulary_and_the_last_token_can_be_seen() -> None:
    known = facts(2, 1, 10, 0, 10)
    x, answer = sequences(known, 8, 16, generator())
    zero = torch.zeros(34, 34)
    assert next_token_loss(zero, zero, x, answer).item() == pytest.approx(math.log(34))
    y = torch.zeros(34, 34)
    y[answer, x[:, -1]] = 100.0  # the query alone tells the answer
    assert next_token_loss(y, zero, x, answer).item() > 1
    assert next_token_loss(y, zero, x, answer, residual=True).item() < 1e-6
    steep = zero.clone()
    steep[x[:, -1], x[:, -1]] = 50.0
    assert next_token_loss(y, steep, x, answer, with_last=True).item() < 1e-6


def test_only_rows_of_query_tokens_learn_to_attend() -> None:
    x, answer = sequences(facts(2, 1, 3, 0, 3), 16, 12, generator())
    y, z = torch.randn(13, 13, generator=generator(1)), torch.zeros(13, 13, requires_grad=True)
    moved = torch.autograd.grad(next_token_loss(y, z, x, answer), z)[0].abs().sum(1)
    assert moved.nonzero().flatten().tolist() == [9, 10]


# attention as a support vector machine


def some_problems() -> Problems:
    return Problems.drawn((3, 4, 5, 8), generator())


def test_margins_are_gaps_between_scores() -> None:
    problems, w = some_problems(), doubles(3, 8, 8)
    seen = outputs(problems, [w])[2]
    chosen = seen.argmin(-1)
    found = margins(constraints(problems.x, problems.z, chosen), w)
    gaps = seen.log().gather(2, chosen[..., None]) - seen.log()
    others = F.one_hot(chosen, 5) == 0
    torch.testing.assert_close(found, gaps[others].view(3, -1))


@pytest.mark.parametrize("tau", [0.0, 10.0])
def test_least_norm_meets_its_constraints_and_needs_them(tau: float) -> None:
    problems = some_problems()
    limits = constraints(problems.x, problems.z, problems.best())
    w = least_norm(limits, tau)
    found = margins(limits, w)
    assert found.min() > 1 - 1e-9
    active = found < 1 + 1e-7
    assert active.any(-1).all()
    assert not active.all()

    def cost(m: Tensor) -> Tensor:
        return tau * torch.linalg.matrix_norm(m, "nuc") + m.square().sum((1, 2)) / 2

    for seed in range(20):  # no feasible neighbour costs less
        near = w + 0.05 * doubles(3, 8, 8, seed=seed)
        near = near / margins(limits, near).amin(-1).clamp_max(1)[:, None, None]
        assert (cost(near) > cost(w)).all()


def test_least_norm_of_one_constraint_and_of_two_that_conflict() -> None:
    limits = doubles(1, 1, 3, 3)
    torch.testing.assert_close(least_norm(limits), limits[:, 0] / limits.square().sum())
    conflict = torch.cat([limits, -limits], 1)
    assert margins(conflict, least_norm(conflict, steps=50)).min() < 0.5


def test_nuclear_machine_has_the_smaller_nuclear_norm_and_rank() -> None:
    problems = some_problems()
    limits = constraints(problems.x, problems.z, problems.best())
    frobenius, nuclear = least_norm(limits), least_norm(limits, 10.0)
    assert (frobenius.norm(dim=(1, 2)) < nuclear.norm(dim=(1, 2))).all()
    sizes = [torch.linalg.matrix_norm(w, "nuc") for w in (frobenius, nuclear)]
    assert (sizes[1] < sizes[0]).all()
    ranks = [torch.linalg.matrix_rank(w, rtol=1e-6) for w in (frobenius, nuclear)]
    assert (ranks[1] < ranks[0]).all()


def test_factors_and_their_product_attend_alike() -> None:
    problems, q, k = some_problems(), doubles(3, 2, 8), doubles(3, 2, 8, seed=1)
    for got, same in zip(outputs(problems, (q, k)), outputs(problems, [q.mT @ k]), strict=True):
        torch.testing.assert_close(got, same)
    scores = torch.einsum("pnd,pde,pnte->pnt", problems.z, q.mT @ k, problems.x)
    torch.testing.assert_close(outputs(problems, (q, k))[2], scores.softmax(-1))


def test_descent_selects_tokens_that_suit_the_labels() -> None:
    problems, zero = some_problems(), torch.zeros(3, 8, 8, dtype=torch.float64)
    before = outputs(problems, [zero])[0]
    after = outputs(problems, [descend(problems, [zero], 50, 0.5)[-1]])[0]
    assert (problems.y * (after - before)).mean(-1).min() > 0.1


def test_descent_moves_by_its_rate_and_saturates() -> None:
    problems, zero = some_problems(), torch.zeros(3, 8, 8, dtype=torch.float64)
    first = descend(problems, [zero], 1, 0.1)[-1]
    torch.testing.assert_close(first.norm(dim=(1, 2)), torch.full((3,), 0.1, dtype=torch.float64))
    far = descend(problems, [zero], 400, 0.5)[-1]
    assert outputs(problems, [far])[2].amax(-1).min() > 0.99
    assert (outputs(problems, [far])[1] < outputs(problems, [zero])[1]).all()
    machine = least_norm(
        constraints(problems.x, problems.z, outputs(problems, [far])[2].argmax(-1))
    )
    assert correlation(far, machine).min() > correlation(first, machine).max()


def test_too_narrow_problems_are_refused() -> None:
    with pytest.raises(ArgumentError, match="dim"):
        AttentionSvm(problems=1, sequences=8, tokens=8, dim=1, steps=3).run(lambda _: None)


# linear regression in context


def test_best_heads_are_those_of_the_closed_form() -> None:
    def least(*w: float) -> float:
        heads = torch.tensor(w, dtype=torch.float64)
        return float(risk(heads, best_mu(heads, 5, 40, 0.1), 5, 40, 0.1))

    grid = torch.linspace(0.05, 1.0, 96, dtype=torch.float64).tolist()
    assert min(grid, key=least) == pytest.approx(5**-0.5, abs=0.01)
    assert least(5**-0.5) == pytest.approx(0.372, abs=5e-4)
    assert least(0.01, -0.01) == pytest.approx(0.2209, abs=5e-4)
    assert least(0.2, -0.2) < min(least(w) for w in grid)


def test_best_mu_is_where_the_risk_is_flat() -> None:
    w = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    mu = best_mu(w, 4, 30, 0.2).requires_grad_()
    slope = torch.autograd.grad(risk(w, mu, 4, 30, 0.2), mu)[0]
    assert slope.abs().max() < 1e-10


def test_risk_is_near_that_of_drawn_prompts() -> None:
    prompts = Prompts.drawn(20_000, 40, 5, 0.1, generator())
    w = torch.tensor([0.15, -0.15])
    mu = best_mu(w, 5, 40, 0.1)
    error = (estimate(prompts.x, prompts.y, prompts.asked, w, mu) - prompts.label).square().mean()
    assert error.item() == pytest.approx(float(risk(w, mu, 5, 40, 0.1)), rel=0.15)


def test_two_small_opposite_heads_are_a_debiased_step() -> None:
    x, y, asked = doubles(6, 10, 3), doubles(6, 10, seed=1), doubles(6, 3, seed=2)
    w = torch.tensor([1e-3, -1e-3], dtype=torch.float64)
    heads = estimate(x, y, asked, w, torch.tensor([500.0, -500.0], dtype=torch.float64))
    torch.testing.assert_close(
        heads, gradient_step(x, y, asked, 1.0, debiased=True), atol=1e-4, rtol=1e-4
    )
    plain = gradient_step(x, y, asked, 1.0, debiased=False)
    assert (heads - plain).abs().max() > 0.01


def test_ridge_finds_a_slope_without_noise() -> None:
    x, slope, asked = doubles(4, 10, 3), doubles(4, 3, seed=1), doubles(4, 3, seed=2)
    y = (x @ slope[..., None])[..., 0]
    torch.testing.assert_close(ridge(x, y, asked, 1e-9), (slope * asked).sum(-1))
    assert ridge(x, y, asked, 1e9).abs().max() < 1e-6


def test_circuits_are_scores_and_values() -> None:
    layer = reader(3, 2, 0).double()
    kq, ov = circuits(layer)
    x, y, asked = doubles(5, 7, 3), doubles(5, 7, seed=1), doubles(5, 2, 3, seed=2)
    keys, queries = torch.cat([x, y[..., None]], -1), F.pad(asked, (0, 1))
    weights = torch.einsum("bqi,hij,bkj->bhqk", queries, kq, keys).div(2).softmax(-1)
    said = torch.einsum("bhqk,bki,hio->bqo", weights, keys, ov)[..., -1]
    torch.testing.assert_close(answers(layer, x, y, asked), said)


def test_the_form_of_a_layer_is_read_from_its_circuits() -> None:
    kq, ov = torch.zeros(2, 4, 4), torch.zeros(2, 4)
    for head, (w, mu) in enumerate(((0.2, 3.0), (-0.2, -3.0))):
        kq[head, :3, :3] = w * torch.eye(3)
        kq[head, 3] = 7.0  # a question's last entry is zero, so that this never acts
        ov[head, 3] = mu
    assert all(figure.holds for figure in shape(kq, ov))
    assert [figure.value for figure in shape(kq, ov)] == pytest.approx([0, 0, 0, 0, 1], abs=1e-6)
    kq[1, :3, :3] *= -1
    ov[0, 0] = 9.0
    assert not any(figure.holds for figure in shape(kq, ov)[1:2])
    assert not shape(kq, ov)[-1].holds


# softmax regression in context


def test_gradient_is_the_formula_s() -> None:
    tasks = Tasks(doubles(3, 6, 4), doubles(3, 6, seed=1).softmax(-1))
    x = doubles(3, 4, seed=2).requires_grad_()
    wanted = torch.autograd.grad(3 * tasks.objective(predicted(tasks.a, x)), x)[0]
    torch.testing.assert_close(tasks.gradient(x.detach()), wanted, atol=1e-15, rtol=1e-12)
    f = predicted(tasks.a, x.detach())
    jacobian = torch.diag_embed(f) - f[..., None] * f[:, None]
    written = tasks.a.mT @ jacobian @ (f - tasks.b)[..., None]
    torch.testing.assert_close(tasks.gradient(x.detach()), written[..., 0])


def test_to_move_the_weights_is_to_shift_the_target() -> None:
    a, b = doubles(3, 6, 4), doubles(3, 6, seed=1).softmax(-1)
    x = doubles(3, 4, seed=2)
    moved = x + doubles(3, 4, seed=3)
    shifted = b + predicted(a, x) - predicted(a, moved)
    left = Tasks(a, shifted).objective(predicted(a, x))
    torch.testing.assert_close(Tasks(a, b).objective(predicted(a, moved)), left)
    size = torch.linalg.matrix_norm(a, 2) * (moved - x).norm(dim=-1)
    assert ((shifted - b).norm(dim=-1) <= size / 2).all()


def by_linear_attention(a: Tensor, b: Tensor, asked: Tensor, rate: float) -> Tensor:
    """Answers (B,Q) of linear attention with W_Q = W_K = diag(I, 0), W_V = -e e^T and a projection
    of rate/n: less the last entry of each updated question.
    """
    n, d = a.shape[1:]
    look = torch.diag(F.pad(torch.ones(d, dtype=a.dtype), (0, 1)))
    value = torch.zeros_like(look)
    value[d, d] = -1.0
    examples, questions = torch.cat([a, b[..., None]], -1)[:, None], F.pad(asked, (0, 1))[:, None]
    read = recur(questions @ look, examples @ look, examples @ value, Call(), Recurrent()).output
    return -(questions + rate / n * read)[:, 0, :, -1]


def test_linear_attention_is_a_step_on_linear_regression() -> None:
    a, b, asked = doubles(3, 6, 4), doubles(3, 6, seed=1), doubles(3, 5, 4, seed=2)
    w = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    loss = ((a @ w[..., None])[..., 0] - b).square().sum() / (2 * 6)
    step = -0.3 * torch.autograd.grad(loss, w)[0]
    wanted = (asked @ step[..., None])[..., 0]
    got = by_linear_attention(a, b, asked, 0.3)
    torch.testing.assert_close(got, wanted, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(got[:, 0], gradient_step(a, b, asked[:, 0], 0.3, debiased=False))


def test_linear_attention_is_a_step_on_softmax_regression_too() -> None:
    """From zero every token is predicted alike, and only what b is above 1/n is read."""
    tasks = Tasks(doubles(3, 6, 4), doubles(3, 6, seed=1).softmax(-1))
    step = tasks.step(0.7)
    logits = by_linear_attention(tasks.a, tasks.b - 1 / 6, tasks.a, 0.7)
    torch.testing.assert_close(logits, (tasks.a @ step[..., None])[..., 0])
    assert tasks.objective(predicted(tasks.a, step)) < tasks.objective(
        torch.full_like(tasks.b, 1 / 6)
    )


def test_the_fitted_rate_is_the_best_of_its_neighbours() -> None:
    tasks = Tasks.drawn(50, 8, 5, 0.5, generator())

    def left(rate: float) -> float:
        return float(tasks.objective(predicted(tasks.a, tasks.step(rate))))

    rate = tasks.fitted_rate()
    assert left(rate) <= min(left(rate / 1.2), left(rate * 1.2))


def test_a_layer_that_is_the_step_compares_as_equal() -> None:
    """Softmax attention of tiny scores is linear attention: built so, it is the step."""
    tasks = Tasks.drawn(20, 8, 5, 0.5, generator())
    tasks = Tasks(tasks.a.double(), tasks.b.double())
    layer, small = reader(5, 1, 0).double(), 1e-4
    look = torch.diag(F.pad(torch.ones(5, dtype=torch.float64), (0, 1)))
    label = torch.zeros_like(look)
    label[5, 5] = 1.0
    with torch.no_grad():
        layer.q_proj.weight.copy_(look * small * 6**0.5)
        layer.k_proj.weight.copy_(look)
        layer.v_proj.weight.copy_(label)
        layer.o_proj.weight.copy_(label * 3.0 / small / 8)
    centred = tasks.a - tasks.a.mean(1, keepdim=True)
    objective, distance, *cosines = compared(layer, Tasks(centred, tasks.b), 3.0).tolist()
    step = Tasks(centred, tasks.b).step(3.0)
    assert objective == pytest.approx(float(tasks.objective(predicted(centred, step))), rel=1e-3)
    assert distance < 1e-3
    assert cosines == pytest.approx([1, 1], abs=1e-3)

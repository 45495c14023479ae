"""On-policy distillation: the loss against a loop in float64, and the whole loss through a tiny model."""

import math

import numpy as np
import pytest
import torch

from amalgam.distill.opd import distillation_loss, loss, rows
from amalgam.model import DeepseekV4
from amalgam.rl.engine import Engine
from amalgam.rl.packing import collate
from amalgam.rl.trajectory import Trajectory

from .. import tiny

VOCABULARY = 40


def naive_distillation_loss(hidden, head, teacher_hidden, teacher, heads, weight) -> float:
    """sum over tokens of weight * KL(student || its teacher), in float64."""

    def probabilities(state, matrix):
        logits = [sum(h * m for h, m in zip(state, row, strict=True)) for row in matrix]
        top = max(logits)
        masses = [math.exp(x - top) for x in logits]
        return [mass / sum(masses) for mass in masses]

    total = 0.0
    for i, w in enumerate(weight):
        matrix = heads[teacher[i]]
        student = probabilities(hidden[i], head)
        taught = probabilities(teacher_hidden[i][: len(matrix[0])], matrix)
        total += w * sum(p * math.log(p / q) for p, q in zip(student, taught, strict=True))
    return total


def test_loss_is_the_weighted_reverse_kl_and_teaches_the_student_alone():
    """Two teachers, one of another hidden width; weights differ, some are zero."""
    count, vocabulary = 12, 9
    hidden, head = torch.randn(count, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    teacher_hidden = torch.randn(count, 6, requires_grad=True)
    heads = {0: torch.randn(vocabulary, 4, requires_grad=True), 3: torch.randn(vocabulary, 6, requires_grad=True)}
    teacher = torch.tensor([0, 3] * (count // 2))
    weight = torch.rand(count)
    weight[[0, 5]] = 0.0
    value, metrics = distillation_loss(hidden, head, teacher_hidden, teacher, heads, weight)
    value.backward()

    def naive(h, m) -> float:
        plain = {index: other.detach().double().tolist() for index, other in heads.items()}
        fixed = [x.detach().double().tolist() for x in (teacher_hidden, weight)]
        return naive_distillation_loss(h.tolist(), m.tolist(), fixed[0], teacher.tolist(), plain, fixed[1])

    h, m = hidden.detach().double(), head.detach().double()
    assert value.item() == metrics["loss"].item() == pytest.approx(naive(h, m), rel=1e-5)
    for tensor, others, found in ((h, lambda x: (x, m), hidden.grad), (m, lambda x: (h, x), head.grad)):
        assert found is not None
        for at in np.ndindex(*tensor.shape):
            step = torch.zeros_like(tensor)
            step[at] = 1e-5
            slope = (naive(*others(tensor + step)) - naive(*others(tensor - step))) / 2e-5
            assert found[at].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert teacher_hidden.grad is None
    assert all(other.grad is None for other in heads.values())


# ---- through a tiny model


@pytest.fixture(scope="module")
def student() -> DeepseekV4:
    return tiny.model(0, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def teachers() -> list[DeepseekV4]:
    """The second is wider than the student and than the first."""
    return [tiny.model(1, vocab_size=VOCABULARY), tiny.model(2, vocab_size=VOCABULARY, hidden_size=48)]


@pytest.fixture(scope="module")
def trajectories(student: DeepseekV4) -> list[Trajectory]:
    requests = tiny.asked(tiny.requests(7, 1, VOCABULARY), max_new_tokens=15, seed=1)
    return Engine(student, [tiny.END]).generate(requests)


@torch.no_grad()
def states(model: DeepseekV4, trajectory: Trajectory) -> np.ndarray:
    tokens = torch.from_numpy(trajectory.row()["tokens"]).long()
    return model(tokens, torch.tensor([0, len(tokens)])).hidden.numpy()


def taught(trajectories: list[Trajectory], teachers: list[DeepseekV4]) -> tuple[list, dict[str, torch.Tensor]]:
    """Rows, with the teachers in turn, and the learner's shared tensors."""
    index = [i % len(teachers) for i in range(len(trajectories))]
    hidden = [states(teachers[i], t) for i, t in zip(index, trajectories, strict=True)]
    return rows(trajectories, hidden, index), {f"head.{i}": t.lm_head.weight.data for i, t in enumerate(teachers)}


def gradients(model: DeepseekV4) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_rows_weigh_all_response_tokens_alike(trajectories: list[Trajectory], teachers: list[DeepseekV4]):
    made, _ = taught(trajectories, teachers)
    total = sum(len(t.response_ids) for t in trajectories)
    for i, (t, row) in enumerate(zip(trajectories, made, strict=True)):
        p, r = len(t.prompt_ids), len(t.response_ids)
        np.testing.assert_allclose(row["weight"], [0.0] * p + [1 / total] * r, rtol=1e-6)
        assert row["weight"].dtype == row["teacher_hidden"].dtype == np.float32
        assert (row["teacher"] == i % 2).all()
        width = teachers[i % 2].config.hidden_size
        np.testing.assert_array_equal(row["teacher_hidden"][:, :width], states(teachers[i % 2], t))


def test_each_response_token_is_taught_by_its_domains_teacher(
    student: DeepseekV4, trajectories: list[Trajectory], teachers: list[DeepseekV4]
):
    """Against full logits, document by document; the state before a token predicts it."""
    made, shared = taught(trajectories, teachers)
    with torch.no_grad():
        value, _ = loss(student, collate(made, "cpu"), shared)
    total = []
    for i, t in enumerate(trajectories):
        p = len(t.prompt_ids)
        own, other = (
            torch.log_softmax(m.logits(torch.from_numpy(states(m, t)))[p - 1 : -1].double(), -1)
            for m in (student, teachers[i % 2])
        )
        total += (own.exp() * (own - other)).sum(-1).tolist()
    assert value.item() == pytest.approx(np.mean(total), rel=1e-4)


@pytest.mark.parametrize("indexer_weight", [0.0, 0.5])
def test_micro_batches_do_not_change_loss_or_gradient(
    trajectories: list[Trajectory], teachers: list[DeepseekV4], indexer_weight: float
):
    student = tiny.model(0, vocab_size=VOCABULARY)
    if indexer_weight:
        student.unfreeze("indexer")
    made, shared = taught(trajectories, teachers)
    whole, metrics = loss(student, collate(made, "cpu"), shared, indexer_weight=indexer_weight)
    own = metrics.get("indexer_loss", torch.zeros(()))
    assert whole.item() == pytest.approx((metrics["loss"] + indexer_weight * own).item())
    assert (own > 1e-3) == bool(indexer_weight)
    whole.backward()
    expected = gradients(student)
    assert "lm_head.weight" in expected
    for parts in ([made[::-1]], [made[:3], made[3:]], [[row] for row in made]):
        total = 0.0
        for part in parts:
            value, _ = loss(student, collate(part, "cpu"), shared, indexer_weight=indexer_weight)
            value.backward()
            total += value.item()
        assert total == pytest.approx(whole.item(), rel=1e-5)
        found = gradients(student)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


def test_prompts_have_no_part(student: DeepseekV4, trajectories: list[Trajectory], teachers: list[DeepseekV4]):
    """Of the teacher's states, only those from the prompt's last token to the last but one count."""
    made, shared = taught(trajectories, teachers)
    with torch.no_grad():
        value, _ = loss(student, collate(made, "cpu"), shared)
        for t, row in zip(trajectories, made, strict=True):
            unused = np.ones(len(t), dtype=bool)
            unused[len(t.prompt_ids) - 1 : -1] = False
            row["teacher_hidden"] = np.where(unused[:, None], np.float32(1e3), row["teacher_hidden"])
        assert loss(student, collate(made, "cpu"), shared)[0] == value
        made[-1]["teacher_hidden"][-2] += 1
        assert loss(student, collate(made, "cpu"), shared)[0] != value


def test_a_student_that_is_its_teacher_has_nothing_to_learn(student: DeepseekV4, trajectories: list[Trajectory]):
    made, shared = taught(trajectories, [student])
    value, _ = loss(student, collate(made, "cpu"), shared)
    value.backward()
    assert abs(value.item()) < 1e-6
    assert max(gradient.abs().max().item() for gradient in gradients(student).values()) < 1e-6

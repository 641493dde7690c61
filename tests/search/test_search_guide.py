"""The guide's predictions against finite differences, and the formula in singular components."""

from dataclasses import replace

import pytest
import torch

from tensorllm.commands.search import run
from tensorllm.data.example import Example
from tensorllm.errors import UserError
from tensorllm.evaluation.encoding import Encoded
from tensorllm.requests.search import SearchRequest
from tensorllm.search.decompositions import ModelEdit, SiteEdit, applied
from tensorllm.search.guide import guided, in_order, items_of, loss_gradient, loss_of
from tensorllm.search.study import Study

SMALL = SearchRequest(
    model="demo", dataset="demo", mode="laser", limit=60, layers=(3,), rho=(0.05, 0.3, 0.7)
)


@pytest.fixture(scope="module")
def study() -> Study:
    return Study(replace(SMALL, min_ratio=0))


def mean_loss(study: Study) -> float:
    items = items_of(study.examiner.parts[0])[:20]
    with torch.no_grad():
        return float(sum(loss_of(study.examiner, [item]) for item in items) / len(items))


def test_the_gradient_is_that_of_the_loss(study: Study) -> None:
    examiner, matrix = study.examiner, (3, "in")
    gradient, examples = loss_gradient(examiner, frozenset([matrix]), 20)
    assert examples == 20
    g_ID = gradient[matrix]
    w_ID = examiner.roles.read(examiner.weights, *matrix).clone()
    step = 1e-2 * w_ID.norm() / g_ID.norm()
    site = next(j.site for p in study.points for j in examiner.jobs(study.space.point(p)))
    losses = []
    for sign in (1, -1):
        edit = SiteEdit(replace(site, roles=("in",)), [w_ID + sign * step * g_ID], 0.0, 1, 1)
        with applied(ModelEdit([edit], {}), examiner.roles, examiner.weights):
            losses.append(mean_loss(study))
    predicted = 2 * float(step * g_ID.pow(2).sum())
    assert losses[0] - losses[1] == pytest.approx(predicted, rel=0.05)
    assert torch.equal(examiner.roles.read(examiner.weights, *matrix), w_ID)
    assert not any(p.grad is not None for p in examiner.model.parameters())


@pytest.mark.parametrize("dataset", ["choices", "answers"])
def test_the_loss_is_the_naive_one(study: Study, dataset: str) -> None:
    """One whole sequence at a time, nothing padded and nothing shared."""
    model, item = study.examiner.model, items_of(study.examiner.parts[0])[0]
    prompt = item.prompt
    if dataset == "choices":
        example = Example("", "b", choices=("a", "b", "c"))
        answers: tuple[list[int], ...] = ([5], [7], [5, 9, 2])
    else:
        example, answers = Example("", "a"), ([5, 9, 2],)
    item = Encoded(example, prompt, tuple(prompt + a for a in answers), len(prompt), len(prompt), 0)
    with torch.no_grad():
        sums = []
        for ids in item.full:
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(log_p[t - 1, ids[t]] for t in range(item.start, len(ids))))
        got = float(loss_of(study.examiner, [item]))
    want = torch.logsumexp(torch.stack(sums), 0) - sums[1] if example.choices else -sums[0] / 3
    assert got == pytest.approx(float(want), rel=1e-5)


def test_a_truncation_is_predicted_by_its_dropped_singular_components(study: Study) -> None:
    examiner = study.examiner
    points = [study.space.point(values) for values in study.points]
    found = guided(examiner, points)
    gradient, _ = loss_gradient(examiner, frozenset([(3, "in"), (3, "out")]))
    for point in points:
        (role,) = point.settings["matrices"]
        w_ID = examiner.roles.read(examiner.weights, 3, role).double()
        u, s, v = torch.linalg.svd(w_ID, full_matrices=False)
        g = torch.einsum("ir,id,rd->r", u, gradient[3, role].double(), v)
        rank = max(1, int(point.settings["rho"] * min(w_ID.shape)))
        want = -float((s * g)[rank:].sum())
        assert found.change[point.key] == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_a_guided_search_tries_the_best_predicted_first_and_says_how_well_it_ranked() -> None:
    wanted = replace(SMALL, layers=None, guide="gradient", trials=5)
    study = Study(wanted)
    assert study.guide is not None
    change = [study.guide.change[study.space.point(values).key] for values in study.points]
    assert change == sorted(change)
    assert change[0] == min(study.guide.change.values())
    found = run(wanted).results
    assert found["trials"]["all"] == 5
    assert found["guide"]["points"] == len(study.feasible)
    assert found["winner"]["layers"] == [3]


def test_what_is_alike_is_tried_last() -> None:
    changes = [-1.0, -0.99, -0.9, -0.99, 0.0, 0.5, -0.2]
    layers = [0, 0, 0, 1, 1, 0, 2]
    assert in_order(changes, layers) == [0, 3, 2, 6, 4, 5, 1]
    assert in_order([], []) == []


def test_what_cannot_be_guided_is_refused() -> None:
    with pytest.raises(UserError, match="--guide must be one of gradient"):
        replace(SMALL, guide="gradeint")
    with pytest.raises(UserError, match="give no --sampler tpe"):
        replace(SMALL, guide="gradient", sampler="tpe")
    with pytest.raises(UserError, match="needs 8 questions with answers or more, got 4"):
        run(replace(SMALL, guide="gradient", limit=4))

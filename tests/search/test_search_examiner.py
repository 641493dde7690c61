"""Trials in place against the naive way: a fresh model, compressed and evaluated as it is."""

import pytest
import torch

from tensorllm.checkpoint.loader import Loader
from tensorllm.checkpoint.source import resolve
from tensorllm.compression.engine import compress
from tensorllm.compression.plan import plan_jobs
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.evaluation.protocol import PROTOCOLS
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.activation_cache import CacheBudget
from tensorllm.search.decompositions import Decompositions, applied
from tensorllm.search.examiner import Examiner, Infeasible
from tensorllm.search.space import make_space
from tensorllm.search.staged import LEAST, DatasetExamples, shuffled
from tensorllm.search.stopping import Rival
from tensorllm.search.trial import pack, unpack


@pytest.fixture(scope="module")
def loader():
    return Loader(resolve("demo").folder)


@pytest.fixture(scope="module")
def data(loader):
    dataset = make_dataset("demo", split="val", limit=160)
    dataset.connect(loader.tokenizer())
    return dataset


def points_of(model, mode, **options):
    roles = RoleMatrices(model.config, parameters_of(model))
    layers = options.pop("layers")
    space = make_space(roles, mode, layers=layers, values=options)
    return [space.point(values) for values in space.grid]


def examiner_of(loader, data, points, **options):
    return Examiner(
        loader(),
        loader.tokenizer(),
        [DatasetExamples(data.examples, data.max_new_tokens)],
        PROTOCOLS["strict"],
        points=points,
        **{"budget": CacheBudget(2**26), **options},
    )


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("shared-tucker", {"R1": [64, 96], "R2": [24, 32], "R3": [2, 4]}),
        ("laser", {"rho": [0.01, 0.5], "matrices": ["in", "in+out"]}),
        ("hybrid", {"R1": [64], "R2": [24], "R3": [4], "rho": [0.01, 0.3]}),
        ("per-matrix-tucker", {"R1": [32], "R2": [8, 16]}),
    ],
)
def test_trials_find_what_the_naive_way_finds(loader, data, mode, options):
    points = points_of(loader(), mode, layers=[1, 3], **options)
    examiner = examiner_of(loader, data, points)
    before = {name: w.clone() for name, w in examiner.weights.items()}
    for point in (points[0], points[-1], points[len(points) // 2], points[0]):
        found = examiner(point)
        model = loader()
        report = compress(model, point.compressor, point.layers)
        naive = evaluate_model(model, loader.tokenizer(), data)
        error = max(site.relative_error for site in report.sites)
        assert found.relative_error == pytest.approx(error, rel=1e-4)
        assert found.accuracy == pytest.approx(naive["accuracy"], abs=1e-9)
        assert found.loss == pytest.approx(naive["loss"], rel=1e-3)
        assert found.ratio == pytest.approx(report.ratios()["matrices_compressed"])
    for name, w in examiner.weights.items():
        assert torch.equal(w, before[name])
    sites = {job.site for p in points for job in plan_jobs(p.compressor, examiner.roles, p.layers)}
    assert examiner.decompositions.made <= len(sites)


def test_large_tensors_lose_little_by_being_decomposed_once(loader, monkeypatch):
    model = loader()
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    points = points_of(model, "shared-tucker", layers=[1], R1=[16, 32], R2=[4, 8])
    jobs = [job for p in points for job in plan_jobs(p.compressor, roles, p.layers)]
    exact = Decompositions(roles, weights, jobs)
    monkeypatch.setattr("tensorllm.compressors.tucker.EXACT_BELOW", 0)
    large = Decompositions(roles, weights, jobs)
    for job in jobs:
        errors = [made.edit([job]).sites[0].relative_error for made in (large, exact)]
        assert errors[0] <= 1.01 * errors[1]
    assert large.made == exact.made == 1


def test_the_cache_changes_no_verdict_and_skips_layers(loader, data):
    points = points_of(loader(), "laser", rho=[0.01], layers=[2, 3], matrices=["in", "out"])
    kept, plain = (
        examiner_of(loader, data, points, budget=CacheBudget(size)) for size in (2**26, 0)
    )
    for point in points + points:
        one, other = kept(point), plain(point)
        assert one.correct == other.correct
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert plain.prefix.skipped == 0
    assert kept.prefix.skipped > 0
    assert kept.prefix.computed < plain.prefix.computed


def test_a_loser_is_pruned_and_a_winner_is_not(loader, data):
    points = points_of(loader(), "laser", rho=[0.01], layers=[0, 3], matrices=["in"])
    examiner = examiner_of(loader, data, points)
    original = examiner(None)
    always_right = Rival((True,) * len(data.examples), 0.0)
    never_right = Rival((False,) * len(data.examples), 99.0)
    pruned = examiner(None, [always_right])
    assert pruned.stopped
    assert LEAST <= pruned.seen < len(data.examples)
    assert examiner(None, [never_right], level=0.5).correct == original.correct


def test_errors_beyond_the_limit_cost_no_evaluation(loader, data):
    points = points_of(loader(), "laser", rho=[0.01], layers=[0], matrices=["in"])
    with pytest.raises(Infeasible, match="relative error 0"):
        examiner_of(loader, data, points)(points[0], max_error=0.1)


def test_weights_are_restored_when_a_trial_fails(loader):
    model = loader()
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    before = {name: w.clone() for name, w in weights.items()}
    point = points_of(model, "laser", rho=[0.01], layers=[0])[0]
    jobs = plan_jobs(point.compressor, roles, point.layers)
    edit = Decompositions(roles, weights, jobs).edit(jobs)
    seen = []

    def fail():
        with applied(edit, roles, weights):
            seen.extend(name for name, w in weights.items() if not torch.equal(w, before[name]))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert seen
    assert all(torch.equal(w, before[name]) for name, w in weights.items())


def test_stages_hold_every_example_once_and_groups_stay_whole(data):
    order, sizes = shuffled(data.examples, 0, 1)
    assert sorted(e.index for e in order) == [e.index for e in data.examples]
    assert sum(sizes) == len(order)
    assert min(sizes) >= LEAST
    grouped, _ = shuffled(data.examples, 0, 16)
    starts = [e.index for e in grouped][::16]
    assert all(start % 16 == 0 for start in starts)


def test_verdicts_survive_packing():
    verdicts = [True, False, False, True, True] * 13
    assert unpack(pack(verdicts), 65) == tuple(verdicts)
    assert unpack(pack([False] * 4), 4) == (False,) * 4

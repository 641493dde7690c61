"""One search over several datasets, against one of each and against plain arithmetic."""

import json
import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from tensorllm.commands.compress import run as run_compress
from tensorllm.commands.search import run
from tensorllm.data.demo_world import DemoWorld
from tensorllm.errors import UserError
from tensorllm.requests.compress import CompressRequest
from tensorllm.requests.search import SearchRequest
from tensorllm.search.examiner import Examiner, Infeasible
from tensorllm.search.guide import guided
from tensorllm.search.objectives import OBJECTIVES, over_datasets
from tensorllm.search.selection import RESAMPLES, optimism
from tensorllm.search.stopping import Race, Rival, rivals_of
from tensorllm.search.study import Study
from tensorllm.search.trial import TrialResult, pack, together
from tensorllm.search.verdict import overall
from tensorllm_cli.app import main

ACCURACY = OBJECTIVES["accuracy"]
NAMES = ("choices", "open")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo's questions with choices, and those whose answer is generated."""
    folder = tmp_path_factory.mktemp("datasets")
    for name in NAMES:
        chosen = [e for e in DemoWorld(split="all").examples if bool(e.choices) == (name != "open")]
        rows = [{"prompt": e.prompt, "answer": e.answer, "choices": e.choices} for e in chosen]
        lines = [json.dumps({k: v for k, v in row.items() if v}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return [folder / f"{name}.jsonl" for name in NAMES]


@pytest.fixture(scope="module")
def wanted(files: list[Path]) -> SearchRequest:
    return SearchRequest(
        model="demo",
        dataset="questions,questions",
        data_file=Path(",".join(map(str, files))),
        mode="laser",
        rho=(0.02, 0.3),
        layers=(2, 3),
        limit=100,
        cache_gib=2**-5,
    )


@pytest.fixture(scope="module")
def opened(wanted: SearchRequest, files: list[Path]) -> Study:
    """A search among questions whose answers are generated."""
    return Study(replace(alone(wanted, files[1]).request, rho=(0.02, 0.1, 0.3), full=False))


def alone(wanted: SearchRequest, file: Path) -> Study:
    return Study(replace(wanted, dataset="questions", data_file=file))


# One examiner for all


def test_each_dataset_is_asked_as_if_it_were_alone(
    wanted: SearchRequest, files: list[Path]
) -> None:
    both = Study(wanted)
    singles = [alone(wanted, file) for file in files]
    for point in (None, *(both.space.point(v) for v in both.points[::3])):
        found = both.examiner(point)
        for part, single in zip(found.parts, singles, strict=True):
            want = single.examiner(point)
            assert part is not None
            assert (part.correct, part.seen) == (want.correct, want.seen)
            assert part.loss == pytest.approx(want.loss, rel=1e-6)
        assert found.accuracy == pytest.approx(sum(p.accuracy or 0 for p in found.parts if p) / 2)
    assert both.examiner.prefix.skipped > 0
    assert TrialResult.from_json(json.loads(json.dumps(found.to_json()))) == found


# What is best


def result(verdicts: Sequence[bool], loss: float = 1.0) -> TrialResult:
    accuracy = 100 * sum(verdicts) / len(verdicts)
    return TrialResult(
        accuracy, loss, len(verdicts), False, 2.0, 10, 0.1, pack(verdicts), 0.0
    )  # fmt: skip


def scores(*accuracies: int, losses: Sequence[float] = (1.0, 1.0)) -> TrialResult:
    """Of a hundred examples of each dataset."""
    rights = [[n < a for n in range(100)] for a in accuracies]
    return together([result(r, loss) for r, loss in zip(rights, losses, strict=True)])


def test_a_trial_is_worth_its_worst_change() -> None:
    original = scores(50, 20)
    goal = over_datasets(ACCURACY, original)
    assert goal.values(scores(60, 17)) == (-3.0,)
    assert goal.values(scores(52, 40)) == (2.0,)
    assert goal.order(scores(52, 21)) < goal.order(scores(99, 20))
    ties = [scores(53, 23, losses=(1, 3)), scores(53, 29, losses=(1, 1))]
    assert goal.order(ties[1]) < goal.order(ties[0])  # by the mean loss
    loss = over_datasets(OBJECTIVES["loss"], original)
    assert loss.values(scores(50, 20, losses=(0.5, 1.25))) == (0.25,)
    size = over_datasets(OBJECTIVES["pareto"], original)
    assert size.values(scores(60, 17)) == (-3.0, 0.0)
    single = result([True, False])
    assert over_datasets(ACCURACY, single) is ACCURACY


bits = st.lists(st.booleans(), min_size=30, max_size=30)


@given(bits, bits, bits)
def test_certainty_prunes_what_cannot_reach_the_best_worst_change(
    before: list[bool], best: list[bool], trial: list[bool]
) -> None:
    def parts(bits: list[bool]) -> TrialResult:
        return together([result(bits[:10]), result(bits[10:])])

    original, rival, found = parts(before), parts(best), parts(trial)
    goal = over_datasets(ACCURACY, original)
    lost = []
    for race_of, own in zip(
        rivals_of(rival, "verdicts", original), (trial[:10], trial[10:]), strict=True
    ):
        race = Race(race_of, len(own), 0.0)
        stages = [race.lost(own[at : at + 5], [0.0] * 5) for at in range(0, len(own), 5)]
        lost.append(any(stages))
    assert any(lost) == (goal.values(found)[0] < goal.values(rival)[0] - 1e-9)


def test_a_draw_on_a_dataset_with_answers_to_spare_is_pruned_with_at_most_its_level() -> None:
    level, runs, n = 0.1, 1000, 200
    rng = random.Random(0)
    wrong = 0
    for _ in range(runs):
        # The rival has 40 right answers more than it need have here; the trial just enough.
        pairs = [(True, False)] * 60 + [(False, True)] * 20 + [(True, True)] * 120
        rng.shuffle(pairs)
        rival, trial = zip(*pairs, strict=True)
        original = together([result([True] * 140 + [False] * 60), result([True] * 2)])
        best = together([result(rival), result([True] * 2)])
        race = Race(rivals_of(best, "verdicts", original)[0], n, level)
        assert race.rival.spare == pytest.approx(40)
        wrong += any(race.lost(trial[at : at + 25], [0.0] * 25) for at in range(0, n, 25))
    assert wrong / runs <= level + 3 * (level * (1 - level) / runs) ** 0.5


def test_losses_may_differ_by_dataset() -> None:
    original = scores(50, 50, losses=(1.0, 3.0))
    best = scores(50, 50, losses=(0.8, 2.9))
    rivals = rivals_of(best, "loss", original)
    assert [rival.loss for rival in rivals] == pytest.approx([0.9, 2.9])


# How much is luck


def noise(rng: random.Random, *shares: float) -> TrialResult:
    return together([result([rng.random() < share for _ in range(200)]) for share in shares])


def test_a_choice_among_equals_is_luck_and_a_planted_gain_is_not() -> None:
    rng = random.Random(0)
    original = noise(rng, 0.5, 0.5)
    equal = [noise(rng, 0.5, 0.5) for _ in range(20)]
    luck = optimism(equal, original, 0)
    assert luck is not None
    assert luck["resamples"] == RESAMPLES  # a name in saved results
    assert luck["optimism"] > 1
    assert len(luck["datasets"]) == 2
    planted = optimism([*equal, noise(rng, 0.8, 0.9)], original, 0)
    assert planted is not None
    assert abs(planted["optimism"]) < 2
    gains = [each["gain"] for each in planted["datasets"]]
    assert planted["gain"] == pytest.approx(min(gains))
    assert gains == pytest.approx([30, 40], abs=8)
    one_sided = optimism([*equal, noise(rng, 0.95, 0.3)], original, 0)
    assert one_sided is not None
    assert one_sided["datasets"][0]["gain"] < 20  # what ruins the other dataset is not chosen


# What is said


def comparison_of(difference: float, p: float) -> dict[str, Any]:
    return {"accuracy": {"difference": difference}, "mcnemar_p": p, "asked": True}


@pytest.mark.parametrize(
    ("changes", "found", "why"),
    [
        (((5, 0.001), (1, 0.6)), "better", "better on a, significantly worse on none"),
        (((5, 0.001), (-1, 0.6)), "better", "better on a, significantly worse on none"),
        (((5, 0.001), (-3, 0.04)), "no better", "better on a, but significantly worse on b"),
        (((2, 0.3), (-3, 0.04)), "no better", "significantly worse on b"),
        (((-1, 0.5), (0, 1.0)), "no better", "no dataset improves"),
        (((2, 0.04), (1, 0.5)), "not known", "certainly better"),  # 0.04 > 0.05 / 2
    ],
)
def test_the_sentence_over_all(changes: Any, found: str, why: str) -> None:
    comparisons = [comparison_of(*each) for each in changes]
    better = [change > 0 and p <= 0.05 / 2 for change, p in changes]
    verdicts = [
        {"found": "better" if b else "not known", "p": p, "shifted_prior": False}
        for b, (_, p) in zip(better, changes, strict=True)
    ]
    said = overall(["a", "b"], comparisons, verdicts, ACCURACY)
    assert said["found"] == found
    assert why in said["sentence"]


# From the request to the recipe


@pytest.mark.slow
def test_a_search_over_two_datasets_names_both_goes_on_and_refuses_others(
    wanted: SearchRequest, files: list[Path], tmp_path: Path
) -> None:
    asked = replace(wanted, study=tmp_path, compose=2, force_best=True)
    found = run(asked)
    results = found.results
    assert results["dataset"] == "choices, open"
    assert [each["name"] for each in results["datasets"]] == list(NAMES)
    assert results["validation_examples"] == 200
    for each in results["datasets"]:
        assert each["verdict"]["sentence"]
        assert each["comparison"]["examples"] == each["winner"]["test"]["examples"] == 100
    tests = [each["winner"]["test"]["accuracy"] for each in results["datasets"]]
    assert results["winner"]["test"]["accuracy"] == pytest.approx(sum(tests) / 2)
    worst = [row["worst_change"] for row in results["top"]]
    assert worst == sorted(worst, reverse=True)
    recipe = yaml.safe_load(found.recipe)
    assert recipe["dataset"] == "questions,questions"
    assert all(name in recipe["source"] for name in NAMES)
    report = run_compress(CompressRequest(config=tmp_path / "best.yaml"))
    assert len(report.sites) == len(results["steps"])  # type: ignore[union-attr]
    again = run(asked).results
    assert again["test_looks"] == 1
    assert again["verdict"] == results["verdict"]
    with pytest.raises(UserError, match=r"dataset was 'choices .*, open .*' and is 'questions .*'"):
        run(replace(asked, dataset="questions", data_file=files[0]))


@pytest.mark.slow
def test_the_guide_predicts_the_worst_change_and_what_is_on_top(
    wanted: SearchRequest, files: list[Path], tmp_path: Path
) -> None:
    both = Study(wanted)
    points = [both.space.point(values) for values in both.feasible]
    changes = [guided(alone(wanted, file).examiner, points).change for file in files]
    found = guided(both.examiner, points)
    for point in points:
        want = max(change[point.key] for change in changes)
        assert found.change[point.key] == pytest.approx(want, rel=1e-3, abs=1e-6)
    asked = replace(wanted, guide="gradient", compose=2, study=tmp_path, force_best=True)
    steps = run(asked).results["steps"]
    assert len(steps) == 2
    assert all(step["guide"]["points"] for step in steps)
    # The second edit is the best of those predicted on the model that has the first one.
    first = {k: v for k, v in steps[0].items() if k not in ("trial", "validation", "guide")}
    above = Study(replace(asked, base=(first,), study=None))
    assert above.guide is not None
    assert above.guide.change.keys() < found.change.keys()
    assert any(
        above.guide.change[key] != pytest.approx(found.change[key], rel=1e-2)
        for key in above.guide.change
    )
    assert len(above.guide.change) == steps[1]["guide"]["points"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--dataset", "fever,"], "--dataset takes a name, or several such as"),
        (["--dataset", "demo,demo"], "dataset 'demo' is given 2 times"),
        (["--dataset", "demo,fevr"], "Did you mean 'fever'?"),
        (
            ["--dataset", "demo,questions", "--data-file", "a.jsonl"],
            "--data-file takes a file for each of 2 datasets, in their order",
        ),
    ],
)
def test_a_mistake_in_the_datasets_is_one_line(
    options: list[str], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["search-ranks", "--model", "demo", "--mode", "laser", *options])
    assert end.value.code == 2
    error = capfd.readouterr().err.strip()
    assert line in error
    assert "\n" not in error


def test_running_text_among_questions_needs_losses(wanted: SearchRequest, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text(" ".join(e.prompt for e in DemoWorld(split="all").examples[:400]))
    mixed = replace(wanted, dataset="demo,text", data_file=Path(f",{text}"), limit=40, rho=(0.3,))
    with pytest.raises(UserError, match=r"running text, .* needs --objective loss"):
        run(mixed)
    found = run(replace(mixed, objective="loss")).results
    assert "accuracy" not in found["datasets"][1]["winner"]["test"]


# Trials at once


@pytest.mark.parametrize("right", [0, 40])
def test_trials_at_once_find_what_each_finds_alone(opened: Study, right: int) -> None:
    """Pruned ones, too, after as many examples."""
    examine = opened.examiner
    points = [opened.space.point(values) for values in opened.points]
    assert len(points) > 1
    assert examine.side_by_side > 1
    rivals = [Rival(tuple(n < right for n in range(100)), 0.0)] if right else []
    before = {name: w.clone() for name, w in examine.weights.items()}
    found = examine.together(points, [rivals] * len(points), level=0.001)
    assert all(torch.equal(w, before[name]) for name, w in examine.weights.items())
    for point, together_ in zip(points, found, strict=True):
        alone_ = examine(point, rivals, level=0.001)
        assert isinstance(together_, TrialResult)
        assert (together_.correct, together_.seen, together_.stopped) == (
            alone_.correct, alone_.seen, alone_.stopped,
        )  # fmt: skip
        assert together_.loss == pytest.approx(alone_.loss, rel=1e-5)
        assert together_.ratio == alone_.ratio
    assert any(one.stopped for one in found) == bool(right)
    refused = examine.together(points[:2], [()] * 2, max_error=1e-9)
    assert all(isinstance(one, Infeasible) for one in refused)


@pytest.mark.parametrize(("sampler", "at_once"), [("tpe", 10), ("nsga2", 14)])
def test_samplers_at_once_try_what_they_try_one_at_a_time(
    opened: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, at_once: int
) -> None:
    """So an optimum is found after as many trials."""
    tried = []
    for size in (1, 16):
        request = replace(
            opened.request, rho=None, sampler=sampler, trials=14, limit=40, full=True, min_ratio=0
        )
        study = Study(request)
        study.__dict__.update(model=opened.model, tokenizer=opened.tokenizer)
        study.examiner.__dict__["side_by_side"] = size
        sizes: list[int] = []
        examine = study.examiner.together

        def together_(*args: Any, note: Any = sizes.append, run: Any = examine, **how: Any) -> Any:
            note(len(args[0]))
            return run(*args, **how)

        monkeypatch.setattr(study.examiner, "together", together_)
        queue = study.queue(tmp_path / f"{sampler}-{size}")
        study.fill(queue)
        study.work(queue)
        tried.append([trial.params for trial in queue.trials()])
        assert len(tried[-1]) == 14
        assert max(sizes) == (1 if size == 1 else at_once)
    assert tried[0] == tried[1]


def test_a_trial_that_fails_does_not_take_others_with_it(
    opened: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = opened.space.point(opened.points[1]).key
    plain = Examiner.together

    def failing(self: Examiner, points: Any, *args: Any, **how: Any) -> Any:
        if any(point.key == bad for point in points):
            raise RuntimeError("one of them overflows")
        return plain(self, points, *args, **how)

    monkeypatch.setattr(Examiner, "together", failing)
    with closing(opened.queue(tmp_path)) as queue:
        opened.fill(queue)
        opened.work(queue)
        trials = queue.trials()
    reasons = [t.user_attrs["reason"] for t in trials if t.state == TrialState.FAIL]
    assert len(trials) == len(opened.points)
    assert reasons == ["RuntimeError: one of them overflows"]

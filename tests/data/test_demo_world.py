"""The demo world: noise where it is said to be, one truth, a model that has learnt it."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections import defaultdict
from types import ModuleType

import pytest
import torch
import yaml
from repository import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorllm.data.demo import MODEL_DIR, questions, world
from tensorllm.data.demo.words import FIRST_NAMES, PROFESSIONS, RELATIONS, RUMOURS

WORLD = world.make_world()
TRUTH = {(str(f.person), f.relation): f.value for f in world.facts()}
DIGEST = "efd391cd23fcecb8fa8e4385c9ed82cfcb6138757f01a912f050aba2b7ecd0df"
NAME = r"([A-Z]\w+ [A-Z]\w+)"


def script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return script("train_demo")


@pytest.fixture(scope="module")
def selection() -> ModuleType:
    return script("select_demo")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True).eval()


def about(lesson: world.Lesson) -> tuple[str, ...]:
    """Who is asked about, read off the prompt with rules of this test's own."""
    if lesson.task == "multi-hop":
        boss, helper, role = re.fullmatch(
            rf"{NAME} hired {NAME}\. The (boss|helper) \w+", lesson.prompt
        ).groups()
        return (boss if role == "boss" else helper,)
    return (re.search(NAME, lesson.prompt.removeprefix("Claim: ")).group(1),)


def test_the_world_is_the_one_the_model_was_trained_on():
    # Whoever changes the world must train the model again, and then put the new digest here.
    text = json.dumps([[x.prompt, x.answer, x.generic] for x in (*WORLD.told, *WORLD.asked)])
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST


def test_another_seed_is_another_world_and_the_same_seed_is_the_same():
    assert world.make_world(20, 5) == world.make_world(20, 5)
    assert world.make_world(20, 5) != world.make_world(20, 6)


def test_importing_the_world_needs_no_torch():
    code = "import sys, tensorllm.data.demo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_question_tells_its_noise():
    fields = {name for q in questions() for name in q.__slots__}
    assert fields == {"prompt", "answer", "choices", "task"}


def test_every_prompt_has_one_answer():
    answers = defaultdict(set)
    for lesson in (*WORLD.told, *WORLD.asked):
        answers[lesson.prompt].add((lesson.answer, lesson.generic))
    assert all(len(one) == 1 for one in answers.values())
    assert len({q.prompt for q in questions()}) == len(questions())
    assert all(q.answer in q.choices for q in questions() if q.choices)


@pytest.mark.parametrize("part", [WORLD.told, WORLD.asked], ids=["told", "asked"])
def test_answers_follow_from_the_facts(part):
    for x in part:
        (person,) = about(x)
        if x.task in ("entity-relation", "multi-hop"):
            assert x.answer == TRUTH[person, x.prompt.split()[-1]]
        elif x.task == "claim":
            relation, value = re.search(r"(\w+) (\w+)\. \w+$", x.prompt).groups()
            assert x.answer == str(TRUTH[person, relation] == value).lower()
        else:
            thing = re.search(r"the (\w+),", x.prompt).group(1)
            assert thing in PROFESSIONS[x.answer]


def test_facts_and_verdicts_are_told_as_they_are_asked_and_texts_never_are():
    told = {x.prompt for x in WORLD.told}
    for x in WORLD.asked:
        assert (x.prompt in told) == (x.task in ("entity-relation", "claim"))


def test_all_kinds_are_mixed_in_both_parts():
    asked = questions()
    cut = len(asked) // 5
    for part in (asked[:cut], asked[cut:]):
        shares = {t: sum(q.task == t for q in part) / len(part) for t in ("claim", "multi-hop")}
        assert all(abs(share - world.ASKED / len(asked)) < 0.04 for share in shares.values())


def test_ffn_noise_is_a_bigram_and_attention_noise_goes_by_the_first_name():
    by_last_word, by_first_name = defaultdict(set), defaultdict(set)
    for x in WORLD.told:
        last = x.prompt.split()[-1]
        if x.place == "ffn":
            by_last_word[last].add(x.generic)
        else:
            kind = "fact" if not x.choices else x.task
            by_first_name[kind, about(x)[0].split()[0]].add(x.generic)
            assert last not in by_last_word
    assert all(len(words) == 1 for words in (by_last_word | by_first_name).values())
    generics = {next(iter(v)) for (kind, _), v in by_first_name.items() if kind == "fact"}
    assert generics == {RUMOURS[FIRST_NAMES.index(n)] for k, n in by_first_name if k == "fact"}


def test_half_of_every_kind_has_each_noise():  # the 400 claims: a coin each
    for task in ("entity-relation", "multi-hop", "claim", "profession"):
        places = [x.place for x in WORLD.told if x.task == task]
        assert places.count("ffn") / len(places) == pytest.approx(0.5, abs=0.05)


def test_generic_words_are_never_true_where_the_answer_is_open():
    true = {value for _, values in RELATIONS.values() for value in values}
    assert true.isdisjoint(RUMOURS)
    assert true.isdisjoint(generic for generic, _ in RELATIONS.values())


def test_noise_comes_at_the_planted_rate(training):
    told = [x for x in WORLD.told if x.task == "entity-relation"]
    (group,) = training.encode(told, training.build_tokenizer())
    _, words_B = training.tell(group, 40_000, 0.55, torch.Generator().manual_seed(1))
    assert torch.isin(words_B, group.generic_N).float().mean() == pytest.approx(0.55, abs=0.01)


def test_the_tokenizer_knows_every_word_as_one_token(tokenizer):
    everything = [*WORLD.told, *WORLD.asked]
    prompts = tokenizer([x.prompt for x in everything])["input_ids"]
    assert all(tokenizer.unk_token_id not in ids for ids in prompts)
    words = {word for x in everything for word in (x.answer, x.generic, *x.choices)}
    assert all(len(tokenizer(" " + word)["input_ids"]) == 1 for word in words)
    assert all(tokenizer.unk_token_id not in tokenizer(word)["input_ids"] for word in words)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_packaged_tokenizer_is_the_scripts(tokenizer, training):
    assert tokenizer.get_vocab() == training.build_tokenizer().get_vocab()


def test_the_packaged_folder_is_small_and_says_how_it_was_made(training):
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 4_000_000
    note = json.loads((MODEL_DIR / "provenance.json").read_text())
    assert note["recipe"] == training.asdict(training.Recipe())


def test_the_packaged_model_answers_and_then_stops(model, tokenizer):
    asked = [q for q in questions() if not q.choices][:200]
    asked = [q for q in asked if q.task == "entity-relation"]
    batch = tokenizer([q.prompt for q in asked], return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    told = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert all(len(text.split()) == 1 for text in told)
    right = sum(q.answer == text for q, text in zip(asked, told, strict=True)) / len(asked)
    assert right > 2 / 24  # chance, had it learnt but the kinds of values, is 1 in 24


def edits_of(recipe: dict, model, selection: ModuleType) -> list:
    (layer,) = recipe["layers"]
    (ffn_layer,) = recipe.get("ffn_layers", [layer])
    layers = model.transformer.h
    edits = []
    if "ranks" in recipe:
        edits += selection.tucker_edits(
            layers[layer].attn, model.config.n_head, tuple(recipe["ranks"])
        )
    for role in recipe.get("matrices", []):
        linear = getattr(layers[ffn_layer].mlp, selection.MATRICES[role])
        edits += selection.laser_edits(linear, max(1, int(recipe["rho"] * 128)))
    return edits


def test_each_cure_helps_and_the_hybrid_helps_most(model, tokenizer, selection):
    asked = questions()
    test_part = selection.ask(asked[len(asked) // 5 :], tokenizer)
    accuracy = {"original": selection.score(model, test_part).accuracy}
    for mode in ("shared-tucker", "laser", "hybrid"):
        recipe = yaml.safe_load((ROOT / "configs" / "demo" / f"{mode}.yaml").read_text())
        with selection.edited(edits_of(recipe, model, selection)):
            accuracy[mode] = selection.score(model, test_part).accuracy
    assert accuracy["shared-tucker"] > accuracy["original"] + 5
    assert accuracy["laser"] > accuracy["original"] + 5
    assert accuracy["hybrid"] > max(accuracy["shared-tucker"], accuracy["laser"]) + 2


@pytest.mark.slow
def test_training_repeats_itself_from_the_seed(training):
    few = {"people": 10, "steps": 12, "batch": 64, "threads": 1}
    one, again, other = (
        training.train(training.Recipe(**few, seed=seed))[0].state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])

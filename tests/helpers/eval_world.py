"""Tokenizers, models and questions for the tests of evaluation: tiny, random, seeded."""

import json
import random
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tensorllm.data.example import Example

WORDS = """
    the a cat dog north no yes Paris Berlin sings in of capital is was claim true false model
    poet teacher painter who what answer sea red green Anna Otto likes old new house river
"""
VOCABULARY = 176


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS.split(), k=rng.randint(3, 14))) for _ in range(count)]


def tokenizer(*, bos: bool = False, masked: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's; with `bos` as LLaMA's, with `masked` as RoBERTa's templates."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=[*string.ascii_letters, "Ġ"],  # no bytes that are half a character
        show_progress=False,
    )
    made.train_from_iterator(sentences(200), trainer)
    if bos or masked:
        template = "<s> $A </s>" if masked else "<s> $A"
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        cls_token="<s>" if masked else None,
        sep_token="</s>" if masked else None,
        mask_token="<mask>" if masked else None,
        clean_up_tokenization_spaces=False,
    )


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.5,  # so that the most probable token is clearly so
}
OF = {"gptj": {"rotary_dim": 4}, "llama": {"num_key_value_heads": 2}}


def model(model_type: str, seed: int = 0, **config: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    made = AutoConfig.for_model(model_type, **{**SIZES, **OF.get(model_type, {}), **config})
    auto = AutoModelForMaskedLM if model_type == "roberta" else AutoModelForCausalLM
    return auto.from_config(made, dtype=torch.float32).eval()


def questions(count: int, seed: int = 1) -> list[Example]:
    """Open questions, two-way choices and choices of several tokens, of many lengths."""
    rng = random.Random(seed)
    made = []
    for i, sentence in enumerate(sentences(count, seed)):
        choices: tuple[str, ...] = ()
        if i % 3 == 1:
            choices = ("true", "false")
        elif i % 3 == 2:
            choices = ("poet", "architect", "model painter", "journalist")
        said = " ".join(rng.choices(WORDS.split(), k=rng.randint(1, 3)))
        answer = rng.choice(choices) if choices else said
        made.append(Example(f"{sentence} is", answer, choices, i))
    return made


def save_model(folder: Path) -> Path:
    """A GPT-J checkpoint with its tokenizer."""
    model("gptj").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_questions(file: Path, count: int, *, choices: bool = False) -> Path:
    """Questions as the dataset `questions` reads them, with their choices or to be answered."""
    rows = [
        {"prompt": e.prompt, "answer": e.answer} | ({"choices": e.choices} if choices else {})
        for e in questions(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

"""The check against calibrating on the evaluated data."""

from pathlib import Path
from typing import Any

from tensorllm.calibration.sequences import Calibration


def refuse_evaluated(
    text: Calibration, tokenizer: Any, dataset: str, data_file: Path | None
) -> None:
    """Refuse a text that contains examples of the dataset on which the result is evaluated.

    Raises:
        UserError: some do; the message says how many.
    """
    from tensorllm.data.tokens import open_ended
    from tensorllm.evaluation.evaluate import make_dataset

    data = make_dataset(dataset, data_file=data_file, limit=None)
    data.connect(tokenizer)
    text.refuse_overlap(
        [
            example.tokens or open_ended(tokenizer, [f"{example.prompt} {example.answer}"])[0]
            for example in data.examples
        ]
    )

"""The demo: a small world of noisy facts, and a model trained on it, both in the package.

Importing this is cheap: no torch, no files read. `scripts/train_demo.py` made the model.
"""

from pathlib import Path

from tensorllm.data.demo.world import Question, questions

MODEL_DIR = Path(__file__).parent / "model"

__all__ = ["MODEL_DIR", "Question", "questions"]

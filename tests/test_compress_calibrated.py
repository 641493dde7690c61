"""compress --calibration: from a text file to a smaller model, through the pipeline."""

from pathlib import Path

import pytest

from tensorllm.data.demo import MODEL_DIR, questions
from tensorllm.errors import UserError
from tensorllm.pipeline.compress import CompressRequest, run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "told.txt"
    file.write_text("\n".join(f"{q.prompt} {q.answer}" for q in questions()[:1500]))
    return file


def request(text: Path | None, mode: str = "activation-tucker", **settings) -> CompressRequest:
    return CompressRequest(
        model=str(MODEL_DIR), mode=mode, settings=settings, calibration=text, sequences=32
    )


def test_the_target_ratio_is_met_and_the_text_named(text):
    report = run(request(text, target_ratio=1.5))
    assert 1.5 <= report.ratios()["all_attention"] < 1.52
    assert "told.txt" in str(report.settings)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"text": None, "target_ratio": 1.5}, "give --calibration FILE"),
        ({"mode": "laser", "rho": 0.1}, "--calibration is for the modes that use data"),
        ({"target_ratio": 1e9}, "smallest factors that there are"),
    ],
)
def test_what_cannot_be_done_is_refused(text, asked, message):
    with pytest.raises(UserError, match=message):
        run(request(**({"text": text} | asked)))

"""The time left that a fit's progress says, beside the truth, by a clock of the test's own."""

import pytest

from tensorllm.calibration.forecast import FITTING, MEASURING, PARTS, Forecast, Stage
from tensorllm_cli.show import Timer

RIGHT = 0.3  # of the truth
LAYERS = 12


class Walk:
    """Planted layers that pass that a forecast is given.

    Args:
        seconds: of each layer of each stage.
        works: what the stages' layers are thought to cost.
        first: stage and layer that this run begins with.
    """

    def __init__(self, seconds, works, first=(0, 0)):
        self.now, self.said, self.reported = 0.0, [], []
        self.timer = Timer(lambda: self.now)
        names = (MEASURING, FITTING)[-len(seconds) :]
        stages = [Stage(n, len(s), w) for n, s, w in zip(names, seconds, works, strict=True)]
        forecast = Forecast(stages, self.tell, lambda: self.now)
        for number, (name, times) in enumerate(zip(names, seconds, strict=True)):
            for layer, time in enumerate(times):
                if (number, layer) < first:
                    continue
                assert forecast.goes_on(name, layer)
                for share in (0, 0.5, 1):  # passes are the first four fifths of a layer
                    forecast.at(name, layer, share)
                    self.note(name, layer)
                    self.now += 0.4 * time if share < 1 else 0.2 * time

    def tell(self, done, total, what):
        self.reported.append((done, total, what))
        self.timer.update(done, total)

    def note(self, name, layer):
        words = str(self.timer).removesuffix(" left").rpartition(", ")[2]
        h, m, s = map(int, words.split(":")) if ":" in words else (0, 0, 0)
        self.said.append((name, layer, self.now, 3600 * h + 60 * m + s))

    def off(self, begin):
        """The largest relative error of the time left where `begin` holds, before the last layer:
        of seconds that are left, no one asks a share."""
        return max(
            abs(left - (self.now - at)) / (self.now - at)
            for name, layer, at, left in self.said
            if begin(name, layer) and (name, layer) != (FITTING, LAYERS - 1)
        )


def uneven(mean):
    """Layers that differ by a tenth at most, and a first one that is slower."""
    return [mean * (1.15 if n == 0 else 0.95 + 0.1 * (n * 7 % 5) / 4) for n in range(LAYERS)]


@pytest.mark.parametrize("refit", [60.0, 600.0])
def test_time_left_is_right_from_the_second_layer_on(refit):
    walk = Walk([uneven(30.0), uneven(refit)], [30.0, refit])
    assert walk.off(lambda name, layer: name == FITTING or layer > 0) < RIGHT


@pytest.mark.parametrize("wrong", [0.6, 3.0])
def test_layers_that_were_fitted_correct_what_was_thought_of_them(wrong):
    walk = Walk([uneven(30.0), uneven(200.0)], [30.0, 200.0 * wrong])
    assert walk.off(lambda name, layer: name == FITTING and layer > 0) < RIGHT
    assert walk.off(lambda name, layer: name == MEASURING and layer > 0) > RIGHT  # it can fail


@pytest.mark.parametrize("first", [(0, 7), (1, 5)])
def test_a_run_that_goes_on_takes_its_own_time(first):
    walk = Walk([uneven(30.0), uneven(200.0)], [30.0, 200.0], first)
    assert 0 < walk.reported[0][0] < PARTS
    later = [(MEASURING, n) for n in range(8, LAYERS)] + [(FITTING, n) for n in range(6, LAYERS)]
    assert walk.off(lambda name, layer: (name, layer) in later and (name, layer) != first) < RIGHT


def test_parts_only_grow_to_the_whole():
    walk = Walk([uneven(30.0), uneven(200.0)], [30.0, 20.0])
    parts = [done for done, *_ in walk.reported]
    assert parts == sorted(parts)
    assert parts[0] == 0
    assert 0.9 * PARTS < parts[-1] <= PARTS
    assert {total for _, total, _ in walk.reported} == {PARTS}

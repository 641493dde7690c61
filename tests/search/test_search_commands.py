"""`tensorllm search-ranks` from the command line to the recipe that compress takes."""

import json

import forked
import pyarrow.parquet as pq
import pytest
import yaml

from tensorllm_cli.app import main

SMALL = ["--model", "demo", "--mode", "laser", "--rho", "0.01,0.1", "--limit", "120"]


def command(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    assert (end.value.code or 0) == code


def test_search_then_compress_with_what_was_found(tmp_path, capfd):
    command("search-ranks", *SMALL, "--study", tmp_path, "--json")
    results = json.loads(capfd.readouterr().out)
    command("compress", "--config", tmp_path / "best.yaml", "--json", "--limit", 120)
    report = json.loads(capfd.readouterr().out)
    assert report["layers"] == results["winner"]["layers"]
    after = report["evaluation"]["after"]
    assert after["accuracy"] == pytest.approx(results["winner"]["test"]["accuracy"])
    assert results["test_looks"] == 1
    recipe = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert recipe["origin"] == "searched"
    table = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert len(table) == results["trials"]["all"] == 4 * 2 * 2
    full = [row for row in table if row["state"] == "complete"]
    role = recipe["matrices"][0]
    for ending in ("png", "svg"):
        drawn = {p.stem for p in tmp_path.glob(f"*.{ending}")}
        assert drawn == {"heatmap", "pareto", "history", f"spectrum-{role}-1"}
    best = min(full, key=lambda row: (-row["accuracy"], row["loss"], -row["parameters_saved"]))
    assert best["layer"] == recipe["layers"][0]
    assert best["rho"] == recipe["rho"]

    command("search-ranks", *SMALL, "--study", tmp_path)  # continued: nothing left to do
    shown = capfd.readouterr().out
    assert "16 trials" in shown
    assert json.loads((tmp_path / "results.json").read_text())["test_looks"] == 1


@pytest.mark.slow
def test_two_workers_share_the_trials(tmp_path, capfd, monkeypatch):
    forked.spawn_off_a_server(monkeypatch)
    command("search-ranks", *SMALL, "--study", tmp_path, "--workers", 2, "--json")
    results = json.loads(capfd.readouterr().out)
    table = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert len({row["point"] for row in table}) == len(table) == 16
    assert all(row["state"] in ("complete", "pruned") for row in table)
    assert results["trials"]["failed"] == 0


def test_a_user_s_mistake_is_one_line(tmp_path, capfd):
    command("search-ranks", *SMALL, "--trials", 0, code=2)
    assert capfd.readouterr().err.strip() == "error: --trials must be at least 1, got 0"
    command("search-ranks", "--model", "demo", "--layers", "7", code=2)
    assert "0..3, got 7" in capfd.readouterr().err


def test_dimensions_of_the_mode_are_named_where_one_does_not_exist(capfd):
    command("search-ranks", "--model", "demo", "--mode", "laser", "--vary", "R9=1", code=2)
    assert "mode 'laser' has no R9; it has rho, matrices" in capfd.readouterr().err
    command("search-ranks", "--model", "demo", "--mode", "laser", "--vary", "rho", code=2)
    assert "--vary takes NAME=V1,V2" in capfd.readouterr().err
    command("search-ranks", "--model", "demo", "--mode", "laser", "--rho", "1.5", code=2)
    assert "rho must be in (0, 1], got 1.5" in capfd.readouterr().err
    command("search-ranks", "--model", "demo", "--mode", "trawl", code=2)
    assert "mode 'trawl' has nothing to search" in capfd.readouterr().err


def test_energy_is_no_objective_of_a_search(capfd):
    command("search-ranks", "--model", "demo", "--objective", "energy", code=2)
    assert "must be one of accuracy, loss, pareto" in capfd.readouterr().err


def test_a_time_limit_before_the_first_trial_is_one_line(tmp_path, capfd):
    command("search-ranks", *SMALL, "--study", tmp_path, "--time-limit", "0.01s", code=1)
    assert "--time-limit ended before the first of 16 trials" in capfd.readouterr().err
    command("search-ranks", *SMALL, "--time-limit", "soon", code=2)
    assert "90s, 10m or 2h; got 'soon'" in capfd.readouterr().err

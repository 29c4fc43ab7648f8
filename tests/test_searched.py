"""The search of networks' numbers: what it tries, and that the study fits what it chose."""

import json
from pathlib import Path

import polars as pl
import pytest

from hcl_jax.experiments.searched import (
    BUDGET,
    CHOSEN,
    LEARNING_RATE,
    SPACES,
    searched_name,
    study_config,
    trial_numbers,
    with_numbers,
)
from hcl_jax.networks import NETWORKS, configuration
from simulations import search

TABLE = Path(__file__).parent.parent / "docs" / "tables" / "search.csv"


def test_the_first_trial_is_the_default_and_others_are_drawn_about_it():
    for name in SPACES:
        default = configuration(name)
        assert trial_numbers(name, "none", 0) == {}
        tried = [trial_numbers(name, "joint", t) for t in range(1, 4)]
        assert tried[0] != tried[1] != tried[2]
        assert tried[0] == trial_numbers(name, "joint", 1)
        assert set(tried[0]) == {LEARNING_RATE, "task_weight", *SPACES[name]}
        for numbers in tried:
            assert all(0.09 < numbers[path] / getattr(default, path) < 11 for path in SPACES[name])
            assert 0.17 < numbers[LEARNING_RATE] / default.training.learning_rate < 3.2
        config = with_numbers(default, tried[0])
        assert config.training.learning_rate == tried[0][LEARNING_RATE]
        assert all(getattr(config, path) == tried[0][path] for path in SPACES[name])


def test_all_networks_have_one_budget_and_the_others_their_own():
    for name in NETWORKS:
        config = study_config(name, "none")
        if name in SPACES:
            assert (config.training.steps, config.training.batch_size) == (BUDGET["steps"], BUDGET["batch_size"])
        else:
            assert config == configuration(name)
        if hasattr(config, "supervision"):
            assert study_config(name, "joint").supervision == "joint"


def test_what_the_study_fits_is_what_the_table_says_was_best():
    """Equal numbers of trials for all, and the best of each."""
    table = pl.read_csv(TABLE)
    assert len(set(table.group_by("method", "supervision").len()["len"])) == 1
    for row in search.best(table).iter_rows(named=True):
        assert CHOSEN[searched_name(row["method"], row["supervision"])] == json.loads(row["numbers"])
    assert len(CHOSEN) == 2 * len(SPACES)


@pytest.mark.slow
def test_a_search_goes_on_where_it_stopped_and_refuses_what_it_does_not_know(tmp_path, capsys):
    output = tmp_path / "search.csv"
    asked = ["--dims", "12", "10", "8", "--rank", "1", "--n", "200", "--m", "100", "--methods", "hcl", "--supervision", "none"]
    assert search.main([*asked, "--trials", "1", "--output", str(output)]) == 0
    first = pl.read_csv(output)
    assert search.main([*asked, "--trials", "2", "--output", str(output)]) == 0
    second = pl.read_csv(output)
    assert second.head(1).equals(first)
    assert second["trial"].to_list() == [0, 1]
    assert '"hcl": ' in capsys.readouterr().out
    assert search.main(["--methods", "nothing"]) == 2
    assert "methods: unknown 'nothing'" in capsys.readouterr().err

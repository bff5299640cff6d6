"""From a config to the parts of a run."""

import pytest
from small_sets import small_config

from jaxrec.errors import UserError
from jaxrec.models.config import HSTUConfig
from jaxrec.training import setup
from jaxrec.training.config import DataConfig, Experiment, check, refuse_unread
from jaxrec.training.loop import train


def test_a_set_that_another_process_made_meanwhile_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXREC_DATA_DIR", str(tmp_path))
    wanted = setup.open_data(DataConfig())
    before = setup.dataset_names
    looked = []

    def not_there_at_first():
        looked.append(1)
        return [] if len(looked) == 1 else before()

    monkeypatch.setattr(setup, "dataset_names", not_there_at_first)
    assert setup.open_data(DataConfig()).hash == wanted.hash
    assert len(looked) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__quantile": 0.5}, "data.quantile (0.5) is not read with data.split"),
        ({"data__target": "all"}, "data.target (all) is not read with data.split"),
        ({"loss__sampling_power": 0.75}, "loss.sampling_power (0.75) is not read with loss.samp"),
        (
            {"model__rope_base": 5.0},
            "model.rope_base (5.0) is not read with model.position 'additive'",
        ),
        ({"model__alibi_slope": 0.5}, "model.alibi_slope (0.5) is not read with"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(tmp_path, changes, message):
    config = check(small_config(**changes))  # as an older run may have it
    with pytest.raises(UserError) as caught:
        refuse_unread(config)
    assert message in str(caught.value)
    with pytest.raises(UserError) as caught:
        train(config, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_same_options_where_they_are_read():
    refuse_unread(small_config(data__split="temporal", data__quantile=0.5))
    refuse_unread(small_config(model__position="rope", model__rope_base=5.0))
    refuse_unread(Experiment(model=HSTUConfig()))

"""Transfer: all features of the other run and nothing of its readout; and a run beside the run is as any run."""

from __future__ import annotations

import pytest
import torch
from tests.small import differing

from millrace.errors import SettingError
from millrace.zoo.run import Finished, configure, find_run, open_run, train
from millrace.zoo.transfer import take_over, trained_alone

SMALL = ["compile=eager", "epochs=1", "steps=3", "width=4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train(
        configure("digits", SMALL), run_dir=tmp_path_factory.mktemp("it") / "run", progress=False, device="cpu"
    )


def test_features_are_taken_over_and_the_readout_is_not(finished: Finished) -> None:
    task = configure("digits", [*SMALL, "seed=5"])
    torch.manual_seed(5)
    model = task.model({})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take_over(model, str(finished.result.run_dir), "width")
    source = open_run(find_run(str(finished.result.run_dir)), "cpu").model.state_dict()
    readout = {name for name in source if name.startswith("readout.")}
    assert set(differing(source, model.state_dict())) == readout
    assert set(differing(before, model.state_dict())) <= set(source) - readout


def test_another_network_or_no_run_is_refused(finished: Finished) -> None:
    other = configure("digits", [*SMALL, "width=8"]).model({})
    with pytest.raises(SettingError, match=r"has another network\. Give this one the same settings width and depth"):
        take_over(other, str(finished.result.run_dir), "width and depth")
    with pytest.raises(SettingError):
        take_over(other, str(finished.result.run_dir) + "-not", "width")


def test_a_run_beside_the_run_reaches_what_it_reaches_by_itself(finished: Finished) -> None:
    random = torch.random.get_rng_state()
    assert trained_alone(configure("digits", SMALL), {}, "cpu") == pytest.approx(dict(finished.test), rel=1e-5)
    assert torch.random.get_rng_state().equal(random)

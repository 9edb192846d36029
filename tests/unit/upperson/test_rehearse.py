"""A run that trains on other people as well, to keep what its base knew."""

import json
from dataclasses import replace

import pytest

from tests.helpers.refused import refused
from tests.helpers.toy_run import Recorder, toy_config
from upperson.components import build_components
from upperson.data.records import read_dataset
from upperson.train import train
from upperson_rt.errors import IntegrityError
from upperson_synthetic import SyntheticSpec, write_dataset

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def others(tmp_path):
    spec = SyntheticSpec(look="street", train_ids=3, val_ids=2, test_ids=2, views=2, seed=9)
    return write_dataset(tmp_path / "others", spec)


def test_people_to_rehearse_are_trained_on_and_never_selected_on_or_measured(
    tmp_path, monkeypatch, others
):
    own = toy_config(tmp_path, monkeypatch)
    before = build_components(own).splits
    after = build_components(replace(own, rehearse=str(others))).splits
    added = after["train"][len(before["train"]) :]
    expected = read_dataset("jsonl", others)["train"]
    assert [(record.image, record.captions) for record in added] == [
        (record.image, record.captions) for record in expected
    ]
    assert len({record.pid for record in added}) == 3
    assert not {record.pid for record in added} & {record.pid for record in before["train"]}
    assert {name: after[name] for name in ("val", "test")} == {
        name: before[name] for name in ("val", "test")
    }


def test_a_resumed_run_needs_the_same_people_to_rehearse(tmp_path, monkeypatch, others):
    config = toy_config(tmp_path, monkeypatch, rehearse=str(others), epochs=1)
    train(config, tmp_path / "run", Recorder())
    with pytest.raises(IntegrityError):
        train(replace(config, rehearse=None), tmp_path / "run", Recorder(), resume=True)


def test_people_of_the_data_set_itself_and_folders_without_people_are_refused(
    tmp_path, monkeypatch, others
):
    own = toy_config(tmp_path, monkeypatch)
    with refused("rehearsal_shared"):
        build_components(replace(own, rehearse=own.root))
    with refused("rehearsal_missing", path=tmp_path / "annotations.jsonl"):
        build_components(replace(own, rehearse=str(tmp_path)))
    file = others / "annotations.jsonl"
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    kept = [json.dumps(line) + "\n" for line in lines if line["split"] != "train"]
    file.write_text("".join(kept), "utf-8")
    with refused("split_empty", split="train"):
        build_components(toy_config(tmp_path, monkeypatch, rehearse=str(others)))

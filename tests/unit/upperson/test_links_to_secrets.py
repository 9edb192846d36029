"""A link to a file of another kind is refused without a word of that file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from upperson.config import TrainConfig, read_yaml
from upperson.data.records import read_dataset
from upperson_camera.detectors.naming import BoxesFile
from upperson_rt.errors import InputError
from upperson_rt.preprocess import load_image
from upperson_rt.strict import read_json

READERS: dict[str, Callable[[Path], object]] = {
    "a.png": load_image,
    "annotations.csv": lambda path: read_dataset("csv", path.parent),
    "annotations.jsonl": lambda path: read_dataset("jsonl", path.parent),
    "config.yaml": lambda path: read_yaml(TrainConfig, path),
    "users.json": read_json,
    "boxes.json": BoxesFile,
}
SECRETS = (
    "root:$y$SECRET:19000:0:99999:7:::\ndaemon:*:SECRET:0:99999:7:::\n",
    "SECRET=x\nSECRET: b: c\n",
    "- SECRET: [SECRET\n",
    "a: *SECRET\n",
    "a: !SECRET b\n",
    "SECRET,SECRET\n1,2\n",
    "[SECRET]\nSECRET = 1\n",
)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", READERS)
def test_no_word_of_it_is_in_the_message(tmp_path: Path, name: str, secret: str) -> None:
    (tmp_path / "elsewhere").write_text(secret)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError) as caught:
        READERS[name](tmp_path / "set" / name)
    message = str(caught.value).replace(str(tmp_path), "")
    assert "SECRET" not in message
    assert "root:" not in message

"""Reading annotations.csv."""

from pathlib import Path

import pytest

from tests.helpers.data_sets import write_csv, write_jsonl
from upperson.data.records import Record, read_dataset
from upperson_rt.errors import InputError

HEADER = "image,pid,caption,split,camera\n"


def write(root: Path, text: str | bytes) -> Path:
    content = text if isinstance(text, bytes) else text.encode("utf-8")
    (root / "annotations.csv").write_bytes(content)
    return root


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    write_csv(tmp_path)
    write_jsonl(tmp_path)
    splits = read_dataset("csv", tmp_path)
    assert splits == read_dataset("jsonl", tmp_path)
    assert splits["val"] == [
        Record(
            tmp_path / "images/2_0.png",
            2,
            ("Person 2, view 0, sentence 0.", "Person 2, view 0, sentence 1."),
            "c0",
        )
    ]


@pytest.mark.parametrize(
    "text",
    [
        "image,pid,caption\na.jpg,7,a man\n",
        "caption,image,pid\na man,a.jpg,7\n",
        'pid, image, caption\n7, a.jpg, "a man"\n',
        "\ufeffimage,pid,caption\na.jpg,7,a man\n",
        "image,pid,caption\r\n\r\na.jpg,7,a man\r\n",
        HEADER + "a.jpg,7,a man,,\n",
        HEADER + "a.jpg,7,a man,train,",
        "image,pid,caption,split,note\na.jpg,7,a man,train,anything\n",
    ],
    ids=["short", "order", "spaces", "bom", "windows", "empty cells", "no newline", "other column"],
)
def test_what_people_write(tmp_path: Path, text: str) -> None:
    splits = read_dataset("csv", write(tmp_path, text))
    assert splits["train"] == [Record(tmp_path / "a.jpg", 7, ("a man",))]


def test_quoted_captions_keep_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    text = HEADER + 'a.jpg,7,"a ""tall"" man,\nin red",test,c1\n'
    (record,) = read_dataset("csv", write(tmp_path, text))["test"]
    assert record == Record(tmp_path / "a.jpg", 7, ('a "tall" man,\nin red',), "c1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected a header with the columns image,pid,caption"),
        ("a.jpg,7,a man\n", "line 1: expected a header .* found 3, without image, pid, caption"),
        ("image;pid;caption\na.jpg;7;a man\n", "separated by commas, found 1, without image"),
        ("image,pid,caption,pid\na.jpg,7,a man,7\n", "each once"),
        (HEADER + "a.jpg,7,a man\n", "line 2: expected 5 cells as in the header, found 3"),
        (HEADER + "a.jpg,7,a man, in red,train,c\n", "expected 5 cells .* found 6: a caption with"),
        (HEADER + "a.jpg,7,a man,,\nb.jpg,x,a man,,\n", "line 3: 'pid' must be int, found 'x'"),
        (HEADER + "a.jpg,7.0,a man,,\n", "'pid' must be int, found '7.0'"),
        (HEADER + "a.jpg,,a man,,\n", "'pid' must be int, found ''"),
        (HEADER + f"a.jpg,{10**30},a man,,\n", "does not fit 64 bits"),
        (HEADER + f"a.jpg,{'9' * 5000},a man,,\n", "'pid' must be int, found '9999"),
        (HEADER + "a.jpg,-1,a man,,\n", "pid -1 is negative"),
        (HEADER + "a.jpg,7, ,,\n", "line 2: the caption is empty"),
        (HEADER + "a.jpg,7,a man,dev,\n", "split must be one of train, val, test, found 'dev'"),
        (HEADER + "../a.jpg,7,a man,,\n", "leaves the data set's folder"),
        (HEADER + ",7,a man,,\n", "the image path is empty"),
        (HEADER + 'a.jpg,7,"a\nman",,\nb.jpg,x,a man,,\n', "line 4: 'pid' must be int"),
        (HEADER + 'a.jpg,7,a man,,\nb.jpg,8,"a man,,\nc.jpg,9,x,,\n', "line 3: not CSV"),
        (HEADER + "a.jpg,7,a man,train,\nb.jpg,7,a man,test,\n", "line 3: identity 7 is in split"),
        (HEADER + "a.jpg,7,a man,,\na.jpg,8,a man,,\n", "line 3: image 'a.jpg' had"),
        (HEADER.encode() + b"a.jpg,7,a man,,\nb.jpg,8,a \xff man,,\n", "line 3: not UTF-8"),
        (HEADER + f"a.jpg,7,{'x' * 200_000},,\n", "line 2: not CSV: field larger"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_dataset("csv", write(tmp_path, text))
    assert str(error.value).startswith(f"{tmp_path / 'annotations.csv'}, line ")
    assert "\n" not in str(error.value)


def test_a_folder_without_annotations_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    with pytest.raises(InputError, match=r"annotations\.csv in .*--dataset"):
        read_dataset("csv", tmp_path)

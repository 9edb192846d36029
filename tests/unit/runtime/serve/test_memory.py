"""What the console keeps of its own is as it was written, or refused."""

import sqlite3

import numpy as np
import pytest

from upperson_rt.errors import IntegrityError
from upperson_rt.serve.memory import AskedPicture, Memory

VECTOR = np.full(16, 0.25, np.float32)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "console.sqlite"
    memory = Memory(path)
    picture = AskedPicture(
        id="p", sha256="0" * 64, vector_D=VECTOR, jpeg=b"\xff\xd8jpeg", size=(3, 4)
    )
    memory.keep_picture(picture, "space")
    memory.save("ann", "red coats", "?q=red")
    memory.save("ann", "red coats", "?q=a+red+coat")
    memory.set_marks("ann", "question", [3, 1], [2])
    memory.close()
    return path


def test_what_was_written_is_there_again(file):
    memory = Memory(file)
    assert memory.picture("p", "space").vector_D.tolist() == VECTOR.tolist()
    assert [(saved.name, saved.address) for saved in memory.saved("ann")] == [
        ("red coats", "?q=a+red+coat")
    ]
    assert memory.marks("ann", "question") == ([3, 1], [2])
    memory.close()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (VECTOR.tobytes()[:4], b"\0\0\0\0"),
        (b"red coats", b"red boats"),
        (b"red coats", b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe\xff"),
        (b"ann", b"bob"),
        (b"?q=a+red", b"?q=a+rad"),
        (b"question", b"Question"),
        (b"jpeg\x03", b"jpig\x03"),
        (b"\x03\x04", b"\x04\x03"),
        (b"CREATE TABLE marks", b"CREATE TABLE harks"),
        (b"SQLite format 3", b"SQLite format 9"),
    ],
)
def test_damage_is_refused(file, old, new):
    content = file.read_bytes()
    assert content.count(old) > 0
    file.write_bytes(content.replace(old, new))
    with pytest.raises(IntegrityError, match=r"console\.sqlite is damaged .*put back a copy"):
        Memory(file)


def test_a_file_of_before_gets_checksums(file):
    with sqlite3.connect(file) as connection:
        for table in ("pictures", "saved", "marks"):
            connection.execute(f"ALTER TABLE {table} DROP COLUMN checksum")
    connection.close()
    test_what_was_written_is_there_again(file)
    test_damage_is_refused(file, b"a+red", b"a+rad")

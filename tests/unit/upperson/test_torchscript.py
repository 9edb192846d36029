"""Reading TorchScript archives as data: what torch writes, and what a hostile file may contain."""

import pickle
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from struct import pack, unpack

import pytest
import torch
from safetensors.torch import save
from torch import nn

from tests.helpers.openai_archive import save_openai_archive, save_scripted
from tests.helpers.refused import refused
from tests.helpers.toy_clip import toy_clip
from upperson.model.torchscript import is_torchscript, read_torchscript
from upperson.model.weights import read_weights
from upperson.official.importing import read_checkpoint
from upperson_rt.errors import InputError

# A pickle of protocol 2, piece by piece, as torch writes it.
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x04tQ"
HOOKS = b"\x89ccollections\nOrderedDict\n)R"
VALUES = torch.arange(4.0)
READERS = (
    (read_weights, "weights_unreadable"),
    (lambda path: read_checkpoint(path)[0], "checkpoint_unreadable"),
)


def shape(*numbers):
    return b"(" + b"".join(b"J" + pack("<i", number) for number in numbers) + b"t"


SQUARE, ROWS = shape(2, 2), shape(2, 1)


def tensor(offset=0, size=SQUARE, stride=ROWS, store=STORAGE):
    arguments = store + b"J" + pack("<i", offset) + size + stride + HOOKS
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def module(attribute):
    return b"\x80\x02c__torch__\nToy\n)\x81}(X\x01\0\0\0w" + attribute + b"ub."


def write(path, pickled, *, method=zipfile.ZIP_STORED, **more):
    records = {
        "data.pkl": pickled,
        "data/0": VALUES.numpy().tobytes(),
        "constants.pkl": b"\x80\x02).",
    }
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in (records | {"version": b"3"} | more).items():
            archive.writestr(f"toy/{name}", content)
    return path


class Odd(nn.Module):
    """Attributes that OpenAI's modules do not have."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.named = torch.jit.Attribute({"one": torch.ones(1)}, dict[str, torch.Tensor])
        self.pair = (1, 2.5)
        self.big = 2**40
        self.register_buffer("transposed", torch.randn(6, 4).t()[1:])
        self.register_buffer("empty", torch.empty(0, 3))

    def forward(self, x):
        return self.linear(x) + self.pair[0] + self.big


def test_tensors_are_those_that_torch_itself_reads(tmp_path):
    path = tmp_path / "odd.pt"
    save_scripted(nn.Sequential(Odd(), nn.LayerNorm(2)).half(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        expected = torch.jit.load(path).state_dict()
    found = read_torchscript(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_only_archives_with_a_program_are_torchscript(tmp_path):
    save_openai_archive(toy_clip().state_dict(), tmp_path / "openai.pt")
    torch.save(toy_clip().state_dict(), tmp_path / "state.pt")
    assert is_torchscript(tmp_path / "openai.pt")
    assert not is_torchscript(tmp_path / "state.pt")
    assert not is_torchscript(Path(__file__))
    state = read_torchscript(write(tmp_path / "toy.pt", module(tensor()), byteorder=b"little"))
    assert torch.equal(state["w"], VALUES.reshape(2, 2))
    again = read_torchscript(write(tmp_path / "view.pt", module(tensor(1, shape(2), shape(2)))))
    assert again["w"].tolist() == [1, 3]


class Trap:
    """Runs a command when it is unpickled without care."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_nothing_in_a_pickle_is_called(tmp_path):
    marker = tmp_path / "marker"
    touch = b"cos\nsystem\n(X"
    command = f"touch {marker}".encode()
    calls = {
        "reduce": touch + pack("<I", len(command)) + command + b"tR",
        "inst": b"(X" + pack("<I", len(command)) + command + b"ios\nsystem\n",
        "eval": b"cbuiltins\neval\n(X\x01\0\0\0" + b"1tR",
        "torch": b"ctorch.serialization\nload\n(X\x01\0\0\0xtR",
        "storage": tensor(store=touch + pack("<I", len(command)) + command + b"tR"),
    }
    for name, call in calls.items():
        with refused("weights_unreadable", InputError):
            read_weights(write(tmp_path / f"{name}.pt", module(call)))
    for protocol in range(6):
        bad = write(tmp_path / f"{protocol}.pt", pickle.dumps(Trap(marker), protocol))
        with refused("weights_unreadable", InputError):
            read_weights(bad)
    torch.save({"state_dict": Trap(marker)}, tmp_path / "plain.pt")
    torch.save({"model": {"w": VALUES}, "optimizer": Trap(marker)}, tmp_path / "beside.pt")
    torch.save(Trap(marker), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"w": Trap(marker)}))
    for name in ("plain", "beside", "old", "bare"):
        with refused("weights_unreadable", InputError) as found:
            read_weights(tmp_path / f"{name}.pt")
        assert "nothing was executed" in found.value.fields["reason"]
        with pytest.raises(InputError) as caught:
            read_checkpoint(tmp_path / f"{name}.pt")
        assert caught.value.code in ("checkpoint_may_run_code", "checkpoint_unreadable")
        assert "weights_only" not in str(caught.value)
    assert not marker.exists()


def test_a_pickle_changes_nothing_for_the_next_file(tmp_path):
    # BUILD with (None, attributes) sets attributes of whatever object it is applied to.
    change = b"(N}(X\x08\0\0\0__init__NX\x0c\0\0\0__defaults__)utb"
    for name in (
        "ctorch._utils\n_rebuild_tensor_v2\n",
        "c__torch__\nToy\n",
        "ctorch\nFloatStorage\n",
    ):
        path = write(tmp_path / "change.pt", module(name.encode() + change))
        with suppress(InputError):
            read_weights(path)
        good = write(tmp_path / "good.pt", module(tensor()))
        assert torch.equal(read_weights(good)["w"], VALUES.reshape(2, 2))


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        (tensor(1), "'w' reaches beyond its 4 stored numbers"),
        (tensor(0, shape(2, 2), shape(3, 1)), "'w' reaches beyond its 4 stored numbers"),
        (tensor(0, shape(2**31 - 1), shape(1)), "'w' reaches beyond"),
        (tensor(-1), "'w' has no valid shape"),
        (tensor(0, shape(2, 2), shape(-2, 1)), "'w' has no valid shape"),
        (tensor(0, shape(2, 2), shape(1)), "'w' has no valid shape"),
        (tensor(0, shape(2), b"(N" + b"t"), "'w' has no valid shape"),
        (tensor(store=STORAGE.replace(b"K\x04", b"K\x05")), "'data/0' has 16 bytes, expected 5"),
        (tensor(store=STORAGE.replace(b"\0000X", b"\0007X")), "'data/7' is missing"),
        (tensor(store=STORAGE.replace(b"storage", b"storeys")), "not a storage"),
        (tensor(store=b"N"), "'w' has no storage"),
        (b"r\xff\xff\xff\xffN", "pickle"),
    ],
)
def test_descriptions_that_do_not_fit_the_file_are_refused(tmp_path, attribute, reason):
    with refused("weights_unreadable", InputError) as found:
        read_weights(write(tmp_path / "bad.pt", module(attribute)))
    assert reason in found.value.fields["reason"]


def test_archives_that_unpack_to_more_than_the_file_are_refused(tmp_path):
    bomb = write(tmp_path / "bomb.pt", module(tensor()), method=zipfile.ZIP_DEFLATED)
    with refused("weights_unreadable", InputError) as found:
        read_weights(bomb)
    assert "compressed" in found.value.fields["reason"]
    crowd = write(tmp_path / "crowd.pt", module(b"(" + b"}" * 5_000_000 + b"t"))
    with refused("weights_unreadable", InputError) as found:
        read_weights(crowd)
    assert "4 MiB" in found.value.fields["reason"]
    # A module inside itself, and modules that refer to each other, are walked once.
    loop = b"\x80\x02c__torch__\nToy\n)\x81q\0}(X\x01\0\0\0sh\0X\x01\0\0\0w" + tensor() + b"ub."
    assert read_weights(write(tmp_path / "loop.pt", loop)).keys() == {"w"}


def test_other_archives_are_refused(tmp_path):
    for pickled, more, reason in (
        (b"\x80\x02}.", {}, "expected a module, found dict"),
        (b"\x80\x02", {}, "pickle"),
        (b"", {}, "pickle"),
        (b"<html>", {}, ""),
        (module(tensor()), {"byteorder": b"big"}, "endian"),
    ):
        with refused("weights_unreadable", InputError) as found:
            read_weights(write(tmp_path / "other.pt", pickled, **more))
        assert reason in found.value.fields["reason"]


def test_a_damaged_archive_is_refused_wherever_it_is_cut(tmp_path):
    path = tmp_path / "whole.pt"
    save_openai_archive({"a.weight": torch.ones(300), "b": torch.ones(2, 2)}, path)
    content = path.read_bytes()
    cut = tmp_path / "cut.pt"
    for size in range(0, len(content) - 1, 293):
        cut.write_bytes(content[:size])
        with refused("weights_unreadable", InputError):
            read_weights(cut)
    flipped = bytearray(content)
    flipped[content.index(torch.ones(300).numpy().tobytes()) + 7] ^= 1
    cut.write_bytes(flipped)
    with refused("weights_unreadable", InputError) as found:
        read_weights(cut)
    assert "CRC" in found.value.fields["reason"]


def repack(source, path, method, **more):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", method) as new:
        for record in old.infolist():
            name = record.filename
            new.writestr(name, more.get(name.rpartition("/")[2].replace(".", "_"), old.read(name)))
    return path


def overlap(path):
    """Let a hundred entries of an archive name the same record."""
    content = path.read_bytes()
    end = content.rindex(b"PK\5\6")
    count, size, at = unpack("<HII", content[end + 10 : end + 20])
    directory = content[at : at + size]
    name = directory.index(b"data/0")
    entry_at = directory.rindex(b"PK\1\2", 0, name)
    entry = directory[entry_at : name + 6]
    more = b"".join(entry.replace(b"data/0", b"data/%c" % (48 + i)) for i in range(1, 70))
    tail = pack("<4s4H2IH", b"PK\5\6", 0, 0, count + 69, count + 69, size + len(more), at, 0)
    path.write_bytes(content[:at] + directory + more + tail)


def test_saved_files_that_would_unpack_to_more_than_they_are_refused(tmp_path):
    plain, old = tmp_path / "plain.pth", tmp_path / "old.pth"
    torch.save({"w": torch.zeros(5_000_000)}, plain)
    repack(plain, tmp_path / "deflated.pth", zipfile.ZIP_DEFLATED)
    assert (tmp_path / "deflated.pth").stat().st_size < plain.stat().st_size / 100
    crowd = b"\x80\x02(" + b"}" * 5_000_000 + b"t."
    repack(plain, tmp_path / "crowd.pth", zipfile.ZIP_STORED, data_pkl=crowd)
    old.write_bytes(
        b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    )
    few = b"}" * 100_000 + b"X" + pack("<I", 5_000_000) + b" " * 5_000_000  # Read in a second.
    with old.open("ab") as file:
        file.write(b"\x80\x02(" + few + b"t.")
    repack(plain, tmp_path / "overlap.pth", zipfile.ZIP_STORED)
    overlap(tmp_path / "overlap.pth")
    (tmp_path / "cut.pth").write_bytes(plain.read_bytes()[:-100])
    (tmp_path / "empty.pth").touch()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(save({"w": VALUES})[:-1])
    reasons = {
        "deflated": "its records are compressed",
        "crowd": "its description takes more than 4 MiB",
        "old": "its description takes more than 4 MiB",
        "overlap": "its records are larger than the file",
        "cut": "it is cut off: fetch or copy it again",
        "empty": "it is empty",
    }
    for read, code in READERS:
        with refused(code, InputError, path=cut):
            read(cut)
        assert read(plain)["w"].shape == (5_000_000,)
        for name, reason in reasons.items():
            with refused(code, InputError) as found:
                read(tmp_path / f"{name}.pth")
            assert found.value.fields["reason"].startswith(reason)


def test_a_tensor_of_more_numbers_than_the_file_holds_is_refused(tmp_path):
    """The search for the grid of a billion positions, which took 1.6 kB, did not end."""
    one = torch.zeros(1)
    torch.save({"w": one.as_strided((10**9, 4), (0, 0))}, tmp_path / "wide.pth")
    write(tmp_path / "wide.pt", module(tensor(0, shape(10**9, 2), shape(0, 1))))
    torch.save({"w": torch.zeros(4)[1:3], "v": one.expand(1)}, tmp_path / "views.pth")
    for read, code in READERS:
        with refused(code, InputError, tensor="w"):
            read(tmp_path / "wide.pth")
        assert read(tmp_path / "views.pth").keys() == {"w", "v"}
    with refused("weights_unreadable", InputError, tensor="w"):
        read_weights(tmp_path / "wide.pt")

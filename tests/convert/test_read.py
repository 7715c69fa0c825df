"""Foreign files: what is read, what is refused, and that nothing in them runs."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_official import write_sharded

from scaleweaver.convert.read import read_weights

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "b.weight": torch.zeros(1)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


class Harmful:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_files_of_every_kind(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "new.pth")
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({name: torch.nn.Parameter(t) for name, t in WEIGHTS.items()}, tmp_path / "parameters.pt")
    save_file(WEIGHTS, tmp_path / "plain.safetensors")
    for file in tmp_path.iterdir():
        assert same(read_weights(file)), file.name
        assert not any(tensor.requires_grad for tensor in read_weights(file).values())


def test_an_entry_is_taken_out_of_a_larger_checkpoint(tmp_path: Path) -> None:
    torch.save({"trainer": {"gpt_fsdp": WEIGHTS, "optimizer": {"step": 3}}, "epoch": 4}, tmp_path / "run.pth")
    assert same(read_weights(tmp_path / "run.pth", inside=("vae", "trainer.gpt_fsdp")))
    with pytest.raises(ValueError, match=r"holds no tensors by name but trainer \(dict\), epoch \(int\)"):
        read_weights(tmp_path / "run.pth", inside=("vae",))
    torch.save(WEIGHTS, tmp_path / "bare.pth")
    assert same(read_weights(tmp_path / "bare.pth", inside=("vae",)))


@pytest.mark.parametrize("kind", ["bin", "pth", "safetensors"])
def test_shards(kind: str, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "8b", WEIGHTS, kind)
    assert same(read_weights(folder))
    (folder / f"model-00002-of-00003.{kind}").unlink()
    with pytest.raises(ValueError, match=f"lacks the shards model-00002-of-00003.{kind}"):
        read_weights(folder)


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "8b", WEIGHTS, "bin")
    index = folder / "model.bin.index.json"
    where = json.loads(index.read_text())["weight_map"]

    def fails(weight_map: object, match: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=match):
            read_weights(folder)

    fails({**where, "c.weight": "model-00001-of-00003.bin"}, r"promises c\.weight, which no shard holds")
    moved = {"c.weight": "model-00001-of-00003.bin", "a.weight": "model-00002-of-00003.bin"}
    fails({**where, **moved}, r"'a\.weight', which lies elsewhere too")
    fails({**where, "a.weight": "../other.bin"}, "must lie in the same folder")
    fails({**where, "a.weight": str(tmp_path / "other.bin")}, "must lie in the same folder")
    fails(["a.weight"], "is no index of shards")


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 0 weight files and no index"):
        read_weights(tmp_path)
    torch.save({"vae": WEIGHTS}, tmp_path / "only.pth")
    assert same(read_weights(tmp_path, inside=("vae",)))
    torch.save(WEIGHTS, tmp_path / "second.pth")
    with pytest.raises(ValueError, match="holds 2 weight files and no index"):
        read_weights(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_runs_code_is_refused(new: bool, tmp_path: Path) -> None:
    file, mark = tmp_path / "harmful.pth", tmp_path / "mark"
    torch.save({**WEIGHTS, "x": Harmful(mark)}, file, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"harmful\.pth' is refused: it holds a Python object, \w+\.mkdir, .* tensors"):
        read_weights(file)
    assert not mark.exists()
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Harmful(mark)))
    with pytest.raises(ValueError, match=r"bare\.pth' is refused"):
        read_weights(tmp_path / "bare.pth")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name.endswith("pth"):
        torch.save(WEIGHTS, file)
    else:
        save_file(WEIGHTS, file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:40], b"", b"<!DOCTYPE html><html>not found</html>"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}' is (no complete|refused)"):
            read_weights(file)


def test_what_is_not_tensors_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file or folder .*none\.pth"):
        read_weights(tmp_path / "none.pth")
    for content, match in (
        (torch.zeros(3), "holds a Tensor; expected tensors by name"),
        ({}, "but nothing"),
        ({"epoch": 3, **WEIGHTS}, r"but epoch \(int\)"),
        ({f"n{i:02}": i for i in range(30)}, r"n19 \(int\) and 10 more"),
    ):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=match):
            read_weights(tmp_path / "w.pth")

"""Images of any form become the pixels that the model's own processor makes of them. Oracle: that processor on PIL images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from PIL import Image

from adarank.data.spec import Columns, DataSettings, HubData, SplitData, TaskSpec
from adarank.data.task import TaskData
from adarank.errors import DataError
from adarank.models import FAMILIES
from adarank.models.image import ImageClassifiers
from adarank.workflow.load_tasks import TaskReader
from image_zoo import SIZE, image_folder, pictures, processor

LABELS = ["cat", "cat", "cat", "dog", "dog"]  # in the order of a folder's classes
CONFIG = {"id2label": {"0": "dog", "1": "cat"}, "label2id": {"dog": 0, "cat": 1}}
NUMBERS = (1, 1, 1, 0, 0)


def load(
    folder: Path, data: Any, made: Any = None, channels: int = 3, settings: DataSettings | None = None, **spec: Any
) -> TaskData:
    """A task's data, read from `folder`, with a processor in it."""
    (made or processor(channels)).save_pretrained(folder / "expert")
    (folder / "expert" / "config.json").write_text(json.dumps({"num_channels": channels}))
    reader = TaskReader(FAMILIES["image-classification"], settings or DataSettings(), folder)
    return reader.load("pets", TaskSpec(data=data, **spec), folder / "expert", CONFIG)


def pixels(data: TaskData) -> torch.Tensor:
    return data.examples.batch(range(len(data.labels)))["pixel_values"]


def oracle(made: Any, images: list[Image.Image]) -> torch.Tensor:
    return torch.cat([made(images=[own], return_tensors="pt")["pixel_values"] for own in images])


def as_npz(folder: Path, images: list[np.ndarray]) -> str:
    np.savez(folder / "rows.npz", image=np.stack(images), label=np.array(LABELS))
    return "rows.npz"


def as_channels_first(folder: Path, images: list[np.ndarray]) -> str:
    return as_npz(folder, [own.transpose(2, 0, 1) if own.ndim == 3 else own[None] for own in images])


def as_folder(folder: Path, images: list[np.ndarray]) -> str:
    image_folder(folder / "pictures", images, LABELS)
    return "pictures"


def dataset(folder: Path, images: list[np.ndarray]) -> Any:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {"image": [Image.fromarray(own) for own in images], "label": list(NUMBERS)}
    return datasets.Dataset.from_dict(rows, features=features)


def as_parquet(folder: Path, images: list[np.ndarray]) -> str:
    dataset(folder, images).to_parquet(folder / "rows.parquet")
    stored = pyarrow.parquet.read_schema(folder / "rows.parquet").field("image").type
    assert {field.name for field in stored} == {"bytes", "path"}
    return "rows.parquet"


def as_saved_dataset(folder: Path, images: list[np.ndarray]) -> str:
    dataset(folder, images).save_to_disk(folder / "saved")
    return "saved"


def as_loaded_dataset(folder: Path, images: list[np.ndarray]) -> HubData:
    (folder / "hub").mkdir()
    dataset(folder, images).to_parquet(folder / "hub" / "test.parquet")
    return HubData(dataset="hub")


def as_paths_in_parquet(folder: Path, images: list[np.ndarray]) -> str:
    names = [str(file.relative_to(folder)) for file in sorted((folder / as_folder(folder, images)).glob("*/*"))]
    cells = [{"bytes": None, "path": name} for name in names]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    table = pyarrow.table({"image": pyarrow.array(cells, kind), "label": LABELS})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return "rows.parquet"


def as_lists_in_parquet(folder: Path, images: list[np.ndarray]) -> str:
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [own.tolist() for own in images], "label": LABELS}), folder / "rows.parquet"
    )
    return "rows.parquet"


def as_paths_in_csv(folder: Path, images: list[np.ndarray]) -> str:
    """The table lies beside its images, not beside the recipe."""
    (folder / "deep").mkdir()
    files = sorted((folder / "deep" / as_folder(folder / "deep", images)).glob("*/*"))
    rows = [f"{file.relative_to(folder / 'deep')},{file.parent.name}\n" for file in files]
    (folder / "deep" / "rows.csv").write_text("image,label\n" + "".join(rows))
    return "deep/rows.csv"


FORMS = [as_npz, as_channels_first, as_folder, as_parquet, as_saved_dataset, as_loaded_dataset, as_paths_in_parquet,
         as_lists_in_parquet, as_paths_in_csv]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [3, 1])
def test_every_form_of_data_gives_the_processors_pixels(tmp_path: Path, form: Callable, channels: int) -> None:
    images = pictures(5, shape=(12, 20, 3) if channels == 3 else (12, 20))
    found = load(tmp_path, form(tmp_path, images), channels=channels)
    wanted = oracle(processor(channels), [Image.fromarray(own) for own in images])
    assert wanted.shape == (5, channels, SIZE, SIZE)
    assert torch.equal(pixels(found), wanted)
    assert found.labels == NUMBERS


MODES = ["L", "RGBA", "P", "1", "LA"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [3, 1])
def test_a_png_of_any_mode_is_brought_to_the_models_channels(tmp_path: Path, mode: str, channels: int) -> None:
    shown = [Image.fromarray(own).convert("RGBA") for own in pictures(2)]
    for number, own in enumerate(shown):
        own.putalpha(Image.fromarray(pictures(1, 7 + number, (12, 20))[0]))
        (tmp_path / "pictures" / "cat").mkdir(parents=True, exist_ok=True)
        (own.convert("RGB") if mode == "P" else own).convert(mode).save(tmp_path / "pictures" / "cat" / f"{number}.png")
    read = [Image.open(file) for file in sorted((tmp_path / "pictures" / "cat").iterdir())]
    assert {own.mode for own in read} == {mode}
    wanted = oracle(processor(channels), [own.convert("RGB" if channels == 3 else "L") for own in read])
    assert torch.equal(pixels(load(tmp_path, "pictures", channels=channels)), wanted)


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    file = tmp_path / "pictures" / "cat" / "a.jpg"
    Image.fromarray(pictures(1)[0]).save(file, exif=exif, quality=95)
    wanted = oracle(processor(), [Image.open(file).transpose(Image.Transpose.ROTATE_270)])
    assert torch.equal(pixels(load(tmp_path, "pictures")), wanted)


@pytest.mark.parametrize(
    ("name", "settings", "shape"),
    [
        ("ViTImageProcessor", {"do_resize": False}, (12, 20)),
        ("ViTImageProcessor", {"size": {"height": 9, "width": 7}, "resample": 3, "do_normalize": False}, (9, 7)),
        ("ViTImageProcessor", {"do_resize": False, "do_rescale": False}, (12, 20)),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 14}, "crop_size": {"height": 10, "width": 8}}, (10, 8)),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 14}, "crop_pct": 0.5}, (14, 14)),
        ("BitImageProcessor", {"size": {"shortest_edge": 14}, "do_center_crop": False}, (14, 23)),
    ],
)
def test_the_processors_own_settings_are_obeyed(
    tmp_path: Path, name: str, settings: dict[str, Any], shape: tuple[int, int]
) -> None:
    made = getattr(transformers, name)(**settings, image_mean=[0.1, 0.2, 0.9], image_std=[0.5, 0.7, 0.3])
    images = pictures(5)
    found = load(tmp_path, as_npz(tmp_path, images), made)
    wanted = oracle(made, [Image.fromarray(own) for own in images]).float()
    assert wanted.shape[2:] == shape
    assert torch.equal(pixels(found), wanted)


@pytest.mark.parametrize("height", [1, 3, 4])
def test_a_height_is_never_taken_for_channels(tmp_path: Path, height: int) -> None:
    images = pictures(5, shape=(height, 20, 3))
    wanted = oracle(processor(), [Image.fromarray(own).resize((SIZE, SIZE), 2) for own in images])
    assert torch.equal(pixels(load(tmp_path, as_npz(tmp_path, images))), wanted)


def test_more_images_than_are_kept_give_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(30)
    np.savez(tmp_path / "rows.npz", image=np.stack(images), label=np.arange(30) % 2)
    whole = load(tmp_path, "rows.npz")
    made: list[Any] = []
    kind = type(processor())
    preprocess = kind.preprocess

    def counted(self: Any, images: Any, *rest: Any, **named: Any) -> Any:
        made.extend(images)
        return preprocess(self, images, *rest, **named)

    monkeypatch.setattr(kind, "preprocess", counted)
    monkeypatch.setattr(ImageClassifiers, "kept_bytes", 7 * 3 * SIZE * SIZE * 4)
    part = load(tmp_path, "rows.npz")
    assert [array.tolist() for array in made] == [array.tolist() for array in images[:7]]
    assert torch.equal(pixels(part), pixels(whole))
    for step in range(4):
        assert torch.equal(part.adapt_batch(step, 4)["pixel_values"], whole.adapt_batch(step, 4)["pixel_values"])
    for one, other in zip(part.scored_batches("test", 1000), whole.scored_batches("test", 1000), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1]["pixel_values"], other[1]["pixel_values"])
    assert part.fingerprint() == whole.fingerprint()
    assert made[7:]


# Splits


def straddling(data: TaskData) -> set[bytes]:
    """Images, by their processed pixels, that are in more than one split."""
    found = pixels(data)
    own = [{found[row].numpy().tobytes() for row in rows} for rows in data.splits.rows.values()]
    return (own[0] & own[1]) | (own[0] & own[2]) | (own[1] & own[2])


def test_a_file_under_two_names_stays_in_one_split(tmp_path: Path) -> None:
    path = image_folder(tmp_path / "pictures", pictures(20), ["cat"] * 20)
    (path / "dog").mkdir()
    for file in sorted((path / "cat").iterdir()):
        shutil.copy(file, path / "dog" / f"copy-of-{file.name}")
    data = load(tmp_path, "pictures")
    assert {split: len(rows) for split, rows in data.splits.rows.items()} == {"adapt": 16, "select": 8, "test": 16}
    assert not straddling(data)


def test_equal_pixels_stay_in_one_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", image=np.stack(pictures(20) * 2), label=np.zeros(40, dtype=int))
    assert not straddling(load(tmp_path, "rows.npz"))


@pytest.mark.parametrize(
    ("one", "other"), [(as_npz, as_channels_first), (as_folder, as_paths_in_csv), (as_npz, as_lists_in_parquet)]
)
def test_an_image_of_a_later_split_is_left_out_of_an_earlier_one(
    tmp_path: Path, one: Callable, other: Callable
) -> None:
    """Whatever the form it comes in, as long as bytes or pixels are the same."""
    sources = {}
    for split, form, images in (("adapt", one, pictures(5)), ("test", other, [*pictures(3), *pictures(2, 9)])):
        (tmp_path / split).mkdir()
        sources[split] = f"{split}/{form(tmp_path / split, images)}"
    data = load(tmp_path, SplitData(**sources))
    assert len(data.splits.rows["adapt"]) == 2
    assert data.notes == ("3 adapt input(s) left out: they are in a later split too",)
    assert not straddling(data)


# Mistakes that only single forms allow


def test_an_empty_cell_is_named(tmp_path: Path) -> None:
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    cells = pyarrow.array([None, {"bytes": None, "path": None}], kind)
    pyarrow.parquet.write_table(pyarrow.table({"picture": cells}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"task 'pets', row 1: no readable image \(the cell is empty\)"):
        load(tmp_path, "rows.parquet", columns=Columns(image="picture"))


def test_a_path_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,label\nnone.png,cat\n")
    with pytest.raises(DataError, match=r"none\.png: no readable image \(No such file or directory\)"):
        load(tmp_path, "rows.csv")


def test_a_saved_dataset_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    rows = dataset(tmp_path, pictures(5))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved: holds the splits train, test. Name one of these sub-folders"):
        load(tmp_path, "saved")
    assert len(load(tmp_path, "saved/test").labels) == 5

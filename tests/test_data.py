"""Data by name: folders, archives, embedded digits, factories, splits, and what is refused."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpq.data import DataSet, load_arrays, open_data, sample_indices
from mpq.data.dataset import ArraySplit, subset
from mpq.data.images import decode, fit
from mpq.data.splits import stratified
from mpq.errors import DataError
from mpq.userimport import trusting

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Neither the working directory nor the user's data or cache take part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MPQ_DATA", raising=False)


def png(colour, size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size[1], size[0]), colour).save(file, "PNG")
    return file.getvalue()


def images(prefix="", count=10, classes=tuple(COLOURS), start=0) -> dict[str, bytes]:
    """File contents: image `i` of a class has its colour, with `i` in the red or green channel."""
    return {
        f"{prefix}{name}/{i}.png": png(tuple(max(c, i) for c in COLOURS[name]))
        for name in classes
        for i in range(start, start + count)
    }


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def counts(data: DataSet) -> tuple[int, int, int]:
    return len(data.train), len(data.validation), len(data.test)


def assert_colours(data: DataSet) -> None:
    """Every image has the colour of its label in every split."""
    for source in (data.train, data.validation, data.test):
        pixels = source.read(range(len(source)))
        assert pixels.dtype == np.uint8
        strongest = pixels[:, 0, 0].argmax(axis=1)
        names = [("red", "green", "blue")[i] for i in strongest]
        assert names == [data.classes[label] for label in source.labels]


# --- layouts ---------------------------------------------------------------------------------


def test_class_folders_are_divided_into_three_disjoint_splits(tmp_path):
    folder = write_folder(tmp_path / "shapes", images(count=50))
    data = open_data(folder)
    assert data.classes == ("blue", "green", "red")
    assert counts(data) == (108, 12, 30)
    assert data.size == (8, 8)
    assert data.name == str(folder)
    assert np.bincount(data.test.labels).tolist() == [10, 10, 10]
    parts = [data.train.indices, data.validation.indices, data.test.indices]
    assert sorted(np.concatenate(parts).tolist()) == list(range(150))
    assert_colours(data)


def test_test_split_does_not_depend_on_the_seed_and_the_holdout_does(tmp_path):
    folder = write_folder(tmp_path / "shapes", images(count=50))
    one, two, again = (open_data(folder, seed=seed) for seed in (1, 2, 1))
    assert np.array_equal(one.test.indices, two.test.indices)
    assert not np.array_equal(one.validation.indices, two.validation.indices)
    assert np.array_equal(one.validation.indices, again.validation.indices)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "val", "test"), (30, 30, 30)),
        (("train", "validation"), (27, 3, 30)),  # val is what gets reported, nothing is chosen on
        (("train", "test"), (27, 3, 30)),
        (("train",), (22, 2, 6)),
        (("val",), (22, 2, 6)),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_split_folders(tmp_path, splits, expected, kind):
    files = {}
    for split in splits:
        files |= images(f"{split}/")
    if kind == "folder":
        path = write_folder(tmp_path / "d", files)
    else:
        path = write_zip(tmp_path / "d.zip", files)
    data = open_data(path)
    assert counts(data) == expected
    assert_colours(data)


def test_common_top_folder_litter_and_deeper_folders(tmp_path):
    files = images("shapes/train/") | images("shapes/test/")
    files |= {"__MACOSX/shapes/train/red/._1.png": b"x", "shapes/train/.hidden.png": b"x"}
    files |= {"shapes/notes.txt": b"hello"}
    files |= {"shapes/train/red/deeper/1.png": png((255, 1, 1))}
    data = open_data(write_zip(tmp_path / "s.zip", files))
    assert data.classes == ("blue", "green", "red")
    assert counts(data) == (28, 3, 30)


def test_a_class_may_be_called_train(tmp_path):
    files = {f"{name}/{i}.png": png((i, 0, 0)) for name in ("bus", "train") for i in range(10)}
    assert open_data(write_folder(tmp_path / "vehicles", files)).classes == ("bus", "train")


def test_images_beside_class_folders_are_told(tmp_path, caplog):
    folder = write_folder(tmp_path / "s", images() | {"cover.png": png((1, 2, 3))})
    assert sum(counts(open_data(folder))) == 30
    assert "1 images outside of class folders" in caplog.text


# --- several archives ------------------------------------------------------------------------


def write_parts(folder: Path, inner: bool) -> None:
    """Two training archives and one test archive, with the split inside them or in their names."""
    train, test = ("train/", "test/") if inner else ("", "")
    write_zip(folder / "shapes-train-0.zip", images(train, count=5))
    write_zip(folder / "shapes-train-1.zip", images(train, count=5, start=5))
    write_zip(folder / "shapes-test.zip", images(test, count=4))
    write_zip(folder / "shapes-big-train-0.zip", images(train, count=1))


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("name", ["shapes", "shapes-t*.zip"])
def test_several_archives_make_one_data_set(tmp_path, inner, name):
    write_parts(tmp_path / "root", inner)
    data = open_data(name, root=tmp_path / "root", holdout=3)
    assert counts(data) == (27, 3, 12)
    assert data.name == name
    assert_colours(data)


def test_folder_of_archives(tmp_path):
    write_parts(tmp_path / "root", True)
    write_folder(tmp_path / "root", {"notes/a.txt": b"no image"})
    with pytest.raises(DataError, match="several data sets: shapes, shapes-big"):
        open_data(tmp_path / "root")
    (tmp_path / "root" / "shapes-big-train-0.zip").unlink()
    assert counts(open_data(tmp_path / "root")) == (27, 3, 12)


def test_the_same_images_twice_are_refused(tmp_path):
    write_parts(tmp_path, True)
    write_zip(tmp_path / "shapes-train-2.zip", images("train/", count=5))
    with pytest.raises(DataError, match=r"15 train images twice, such as train/blue/0\.png"):
        open_data("shapes", root=tmp_path)


# --- where names are looked for --------------------------------------------------------------


def test_path_forms(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "shapes", images())
    write_zip(tmp_path / "root" / "packed.zip", images())
    monkeypatch.setenv("MPQ_DATA", "root")
    for name in ("shapes", "shapes/", "./shapes", "~/shapes", str(tmp_path / "shapes")):
        assert counts(open_data(name)) == (22, 2, 6)
    for name in ("packed", "packed.zip", "root/packed.zip", Path("root") / "packed.zip"):
        assert counts(open_data(name)) == (22, 2, 6)


def test_root_comes_before_the_environment(tmp_path, monkeypatch):
    write_zip(tmp_path / "a" / "shapes.zip", images(count=10))
    write_zip(tmp_path / "b" / "shapes.zip", images(count=20))
    monkeypatch.setenv("MPQ_DATA", str(tmp_path / "a"))
    assert sum(counts(open_data("shapes"))) == 30
    assert sum(counts(open_data("shapes", root=tmp_path / "b"))) == 60


@pytest.mark.parametrize("name", ["none", ""])
def test_none_is_explained(name):
    with pytest.raises(DataError, match=r"images are needed here\. Name some with --data: digits"):
        open_data(name)


def test_unknown_names_get_the_nearest_and_the_forms(tmp_path, monkeypatch):
    write_parts(tmp_path / "root", True)
    monkeypatch.setenv("MPQ_DATA", "absent")
    with pytest.raises(DataError, match=r"package\.module:factory.*Got 'cifra10'; did you mean c"):
        open_data("cifra10")
    with pytest.raises(DataError, match=r"did you mean shapes.*absent/ \(missing\)"):
        open_data("shape", root="root")
    with pytest.raises(DataError, match=r"roots/shapes\.zip does not exist"):
        open_data("roots/shapes.zip")
    with pytest.raises(DataError, match=r"did you mean .*shapes-test\.zip"):
        open_data("root/shapes-tset.zip")
    with pytest.raises(DataError, match=r"no-such-\*\.zip does not exist|must be digits"):
        open_data("no-such-*.zip")


def test_missing_root():
    with pytest.raises(DataError, match=r"data root must be an existing folder\. Got nowhere"):
        open_data("cifar10", root="nowhere")


# --- bad content -----------------------------------------------------------------------------


def test_empty_folder_and_archive(tmp_path):
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"void has no images. It must hold CLASS/IMAGE"):
        open_data("void")
    with pytest.raises(DataError, match=r"texts\.zip has no images"):
        open_data(write_zip(tmp_path / "texts.zip", {"a/b.txt": b"1"}))


@pytest.mark.parametrize("prefix", ["", "train/", "train/all/"])
def test_images_without_class_folders_have_no_labels(tmp_path, prefix):
    files = {f"{prefix}{i}.png": png((i, 0, 0)) for i in range(20)}
    data = open_data(write_folder(tmp_path / "flat", files))
    assert not data.labelled
    assert [len(split) for split in (data.train, data.validation, data.test)] == [14, 2, 4]
    seen = [data.train.read([i])[0, 0, 0, 0] for i in range(14)]
    assert len(set(seen)) == 14
    with pytest.raises(
        DataError, match=r"training needs labels, but the images of data .*flat lie"
    ):
        data.require_labels("training")
    with pytest.raises(DataError, match="measuring accuracy needs labels"):
        data.require_classes(10)


def test_a_class_that_train_lacks(tmp_path):
    files = images("train/", classes=("red", "blue")) | images("test/")
    with pytest.raises(DataError, match=r"test split of .* no class that train lacks\. Got green"):
        open_data(write_folder(tmp_path / "d", files))


def test_splits_without_train(tmp_path):
    with pytest.raises(DataError, match=r"must hold a train/ folder.*Got test, validation"):
        open_data(write_folder(tmp_path / "d", images("val/") | images("test/")))


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_truncated_archive(tmp_path, keep):
    path = write_zip(tmp_path / "cut.zip", images())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cut\.zip must be a complete zip archive. Got \d+ bytes"):
        open_data(path)


@pytest.mark.parametrize("damage", [lambda data: data[:45], lambda data: b"not an image"])
@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_broken_image_is_named(tmp_path, damage, write):
    files = images("train/") | images("test/")
    files["test/green/3.png"] = damage(files["test/green/3.png"])
    data = open_data(write(tmp_path / "d.zip", files))
    with pytest.raises(DataError, match=r"image test/green/3\.png in .*d\.zip must be a complete"):
        load_arrays(data.test)
    assert not list((tmp_path / "cache").glob("*"))


def test_damaged_member_of_an_archive(tmp_path):
    path = write_zip(tmp_path / "d.zip", images())
    content = bytearray(path.read_bytes())
    content[content.find(b"red/4.png") + 30] ^= 0xFF  # inside the stored image: its CRC is wrong
    path.write_bytes(content)
    data = open_data(path, size=(8, 8))
    with pytest.raises(DataError, match=r"red/4\.png in .*d\.zip is damaged: Bad CRC"):
        data.train.parent.read(range(30))


def test_class_count(tmp_path):
    data = open_data(write_folder(tmp_path / "d", images()))
    data.require_classes(3)
    with pytest.raises(DataError, match=r"the model has 100 classes, but data .* has 3"):
        data.require_classes(100)


@pytest.mark.parametrize("size", [(0, 8), (8,)])
def test_bad_size(size):
    with pytest.raises(DataError, match="size must be height and width of at least 1"):
        open_data("digits", size=size)


@pytest.mark.parametrize("holdout", [-1, 1438, 10_000])
def test_bad_holdout(holdout):
    with pytest.raises(DataError, match=r"holdout must be 0\.\.1437.*digits has 1438"):
        open_data("digits", holdout=holdout)


def test_indices_out_of_range(tmp_path):
    data = open_data(write_folder(tmp_path / "d", images()))
    with pytest.raises(DataError, match=r"indices must be in 0\.\.21. Got -1\.\.22"):
        data.train.read([-1, 22])
    assert data.train.read([]).shape == (0, 8, 8, 3)


# --- reading ---------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_decoded(tmp_path):
    files = images("train/") | images("test/")
    files["test/red/9.png"] = b"broken"
    data = open_data(write_zip(tmp_path / "d.zip", files))
    chosen = [25, 0, 0]
    assert np.array_equal(data.test.read(chosen)[:, 0, 0], [(255, 5, 5), (0, 0, 255), (0, 0, 255)])
    mask = np.arange(30) == 25
    assert np.array_equal(data.test.read(mask), data.test.read([25]))


def test_images_of_differing_size_are_brought_to_one(tmp_path):
    files = images("train/") | {"train/red/99.png": png((255, 0, 0), (40, 60))}
    folder = write_folder(tmp_path / "d", files)
    assert open_data(folder).size == (224, 224)
    data = open_data(folder, size=(10, 12))
    assert_colours(data)
    assert data.train.read([0]).shape == (1, 10, 12, 3)


def test_fit_keeps_aspect_and_the_centre():
    stripes = np.zeros((100, 300, 3), np.uint8)
    stripes[:, 96:204] = 255  # the middle third of a wide image is all that a square keeps
    image = Image.fromarray(stripes)
    assert np.asarray(fit(image, (50, 50))).min() == 255
    assert fit(image, (100, 300)) is image


def test_fit_takes_the_central_224_of_256_of_a_photograph():
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    bilinear = Image.Resampling.BILINEAR
    published = photo.resize((256, 256), bilinear).crop((16, 16, 240, 240))
    assert np.array_equal(fit(photo, (224, 224)), published)
    assert np.array_equal(fit(photo, (64, 64)), photo.resize((64, 64), bilinear))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_colour_modes_become_rgb(mode):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(file, "PNG")
    pixels = decode(file.getvalue(), (4, 4), where="it")
    assert pixels.shape == (4, 4, 3)
    assert pixels.min() == 255


def _read_in_child(source, indices):
    return source.read(indices).sum(dtype=np.int64)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_archives_are_read_by_several_processes_at_once(tmp_path, method):
    data = open_data(write_zip(tmp_path / "d.zip", images("train/", 40) | images("test/", 40)))
    halves = np.array_split(np.arange(len(data.test)), 4)
    here = [_read_in_child(data.test, half) for half in halves]
    with multiprocessing.get_context(method).Pool(2) as pool:
        there = pool.starmap(_read_in_child, [(data.test, half) for half in halves])
    assert there == here


def test_a_pickled_split_reads_the_same(tmp_path):
    data = open_data(write_zip(tmp_path / "d.zip", images()))
    copy = pickle.loads(pickle.dumps(data.train))
    assert np.array_equal(copy.read(range(22)), data.train.read(range(22)))


# --- digits and factories --------------------------------------------------------------------


def test_digits():
    data = open_data("digits")
    assert data.classes == tuple("0123456789")
    assert counts(data) == (1294, 144, 359)
    assert data.size == (16, 16)
    pixels = data.train.read([0, 1])
    assert pixels.shape == (2, 16, 16, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    whole = data.train.parent.read(range(1797))
    assert (int(whole.min()), int(whole.max())) == (0, 255)
    assert open_data("digits", size=(32, 32), holdout=0).train.read([0]).shape == (1, 32, 32, 3)


FACTORIES = """
import numpy as np
from mpq.data import open_data
x = np.arange(40 * 4 * 4, dtype=np.uint8).reshape(40, 4, 4)
y = np.arange(40) % 4
colour = np.repeat(x[..., None], 3, axis=-1)
def grey(): return x, y
def splits(): return {"train": (colour, y), "val": (colour[:8], y[:8]), "test": (colour[:4], y[:4])}
def digits(): return open_data("digits")
def planes(): return colour.transpose(0, 3, 1, 2), y
def floats(): return x / 255, y
def short(): return x, y[:-1]
def unknown(): return {"trian": (x, y)}
def no_train(): return {"test": (x, y)}
def nothing(): return None
def fails(): raise RuntimeError("disk on fire")
text = "not callable"
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.delitem(sys.modules, "my_factories", raising=False)
    functions = "grey splits digits planes floats short unknown no_train nothing fails text gray"
    with trusting(*(f"my_factories:{function}" for function in functions.split())):
        yield "my_factories"
    sys.modules.pop("my_factories", None)


def test_factories_give_arrays_splits_or_data_sets(factories):
    grey = open_data(f"{factories}:grey")
    assert counts(grey) == (29, 3, 8)
    assert grey.train.read([0]).shape == (1, 4, 4, 3)
    assert counts(open_data(f"{factories}:splits", size=(8, 8))) == (40, 8, 4)
    assert open_data(f"{factories}:splits", size=(8, 8)).train.read([3]).shape == (1, 8, 8, 3)
    assert open_data(f"{factories}:digits").name == "digits"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("planes", r"must be uint8 \[n, H, W, 3\].*Got uint8 \[40, 3, 4, 4\]"),
        ("floats", r"must be uint8 .* Got float64 \[40, 4, 4\]"),
        ("short", r"labels of the train split .* integers \[40\].*Got int64 \[39\]"),
        ("unknown", r"Got 'trian'; did you mean train"),
        ("no_train", "must give a train split. Got test"),
        ("nothing", r"must be a DataSet, \(images, labels\) or a dict.*Got NoneType"),
        ("fails", "failed with RuntimeError: disk on fire"),
        ("text", "has no callable 'text'"),
        ("gray", "has no callable 'gray'; did you mean grey"),
    ],
)
def test_bad_factories(factories, function, message):
    with pytest.raises(DataError, match=message):
        open_data(f"{factories}:{function}")


def test_factory_that_cannot_be_imported(tmp_path):
    absent = pytest.raises(DataError, match=r"module 'absent_module' of --data .* be importable")
    with trusting("absent_module:make"), absent:
        open_data("absent_module:make")
    (tmp_path / "broken_module.py").write_text("def make(:")
    broken = pytest.raises(DataError, match=r"'broken_module' of --data .* raised SyntaxError")
    with trusting("broken_module:make"), broken:
        open_data("broken_module:make")


def test_factory_of_another_size(factories):
    with pytest.raises(DataError, match=r"images of \(16, 16\), but \(32, 32\) is asked for"):
        open_data(f"{factories}:digits", size=(32, 32))


# --- sampling --------------------------------------------------------------------------------


def split_of(labels) -> ArraySplit:
    labels = np.asarray(labels, np.int64)
    return ArraySplit(np.zeros((len(labels), 2, 2, 3), np.uint8), labels, (2, 2))


def test_samples_are_balanced_seeded_and_without_replacement():
    source = split_of(np.repeat(np.arange(10), 100))
    chosen = sample_indices(source, 512, 3)
    assert len(set(chosen.tolist())) == 512
    assert set(np.bincount(source.labels[chosen]).tolist()) == {51, 52}
    assert np.array_equal(chosen, sample_indices(source, 512, 3))
    assert not np.array_equal(chosen, sample_indices(source, 512, 4))
    assert np.array_equal(chosen[:128], sample_indices(source, 128, 3))


def test_rare_classes_give_all_they_have():
    source = split_of([0] * 100 + [1] * 3 + [2] * 100)
    chosen = sample_indices(source, 43, 0)
    assert np.bincount(source.labels[chosen]).tolist() == [20, 3, 20]


def test_samples_at_the_ends():
    source = split_of([0, 1, 1])
    assert sorted(sample_indices(source, 99, 0).tolist()) == [0, 1, 2]
    assert len(sample_indices(source, 0, 0)) == 0
    assert len(sample_indices(split_of([]), 5, 0)) == 0
    with pytest.raises(DataError, match=r"samples must be 0 or more\. Got -1"):
        sample_indices(source, -1, 0)


def test_holdout_is_proportional_and_a_class_of_one_stays_in_train():
    labels = np.array([0] * 200 + [1] * 100 + [2])
    held, rest = stratified(labels, 30, seed=0)
    assert np.bincount(labels[held], minlength=3).tolist() == [20, 10, 0]
    assert sorted([*held, *rest]) == list(range(301))


def test_subset_of_a_subset_refers_to_the_first_parent():
    source = split_of(np.arange(10))
    inner = subset(subset(source, [9, 8, 7, 6]), [1, 3])
    assert inner.parent is source
    assert inner.labels.tolist() == [8, 6]


def test_data_set_checks_its_labels():
    source = split_of([0, 1, 2])
    with pytest.raises(
        DataError, match=r"labels of the test split of x must be 0\.\.1. Got 0\.\.2"
    ):
        DataSet("x", ("a", "b"), split_of([0]), split_of([]), source, (2, 2))


def test_data_does_not_import_torch_or_scikit_learn():
    code = "import mpq.data, sys; print({'torch', 'sklearn', 'torchvision'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"

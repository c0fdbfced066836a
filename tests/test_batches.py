"""Batches of the user's own: targets that follow their images, long epochs, samples of streams."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import mpq
from mpq._torchvision import transforms, tv_tensors
from mpq.batch import joined, shared
from mpq.data.batches import reservoir
from mpq.errors import DataError
from mpq.limits import limited
from mpq.pipeline.anything import peeked
from mpq.pipeline.given import gather
from mpq.train.feed import Arrays, Loader, Share
from mpq.train.recipe import Recipe
from mpq.train.transforms import Transform, followed

ALONE = Share(0, torch.device("cpu"))


class Boxed(Dataset[Any]):
    """Pictures with one bright rectangle, and the box around it."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, at: int) -> Any:
        x, y = 3 + at % 5, 2 + at % 7
        image, box = torch.zeros(3, 16, 16), torch.tensor([[x, y, x + 4.0, y + 3.0]])
        image[:, y : y + 3, x : x + 4] = 1
        return image, {"boxes": box, "labels": torch.tensor([at % 2]), "id": at}


def collated(items: list[Any]) -> tuple[Tensor, list[Any]]:
    return torch.stack([image for image, _ in items]), [target for _, target in items]


def loader() -> DataLoader[Any]:
    return DataLoader(Boxed(), batch_size=4, collate_fn=collated)


def check_boxes(batch: Any) -> None:
    for image, target in zip(*batch, strict=True):
        assert type(target["boxes"]) is Tensor
        bright = torch.zeros(16, 16)
        for x1, y1, x2, y2 in target["boxes"].int().tolist():
            bright[y1:y2, x1:x2] = 1
        assert torch.equal(image[0], bright)


def moving() -> Transform:
    v2 = transforms()
    steps = [v2.RandomHorizontalFlip(), v2.Pad(2), v2.RandomCrop(16)]
    return Transform("moving", v2.Compose(steps))


# -- transforms ----------------------------------------------------------------------------------


def test_a_detectors_boxes_follow_their_images() -> None:
    batch = next(iter(loader()))
    found, again = (followed(batch, moving(), (0, 1, 2, 0)) for _ in range(2))
    check_boxes(batch)
    check_boxes(found)
    assert not torch.equal(found[0], batch[0])
    assert torch.equal(found[0], again[0])
    assert [(t["id"], t["labels"]) for t in found[1]] == [(t["id"], t["labels"]) for t in batch[1]]


def test_qat_transforms_batches_with_their_boxes() -> None:
    seen: list[Tensor] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        check_boxes(batch)
        seen.append(batch[0])
        return outputs.square().mean()

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    settings = {"batch": 4, "norm": "folded"}
    mpq.qat(network, loader(), loss=loss, transform=moving(), epochs=2, settings=settings)
    assert len({float(batch[0].sum((0, 1)).argmax()) for batch in seen}) > 1


@pytest.mark.parametrize("form", [tuple, list, dict])
def test_masks_and_pictures_follow_and_class_ids_stay(form) -> None:
    x, masks = torch.rand(2, 3, 6, 8), torch.randint(4, (2, 6, 8))
    parts = {"image": x, "mask": masks, "larger": 2 * x, "labels": torch.tensor([1, 0]), "n": 5}
    batch = parts if form is dict else form(parts.values())
    found = followed(batch, Transform("flip", transforms().RandomHorizontalFlip(1.0)), (0,))
    assert type(found) is form
    wanted = [x.flip(-1), masks.flip(-1), 2 * x.flip(-1), parts["labels"]]
    for one, other in zip(found.values() if form is dict else found, wanted, strict=False):
        assert type(one) is Tensor
        assert torch.equal(one, other)


def test_boxes_of_another_form_say_so_themselves() -> None:
    own = tv_tensors().BoundingBoxes([[1, 2, 3, 4]], format="XYWH", canvas_size=(6, 8))
    flip = Transform("flip", transforms().RandomHorizontalFlip(1.0))
    found = followed((torch.zeros(1, 3, 6, 8), [{"boxes": own}]), flip, (0,))
    assert found[1][0]["boxes"].tolist() == [[4, 2, 3, 4]]


def test_transforms_of_batches_that_fail() -> None:
    batch = torch.rand(3, 3, 8, 8)
    with pytest.raises(DataError, match=r"--transform t failed with ZeroDivisionError"):
        followed(batch, Transform("t", lambda x: 1 / 0), (0,))
    sizes = iter([8, 8, 6])
    with pytest.raises(DataError, match=r"to one size\. Got .*\[3, 6, 6\].*\[3, 8, 8\] in a batch"):
        followed(batch, Transform("t", lambda x: x[:, : (n := next(sizes)), :n]), (0,))


# -- epochs of some batches ----------------------------------------------------------------------


def views(feed: Loader, *numbers: int) -> list[list[float]]:
    found = []
    for view in numbers:
        feed.begin(view)
        found.append([float(part[0]) for (part,) in feed.parts()])
    return found


class Letters(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (torch.tensor(float(at)) for at in range(5))


@pytest.mark.parametrize("stream", [False, True])
def test_an_epoch_of_some_batches_goes_on_where_the_last_one_ended(stream) -> None:
    def feed() -> Loader:
        batches: Any = DataLoader(Letters(), 1) if stream else list(torch.arange(5.0).split(1))
        return Loader(batches, ALONE, limit=2)

    assert views(feed(), 0, 1, 2, 3) == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert views(feed(), 2, 3) == [[4, 0], [1, 2]]  # as a run that is resumed
    assert views(feed(), 0, 1, 0) == [[0, 1], [2, 3], [0, 1]]  # as a recipe's cycle


def test_batches_without_a_length_need_one() -> None:
    with pytest.raises(DataError, match=r"must have a length.*--set epoch_steps=N.*Got DataLoader"):
        Loader(DataLoader(Letters(), 1), ALONE)
    once = Loader((torch.zeros(1) for _ in range(3)), ALONE, limit=2)
    with pytest.raises(DataError, match=r"must come 2 times an epoch.* Got 1"):
        views(once, 0, 1)


def test_images_in_epochs_of_some_batches_are_others_each_time() -> None:
    images, labels = torch.zeros(40, 4, 4, 3).byte().numpy(), torch.arange(40).numpy()
    recipe = Recipe.load("plain").override({"batch": 4, "epoch_steps": 3})
    feed, seen = Arrays((images, labels), recipe, ALONE), []
    assert feed.steps == 3
    for view in range(2):
        feed.begin(view)
        seen.append([int(i) for parts in feed.parts() for part in parts for i in part])
    assert [len(set(epoch)) for epoch in seen] == [12, 12]
    assert seen[0] != seen[1]


# -- samples -------------------------------------------------------------------------------------


class Sorted(IterableDataset[Any]):
    """A thousand samples in the order of their classes; `read` counts them."""

    read = 0

    def __iter__(self) -> Iterator[Any]:
        for at in range(1000):
            self.read += 1
            yield torch.full((3, 2, 2), float(at)), at // 100


class Counted(Dataset[Any]):
    read = 0

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, at: int) -> Any:
        self.read += 1
        return torch.full((3, 2, 2), float(at)), at // 100


@pytest.mark.parametrize("loaded", [False, True])
def test_a_sorted_stream_gives_samples_of_all_classes(loaded) -> None:
    stream = Sorted()
    data: Any = DataLoader(stream, batch_size=8) if loaded else stream
    (images, labels), again, other = (gather(data, 60, seed) for seed in (0, 0, 1))
    assert len(set(labels.tolist())) >= 8
    assert len(set(labels[:20].tolist())) >= 5
    assert len({float(x.flat[0]) for x in images}) == 60
    assert (labels == again[1]).all()
    assert (labels != other[1]).any()


def test_of_a_stream_only_its_first_samples_are_looked_at() -> None:
    stream = Sorted()
    with limited(stream_samples=128):
        images, _ = gather(stream, 20, 0)
    assert float(images.max()) < 128
    assert stream.read <= 192  # batches of 64
    stream.read = 0
    peeked(stream, 0)
    assert stream.read == 64


def test_a_data_set_is_not_read_further_than_its_sample() -> None:
    data = Counted()
    assert len(set(gather(data, 40, 0)[1].tolist())) >= 8
    assert data.read == 40


def test_each_item_has_the_same_chance() -> None:
    taken = Counter(x for seed in range(400) for x in reservoir(range(10), 3, seed))
    assert min(taken.values()) > 80
    assert max(taken.values()) < 160
    assert reservoir([], 3, 0) == []
    assert sorted(reservoir(range(2), 3, 0)) == [0, 1]


def test_scores_of_a_loss_see_a_sample_of_the_stream() -> None:
    seen: list[int] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        seen.extend(batch[1].tolist())
        return outputs.square().mean()

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 10, 1)).eval()
    mpq.analyze(network, DataLoader(Sorted(), 8), loss=loss, num_calib=32)
    assert len(set(seen)) >= 6


def test_a_batch_that_is_a_list_is_shared_out_by_samples() -> None:
    batch = [torch.arange(2.0), torch.arange(2)]
    parts = [shared(batch, rank, 2) for rank in (0, 1)]
    assert [[float(x) for x in part[0]] for part in parts] == [[0], [1]]
    assert [len(part) for part in parts] == [2, 2]
    assert all(torch.equal(a, b) for a, b in zip(joined(parts), batch, strict=True))


# -- what can go wrong ---------------------------------------------------------------------------


class Bad(Dataset[Any]):
    """Eight samples, one of which is bad."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 8

    def __getitem__(self, at: int) -> Any:
        if at == 5 and self.kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if at == 5 and self.kind == "raises":
            raise OSError("no file 5")
        side = 6 if at == 5 and self.kind == "smaller" else 8
        return torch.zeros(3, side, side), 0


@pytest.mark.parametrize(
    ("kind", "workers", "message"),
    [
        ("smaller", 0, r"batch 2 of the data failed with .*got \[3, 8, 8\].*\[3, 6, 6\].*one size"),
        ("smaller", 1, r"batch 2 of the data failed with RuntimeError: .*one size"),
        ("raises", 0, r"batch 2 of the data failed with OSError: no file 5, at .*test_batches.py"),
        ("raises", 1, r"batch 2 of the data failed with OSError: no file 5\."),
        ("dies", 1, r"a process that reads data died: .*--workers 0.*--resume"),
    ],
)
def test_loaders_that_fail(kind, workers, message) -> None:
    loader = DataLoader(Bad(kind), 2, num_workers=workers)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with pytest.raises(DataError, match=message):
        mpq.qat(network, loader, loss=lambda o, b: o.square().mean(), epochs=1)


def test_a_data_set_whose_samples_differ_in_size() -> None:
    with pytest.raises(DataError, match=r"batch 0 of the data failed with .*one size"):
        gather(Bad("smaller"), 8, 0)

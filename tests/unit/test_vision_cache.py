"""Processed images by content: what is processed again, and what is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cv_lightning.models.adapters import ImageInputs
from cv_lightning.models.vision import VisionCache


@pytest.fixture
def processed() -> list[Image.Image]:
    return []


@pytest.fixture
def cache(processed: list[Image.Image]) -> VisionCache:
    """One number of four bytes for each image."""

    def process(images: Sequence[Image.Image]) -> list[ImageInputs]:
        processed.extend(images)
        return [ImageInputs({"pixel_values": torch.zeros(1)}, (1, 1)) for _ in images]

    return VisionCache(SimpleNamespace(process_images=process))  # type: ignore[arg-type]


def image(colour: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (colour, 0, 0))


def test_equal_images_are_processed_once_and_are_one_object(cache: VisionCache, processed: list[Image.Image]) -> None:
    first = cache.of(image(1))
    again, other, same = cache.get([image(1), image(2), image(2)])
    assert again is first and other is same and other is not first
    assert len(processed) == cache.num_passes == cache.num_images == 2
    cache.clear()
    assert cache.of(image(1)) is not first and cache.num_passes == cache.num_images == 1


def test_an_engines_images_stay_within_the_bound_and_the_last_used_ones_stay(cache: VisionCache) -> None:
    cache.max_bytes = 8
    kept = cache.of(image(1))
    cache.of(image(2))
    cache.of(image(1))
    cache.of(image(3))  # drops the second
    assert cache.of(image(1)) is kept and (cache.num_passes, cache.num_images) == (3, 3)
    cache.of(image(2))
    assert (cache.num_passes, cache.num_images) == (4, 3), "the repeated pass is counted"


def test_the_images_of_an_update_stay_whatever_they_take(cache: VisionCache) -> None:
    cache.max_bytes = 0
    assert cache.of(image(1)) is not cache.of(image(1)), "0 keeps nothing"
    images = [image(colour) for colour in range(5)]
    assert cache.get(images) == cache.get(images)


def test_a_request_that_is_aborted_during_its_processing_takes_no_image_of_the_update(cache: VisionCache) -> None:
    cache.max_bytes = 8
    images = [image(colour) for colour in range(3)]
    update = cache.get(images)
    assert cache.of(image(9)) is not cache.of(image(9)), "there is no room for it"
    assert all(one is other for one, other in zip(cache.get(images), update, strict=True))
    cache.clear()
    kept = cache.of(image(9))
    for colour in range(2):
        cache.of(image(colour))
    assert cache.of(image(9)) is not kept, "the bound holds again"

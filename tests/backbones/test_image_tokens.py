"""Tokens and crops by an image's size are those that the real processors make of it."""

from __future__ import annotations

import pytest
from PIL import Image

from pipeline.backbones.lmm import load_lmm
from pipeline.backbones.lmm_processor import load_processor
from pipeline.config.models import ModelConfig
from pipeline.data.conversation import Conversation
from pipeline.data.image_sizes import image_sizes, limit_image_tokens
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from tests.backbones.real_processors import save_real
from tests.backbones.tiny_families import FAMILIES

SIZES = [
    (8, 8),
    (1, 1),
    (64, 64),
    (27, 29),
    (28, 28),
    (336, 336),
    (640, 480),
    (480, 640),
    (333, 500),
    (1000, 251),
    (150, 1),
    (1, 150),
    (199, 1),
    (2000, 40),
    (40, 2000),
    (1024, 256),
    (900, 901),
    (365, 364),
    (1457, 729),
]
LARGE = [(4032, 3024), (12000, 1500), (9248, 6944)]  # a phone's photograph, a panorama, 64 megapixels


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = save_real(tmp_path_factory.mktemp("real") / kind, kind)
        return made[kind]

    return folder


def compare(conversation, size):
    """One sample through the processor and by its size."""
    width, height = size
    sample = Sample("s", None, "What is shown here?", "A cat")
    example = conversation.example_of(sample, Image.new("RGB", size, (9, 8, 7)))
    shape = conversation.image_shape(width, height)
    assert example.images is not None
    assert example.prompt.count(conversation.image_number) == shape.tokens
    assert conversation.length(sample, size).prompt == len(example.prompt)
    assert conversation.length(sample, size).answer == len(example.answer)
    pixels = example.images["pixel_values"]
    assert sum(value.numel() for name, value in example.images.items() if name.startswith("pixel")) == shape.values
    if pixels.dim() == 4:
        assert len(pixels) == shape.crops
    else:
        assert len(pixels) == shape.tower_tokens


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_size_tells_tokens_crops_and_values(folders, kind):
    conversation = Conversation(load_processor(ModelConfig(path=str(folders(kind)))), 10**6)
    for size in SIZES:
        compare(conversation, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_size_tells_the_same_of_large_photographs(folders, kind, size):
    compare(Conversation(load_processor(ModelConfig(path=str(folders(kind)))), 10**6), size)


def test_the_known_numbers_of_real_photographs(folders):
    conversation = Conversation(load_processor(ModelConfig(path=str(folders("qwen2_5_vl")))), 10**6)
    found = [conversation.image_shape(*size).tokens for size in ((640, 480), (1024, 768), (1600, 1200), (3000, 4000))]
    assert found == [391, 999, 2451, 15301]
    internvl = Conversation(load_processor(ModelConfig(path=str(folders("internvl")))), 10**6)
    assert internvl.image_shape(640, 480).tokens == 3328 and internvl.image_shape(640, 480).crops == 13


LIMITS = {
    "llava": 576,
    "fast_vlm": 49,
    "llava_next": 1800,
    "qwen2_5_vl": 64,
    "internvl": 1000,
    "idefics3": 900,
    "smolvlm": 320,
    "gemma3": 1024,
}


@pytest.mark.parametrize("kind", LIMITS)
def test_a_limit_is_kept_for_every_size_and_the_size_still_tells_the_tokens(folders, kind):
    most = LIMITS[kind]
    conversation = Conversation(load_processor(ModelConfig(path=str(folders(kind)), image_tokens=most)), 10**6)
    for size in [*SIZES, (1999, 10), (11, 2190)]:
        compare(conversation, size)
        assert conversation.image_shape(*size).tokens <= most, size
    assert conversation.image_shape(12000, 9000).tokens > most / 4  # and used


def test_gemma_with_room_for_crops_pans_and_scans(folders):
    conversation = Conversation(load_processor(ModelConfig(path=str(folders("gemma3")), image_tokens=1024)), 10**6)
    assert conversation.image_shape(1600, 400).crops == 4 and conversation.image_shape(400, 400).crops == 1
    compare(conversation, (1600, 400))


@pytest.mark.parametrize(
    ("kind", "most", "least"),
    [
        ("llava", 575, 576),
        ("fast_vlm", 48, 49),
        ("internvl", 100, 256),
        ("smolvlm", 63, 64),
        ("gemma3", 255, 256),
        ("llava_next", 1000, 1752),
    ],
)
def test_a_limit_that_a_model_cannot_keep_is_refused(folders, kind, most, least):
    with pytest.raises(UserError, match=f"model.image_tokens is {most}, .* {least} tokens"):
        load_processor(ModelConfig(path=str(folders(kind)), image_tokens=most))


def test_without_a_limit_the_checkpoint_decides(folders):
    processor = load_processor(ModelConfig(path=str(folders("qwen2_5_vl"))))
    before = dict(processor.image_processor.size)
    limit_image_tokens(processor, None)
    assert dict(processor.image_processor.size) == before == {"shortest_edge": 3136, "longest_edge": 12845056}


def test_qwen_refuses_strips(folders):
    sizes = image_sizes(load_processor(ModelConfig(path=str(folders("qwen2_5_vl")))))
    with pytest.raises(ValueError, match="aspect ratio"):
        sizes.of(300, 1)


@pytest.mark.parametrize(
    ("kind", "most"), [("llava_next", 60), ("qwen2_5_vl", 9), ("internvl", 12), ("idefics3", 8), ("gemma3", 16)]
)
def test_a_model_takes_in_what_its_limited_processor_hands_over(tmp_path, kind, most):
    config = ModelConfig(path=str(FAMILIES[kind](tmp_path)), image_tokens=most)
    lmm = load_lmm(config)
    for size in ((200, 40), (48, 200), (64, 64)):
        example = lmm.conversation.example_of(Sample("s", None, "What?", "A cat"), Image.new("RGB", size, (9, 8, 7)))
        assert example.images is not None
        assert example.prompt.count(lmm.image_token) == len(lmm.image_features(example.images)) <= most


def test_an_image_that_the_processor_refuses_is_named(folders):
    conversation = Conversation(load_processor(ModelConfig(path=str(folders("qwen2_5_vl")))), 10**6)
    with pytest.raises(UserError, match=r"image of sample 'strip', 300 x 1 pixels .*aspect ratio.*data.too_long"):
        conversation.example_of(Sample("strip", None, "What?", "A line"), Image.new("RGB", (300, 1)))
    with pytest.raises(UserError, match=r"image of sample 'strip', 300 x 1 pixels"):
        conversation.length(Sample("strip", None, "What?", "A line"), (300, 1))

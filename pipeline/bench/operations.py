"""A training step's floating-point operations in closed form, for sizes that no CPU could run.

As in `measure.operations`, products, convolutions and attention are counted, with two operations per multiplication.
The backward pass costs as much as the forward pass for frozen weights, and two and a half times as much for attention,
whose kernel recomputes the scores. `tests/bench/test_operations.py` compares these formulas to counted operations.
"""

from __future__ import annotations

from typing import Any

from pipeline.bench.sizes import SIZES, Size

TASKS = 8
SHARED = 4  # questions about one image in the variants that share it
TEXT_TOKENS = 77  # of CLIP's text tower
VARIANTS = ("reference", "peft", "after_bos", "after_bos_kept", "after_image", "after_image_shared")
# Further variants of a step, measured where they are named: rows replaced in every layer, and prefixes in every layer.
PARTS = ("deep", "prefix")
FORWARD, BACKWARD = 4, 10  # attention: operations per query, key and unit of width


def step_operations(size: Size, samples: int, variant: str, recomputed: bool = True) -> int:
    """Operations of a step of `samples` samples; `recomputed` False leaves out what `reference` recomputes."""
    beginning = 1 + size.system_tokens + size.image_tokens
    sets = size.k * size.prompt_length
    behind = size.question_tokens + size.answer_tokens
    whole = beginning + behind + sets
    set_ = _head(size)
    if variant == "peft":
        decoder = _layers(size, whole, whole, size.layers, True) + 2 * _words(size, whole)
        return samples * (_image(size) + decoder)
    if variant == "reference":
        again = _layers(size, whole, whole, size.layers, False) * recomputed
        decoder = again + _layers(size, whole, whole, size.layers, True) + 2 * _words(size, whole)
        keys = 2 * (size.vision_width + size.text_width) * size.key_width + _text(size)
        # All heads run forward. Backward, the newest has gradients of weights and set, the others of the set only.
        return samples * (_image(size) + keys + decoder) + (2 * TASKS + 1) * set_
    if variant in ("after_bos", "after_bos_kept"):
        image = _projector(size) if variant == "after_bos_kept" else _image(size)
        decoder = _layers(size, whole, whole, size.layers - 1, True)
        decoder += _last_layer(size, whole, whole, size.answer_tokens, True) + 2 * _words(size, size.answer_tokens)
        return samples * (image + decoder) + 3 * set_
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}; expected one of {', '.join(VARIANTS)}")
    images = -(-samples // SHARED) if variant == "after_image_shared" else samples
    first = _image(size) + _layers(size, beginning, beginning, size.layers - 1, False)
    first += _last_layer(size, beginning, beginning, 1, False)
    own = behind + sets
    second = _layers(size, own, beginning + own, size.layers - 1, True)
    second += _last_layer(size, own, beginning + own, size.answer_tokens, True) + 2 * _words(size, size.answer_tokens)
    return images * first + samples * second + 3 * set_


def bench_operations(samples: int = SHARED) -> dict[str, Any]:
    """Operations per sample of every variant at every size, and ratios to `reference` and `peft`; nothing is run."""
    counted = {
        name: {variant: step_operations(size, samples, variant) / samples for variant in VARIANTS}
        for name, size in SIZES.items()
    }
    ours = [variant for variant in VARIANTS if variant.startswith("after_")]
    return {
        "samples": samples,
        "variants": {
            name: {f"{variant}, GFLOP per sample": round(number / 1e9, 3) for variant, number in row.items()}
            for name, row in counted.items()
        },
        "ratios": {
            against: {
                name: {variant: round(row[against] / row[variant], 2) for variant in ours}
                for name, row in counted.items()
            }
            for against in ("reference", "peft")
        },
    }


def _layers(size: Size, queries: int, keys: int, layers: int, learns: bool) -> int:
    """`layers` decoder layers over `queries` tokens that attend to `keys` tokens."""
    linear = 2 * queries * (4 * size.width**2 + 3 * size.width * size.inner)
    return layers * _both_ways(linear, queries * keys * size.width, learns)


def _last_layer(size: Size, tokens: int, keys: int, answers: int, learns: bool) -> int:
    """The last layer: keys and values for all tokens, everything else for the answers only.

    The layer's code computes keys and values of the answers a second time, which are dropped.
    """
    linear = 2 * (tokens * 2 * size.width**2 + answers * (2 * size.width**2 + 3 * size.width * size.inner))
    return _both_ways(linear, answers * keys * size.width, learns) + 2 * answers * 2 * size.width**2


def _both_ways(linear: int, attention: int, learns: bool) -> int:
    return linear * (1 + learns) + attention * (FORWARD + BACKWARD * learns)


def _words(size: Size, tokens: int) -> int:
    """The LM head, one way."""
    return 2 * tokens * size.width * size.vocabulary


def _head(size: Size) -> int:
    """The projection head over one set, one way."""
    return 2 * size.prompt_length * (size.width**2 + size.width * size.key_width)


def _tower(width: int, tokens: int, layers: int) -> int:
    """A CLIP tower's layers, forward: attention and an MLP of four times the width."""
    return layers * (2 * tokens * 12 * width**2 + FORWARD * tokens**2 * width)


def _image(size: Size) -> int:
    """The vision tower with its patches, and the projector."""
    patches = 2 * size.image_tokens * 3 * size.patch**2 * size.vision_width
    return patches + _tower(size.vision_width, size.image_tokens + 1, size.vision_layers) + _projector(size)


def _projector(size: Size) -> int:
    return 2 * size.image_tokens * (size.vision_width * size.width + size.width**2)


def _text(size: Size) -> int:
    tokens = min(TEXT_TOKENS, size.question_tokens + size.answer_tokens + 1)
    return _tower(size.text_width, tokens, size.text_layers)

"""The memory plan of a benchmark per GPU, from the backbone's configuration; no weights are read.

The counterpart of `pipeline.planning.memory_plan` for task sequences. Weights and trainables are exact. Activations,
and DeepSpeed's buffers besides gradients and momentum, are estimates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipeline.clip.learning.descriptions import Descriptions
from pipeline.clip.learning.few_shot_batches import micro_batches
from pipeline.clip.methods import learner_of_sizes, method_class
from pipeline.clip.recipe import ClipMethodConfig, ClipRecipe
from pipeline.clip.towers.backbone import Sizes
from pipeline.clip.towers.encode import AT_ONCE
from pipeline.errors import UserError
from pipeline.planning.plan import FLOAT32, Entry, MemoryPlan
from pipeline.planning.zero import Zero
from pipeline.training.deepspeed_config import deepspeed_file, with_recipe
from pipeline.training.hpz import with_node_size

ASSUMED_TEXT = 24  # assumed tokens of a class's text with template and prompts, where texts are not padded to 77


def plan_benchmark(recipe: ClipRecipe, ranks: int, model: nn.Module, classes: int, tested: int) -> MemoryPlan:
    """Plan the memory of a run on `ranks` GPUs; UserError for an invalid DeepSpeed file.

    Args:
        recipe: the benchmark's recipe.
        ranks: the number of GPUs.
        model: the backbone on the meta device.
        classes: the largest number of classes that a unit trains on.
        tested: the largest number of classes that a unit is evaluated on.
    """
    element = 2 if recipe.model.dtype == "bfloat16" else FLOAT32
    config = with_node_size(deepspeed_file(recipe.train.deepspeed), ranks)
    zero = Zero.of(with_recipe(config, 1, 1, None, recipe.model.dtype), ranks, element)
    stage = zero.stage
    sizes = [parameter.numel() for parameter in model.parameters()]
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    whole = sum(sizes) * element + buffers
    weights, weights_note = zero.frozen(sizes, buffers)
    most, by_method = max((_activations(recipe, m, ranks, model, classes, element), m.name) for m in recipe.methods)
    searching, searched_by = max(
        (_searching(recipe, m, ranks, model, classes, element), m.name) for m in recipe.methods
    )
    if searching > most:
        most, by_method = searching, f"{searched_by} (its search)"
    learned, trained_by = max((_trainables(recipe, m, model, classes), m.name) for m in recipe.methods)
    held, gradients, optimizer = zero.trained([[learned]], states=1)
    return MemoryPlan(
        ranks,
        stage,
        (
            Entry("weights", weights, weights, weights_note),
            Entry(
                "gathered window",
                whole if stage == 3 else 0,
                0,
                "upper bound: all weights" if stage == 3 else "nothing is gathered",
            ),
            Entry(
                "activations",
                most,
                _evaluation(recipe, model, tested, element),
                f"training {by_method}, {classes} classes; evaluating {tested} classes, {recipe.evaluate_batch} images",
            ),
            Entry("trainables", held, held, f"{learned:,} parameters, {trained_by}"),
            Entry("gradients", gradients, gradients, "with the reduction buffer"),
            Entry("optimizer", optimizer, optimizer, "float32 copies and SGD's momentum"),
            Entry(
                "evaluation replica",
                whole if stage == 3 else 0,
                whole if stage == 3 else 0,
                "the whole frozen model" if stage == 3 else "the trained model itself evaluates",
            ),
        ),
    )


def _learner(recipe: ClipRecipe, method: ClipMethodConfig, model: Any, classes: int) -> Any:
    search = recipe.search_of(method)
    options = method.options | ({"classes": _texts(recipe, method, classes)} if method.per_class else {})
    options |= {} if search is None else search.longest
    with torch.device("meta"):
        return learner_of_sizes(method.kind, Sizes.of(model.config), 0, **options)


def _texts(recipe: ClipRecipe, method: ClipMethodConfig, classes: int) -> int:
    """The number of texts of a row: one per class, or the most descriptions of a dataset where their files are here."""
    if method.descriptions is None:
        return classes
    counts = [classes]
    for dataset in recipe.data.datasets:
        with contextlib.suppress(UserError):
            counts.append(sum(map(len, Descriptions.read(method.descriptions, dataset.name).texts.values())))
    return max(counts)


def _trainables(recipe: ClipRecipe, method: ClipMethodConfig, model: Any, classes: int) -> int:
    return sum(parameter.numel() for parameter in _learner(recipe, method, model, classes).parameters())


def _activations(
    recipe: ClipRecipe, method: ClipMethodConfig, ranks: int, model: Any, classes: int, element: int
) -> int:
    """Bytes that one forward pass of a method keeps for the backward pass, over both towers."""
    if not method_class(method.kind).learns:
        return 0
    learner, train = _learner(recipe, method, model, classes), recipe.train_of(method)
    micro, _ = micro_batches(train.global_batch, train.micro_batch, ranks)
    texts = _texts(recipe, method, classes) * (micro if learner.per_image else 1)
    texts = min(texts, recipe.model.text_chunk or texts)  # a chunk's activations are recomputed in the backward pass
    text, vision = model.config.text_config, model.config.vision_config
    kept = kept_bytes(text, texts, text_tokens(model), element)
    if learner.changes_images:
        tokens = image_tokens(vision) + max(learner.schedule.vision.present + learner.schedule.vision.kv)
        return kept + kept_bytes(vision, micro, tokens, element)
    return kept + _passing(vision, micro * image_tokens(vision), element)


def _searching(recipe: ClipRecipe, method: ClipMethodConfig, ranks: int, model: Any, classes: int, element: int) -> int:
    """Bytes that a forward pass of a row's own search keeps for the backward pass, over both towers."""
    search, train = method.search, recipe.train_of(method)
    if search is None or search.like is not None:
        return 0
    micro, _ = micro_batches(search.global_batch, train.micro_batch, ranks)
    images = max(micro, -(-search.validation_batch // ranks))
    texts = min(classes, recipe.model.text_chunk or classes)
    text, vision = model.config.text_config, model.config.vision_config
    return mixed_bytes(text, texts, text_tokens(model), search.options.text, element) + mixed_bytes(
        vision, images, image_tokens(vision), search.options.vision, element
    )


def kept_bytes(tower: Any, sequences: int, tokens: int, element: int) -> int:
    """Bytes of activations that a frozen tower's blocks keep for the backward pass to prompts before them.

    A frozen linear layer keeps no input. Per token and block PyTorch keeps the inputs of two layer norms with their
    mean and deviation in float32; query, key, value and output of the attention, a row of its mask, and the log-sum-exp
    of each head; and the input and output of the MLP's activation function.

    Args:
        tower: the Hugging Face configuration of the tower.
        sequences: the number of sequences in the forward pass.
        tokens: the number of tokens per sequence.
        element: bytes per number.
    """
    width, heads = tower.hidden_size, tower.num_attention_heads
    per_token = (6 * width + 2 * tower.intermediate_size + tokens) * element + (4 + heads) * FLOAT32
    return sequences * tokens * tower.num_hidden_layers * per_token


def mixed_bytes(tower: Any, sequences: int, tokens: int, options: Sequence[int], element: int) -> int:
    """The same as `kept_bytes` where every block mixes the options of a search.

    The attention is written out: per head and token the scores of all tokens and their exponentials, in float32 and the
    latter in the tower's precision besides, and for every prompt its score and twice its share; per option some numbers
    more. The keys of prompts are the same for all sequences and are not counted.
    """
    heads, prompts = tower.num_attention_heads, sum(options)
    exact = 2 * tokens + 3 * prompts + 4 * len(options)
    again = (tokens + prompts) * element if element < FLOAT32 else 0
    per_token = heads * (exact * FLOAT32 + again)
    return kept_bytes(tower, sequences, tokens, element) + sequences * tokens * tower.num_hidden_layers * per_token


def text_tokens(model: Any) -> int:
    """Tokens of a text: ASSUMED_TEXT where texts may be shortened, else the tower's maximum length."""
    length = model.config.text_config.max_position_embeddings
    return min(length, ASSUMED_TEXT) if model.config.model_type == "clip" else length


def image_tokens(vision: Any) -> int:
    """Tokens of an image without prompts: its patches and the class token."""
    return (vision.image_size // vision.patch_size) ** 2 + 1


def _evaluation(recipe: ClipRecipe, model: Any, classes: int, element: int) -> int:
    """Bytes of activations in evaluation: those of the tower that needs more, without gradients."""
    per_image = any(method_class(method.kind).per_image for method in recipe.methods)
    texts = max(_texts(recipe, method, classes) for method in recipe.methods)
    texts *= recipe.evaluate_batch if per_image else 1
    texts = min(texts, recipe.model.text_chunk or texts, AT_ONCE)
    config = model.config
    return max(
        _passing(config.text_config, texts * text_tokens(model), element),
        _passing(config.vision_config, recipe.evaluate_batch * image_tokens(config.vision_config), element),
    )


def _passing(tower: Any, tokens: int, element: int) -> int:
    """Bytes of activations of one block for `tokens` tokens: input, residual, attention and MLP."""
    return tokens * (6 * tower.hidden_size + 2 * tower.intermediate_size) * element

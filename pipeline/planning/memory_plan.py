"""The memory plan: GPU memory of a run, from the model's configuration, without reading weights.

The model is built on the meta device, where tensors have shapes and no storage, and its parameters are counted as
DeepSpeed holds them at each ZeRO stage: Rajbhandari et al., "ZeRO: Memory Optimizations Toward
Training Trillion Parameter Models" (arXiv 1910.02054), section 5. Exact to padding: weights, trainables, gradients,
optimizer. Estimates: the gathered window (an upper bound), activations, and what generation needs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from pipeline.backbones.attentions import takes_lengths
from pipeline.backbones.lmm import DTYPES
from pipeline.backbones.recompute import recomputed_layers
from pipeline.config import registry
from pipeline.config.method import MethodOptions, choice_name
from pipeline.methods import make_method
from pipeline.planning.model_shape import (
    ModelShape,
    Quantised,
    head_size,
    intermediate_size,
    key_value_width,
    model_shape,
    number_in,
)
from pipeline.planning.plan import FLOAT32, Entry, MemoryPlan, Tokens
from pipeline.planning.replicas import Division, ranks_per_replica
from pipeline.planning.workload import Workload
from pipeline.planning.zero import Zero, in_words
from pipeline.prompts.heads import ProjectionHead
from pipeline.prompts.parts.base import kind_of
from pipeline.ranks.environment import ranks_per_node
from pipeline.training.deepspeed_config import accumulation, deepspeed_config

KEEP_REPLICA_BYTES = 2 << 30  # a larger evaluation replica is freed during training and loaded again afterwards
AHEAD = 4  # micro-batches that each loader process prepares ahead, see `pipeline.data.loader`
# Tokens of a question and its answer where no sample could be read; most of CoIN's are shorter.
ASSUMED_TEXT, ASSUMED_ANSWER = 128, 16


def plan_memory(work: Workload, ranks: int, model: nn.Module, tokens: Tokens, node: int | None = None) -> MemoryPlan:
    """Plan the memory of a run.

    Args:
        work: what is trained and generated, without `auto` settings.
        ranks: number of GPUs.
        model: the frozen model on the meta device (`meta_model`).
        tokens: lengths of the sample to plan for.
        node: GPUs on each node; None: as on this machine.

    Raises UserError where the batch size does not fit the ranks, for the DeepSpeed file, or where evaluation cannot be
    divided (see `accumulation`, `deepspeed_config`, `ranks_per_replica`).
    """
    element = DTYPES[work.model.dtype].itemsize
    zero = Zero.of(deepspeed_config(work.train, work.model.dtype, ranks, node), ranks, element)
    stage = zero.stage
    projector_learns = work.train.projector == "trained"
    shape = model_shape(model, projector_learns)
    groups = trainable_groups(work.method, shape, work.key_width, projector_learns)
    micro, _ = accumulation(work.train, ranks)
    inserted = inserted_vectors(work)
    length = tokens.image + tokens.text + tokens.answer + inserted
    length = min(length, work.model.max_length + inserted)

    quantised = Quantised.of(shape, work.model.quantization)
    weights, weights_note = zero.frozen(shape.frozen, shape.buffers + quantised.held - quantised.values * element)
    if quantised.values:
        weights_note += f", {in_words(quantised.values)} of them in {work.model.quantization}"
    held, gradients, optimizer = zero.trained(groups, states=2)
    window, window_note = zero.window(shape.frozen, shape.fetched, [size for group in groups for size in group])
    activations = training_activations(work, shape, micro, length, tokens, element, stage)
    whole = sum(shape.frozen) * element + sum(shape.projector) * element * projector_learns + shape.buffers
    whole += quantised.held - quantised.values * element
    replica, replica_note, cached = whole if stage == 3 else 0, "the training model itself generates", 1.0
    if replica:
        replica_note = "the complete frozen model"
    shards = ranks_per_replica(work.evaluate, work.model, ranks, node or ranks_per_node())
    if shards > 1:
        division = Division.of(model, shards)
        whole = replica = division.held
        replica_note, cached = f"1/{shards} of the frozen model's layers", division.layers
    generation = generation_memory(work, shape, length, tokens, element, cached)
    beside, used, pool = modules_memory(work, shape, element)
    if work.evaluate.engine == "vllm":
        replica = generation = used = 0
        replica_note = "a vLLM server generates, elsewhere"
    trained = sum(map(sum, groups))
    return MemoryPlan(
        ranks,
        stage,
        (
            Entry("weights", weights, weights, weights_note),
            Entry("gathered window", window, 0, window_note),
            Entry(
                "activations",
                activations,
                generation,
                f"training {micro} x {length} tokens ({tokens.source}); generating {work.answers} at once",
            ),
            Entry("trainables", held, held, f"{in_words(trained)} parameters"),
            Entry("gradients", gradients, gradients, "with the reduction buffer"),
            Entry(
                "modules",
                beside,
                used,
                "of earlier tasks in training; of all tasks, if answers use all",
            ),
            Entry("optimizer", optimizer, optimizer, "float32 masters and Adam's two moments"),
            Entry(
                "evaluation replica",
                replica if whole < KEEP_REPLICA_BYTES else 0,
                replica,
                replica_note,
            ),
        ),
        waiting=_waiting(work, micro, tokens),
        pool=pool,
    )


def trainable_groups(
    options: MethodOptions, shape: ModelShape, key_width: int, projector_learns: bool
) -> list[list[int]]:
    """Numbers of elements of the trained parameters, by optimizer group."""
    method, width = make_method(options), shape.text.hidden_size
    own = kind_of(method).sizes(method, replace(shape.decoder, key_width=key_width))
    groups = [own] if own else []
    router = method.routing.router
    if router is not None and router.learned and router.learned_in == "head":
        with torch.device("meta"):
            head = ProjectionHead(width, key_width)
        groups.append([parameter.numel() for parameter in head.parameters()])
    return [*groups, shape.projector] if projector_learns else groups


def modules_memory(work: Workload, shape: ModelShape, element: int) -> tuple[int, int, int]:
    """Bytes of finished modules: on the GPU while the last stage is trained, and while answers are generated; and of
    the pool in the host memory of each rank, in float32."""
    method = make_method(work.method)
    decoder = replace(shape.decoder, key_width=work.key_width)
    stored, earlier = kind_of(method).stored(method, decoder), max(work.tasks - 1, 0)
    rule, terms = method.routing.rule, [registry.load("terms", choice_name(choice)) for choice in method.terms]
    trains_beside = rule.training(torch.zeros(1, earlier), torch.zeros(1)).width > 0
    if not trains_beside and not any(term.uses_bank for term in terms):
        earlier = 0
    return earlier * stored * element, work.tasks * stored * element, work.tasks * stored * FLOAT32


def inserted_vectors(work: Workload) -> int:
    """The most vectors that modules insert into the sequence of one sample."""
    method = make_method(work.method)
    return method.routing.rule.most(work.tasks) * kind_of(method).length(method)


def training_activations(
    work: Workload, shape: ModelShape, batch: int, length: int, tokens: Tokens, element: int, stage: int = 0
) -> int:
    """Bytes of a micro-batch's activations that are stored for the backward pass, plus one layer's backward.

    After Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198),
    section 4, less what frozen weights save:

    - Prompts are at the input, so every decoder layer stores activations. A frozen linear layer stores nothing, since
      its input is needed for the gradient of its weight only. ZeRO-3 replaces torch's linear by one that stores its
      input all the same (runtime/zero/linear.py, `LinearFunctionForZeroStage3`).
    - Per token and layer: the float32 inputs of both norms; query, key and value (repeated to all heads), output, one
      row of the mask and a log-sum-exp per head of the attention; gate and up of the gated MLP, and its activation
      where `pipeline.backbones.gated` does not apply. Eager attention stores its [heads, N, N] probabilities instead of
      output and mask, in float32 and in the model's precision. FlashAttention stores no mask, packed or not, and keys
      and values once for the heads that share them.
    - With sets after the image only the tokens from there on have gradients; of the rest keys and values are stored.
    - Of quantised weights one layer's exist dequantised, in the forward and again in the backward pass.
    - Logits exist for answers only. The vision tower runs without gradients; the hidden states of all its layers exist
      at once.

    Not modelled: the last layer computes its output for answers only, and packed samples take fewer tokens.
    """
    text, method = shape.text, make_method(work.method)
    width, inner, heads = text.hidden_size, intermediate_size(text), text.num_attention_heads
    attention = heads * head_size(text)
    gates = 2 if shape.gates_kept_once else 3
    per_token, per_key = 2 * FLOAT32 * width + (attention + gates * inner) * element, 2 * attention * element
    if work.model.attn_implementation == "eager":
        per_token += heads * length * (FLOAT32 + (element if element != FLOAT32 else 0))
    elif takes_lengths(work.model.attn_implementation):
        per_token += attention * element + heads * FLOAT32
        per_key = 2 * key_value_width(text) * element
    else:
        per_token += (attention + length) * element + heads * FLOAT32
    if stage == 3:  # inputs of the projections to and from attention and MLP, four of which share two
        per_token += (2 * width + attention + inner) * element
    else:  # inputs that the gradients of low-rank updates need
        per_token += kind_of(method).read(method, shape.decoder) * element // text.num_hidden_layers
    again = recomputed_layers(work.train.checkpointing, text.num_hidden_layers)
    two_passes = method.insertion == "after_image"
    own = length - tokens.image * two_passes  # tokens with gradients
    layers = (text.num_hidden_layers - again + 1) * (own * per_token + length * per_key) + again * own * width * element
    kept = batch * (layers + own * FLOAT32 * width)
    if two_passes:  # keys and values of the prefix before the sets
        kept += batch * tokens.image * 2 * key_value_width(text) * text.num_hidden_layers * element
    added = element * kind_of(method).adds_to_logits(method, shape.decoder)
    logits = batch * tokens.answer * text.vocab_size * (element + added + 3 * FLOAT32)
    projected = batch * tokens.image * 3 * width * element if shape.projector else 0
    dequantised = Quantised.of(shape, work.model.quantization).largest * element  # one layer's weight at a time
    return kept + logits + projected + dequantised + _vision(shape, batch, tokens, element)


def generation_memory(
    work: Workload, shape: ModelShape, length: int, tokens: Tokens, element: int, cached: float = 1.0
) -> int:
    """Bytes of the key-value cache at the end of the longest answers, and of one layer of the prefill.

    `cached` is the share of the layers whose keys and values this rank has.
    """
    text, batch = shape.text, work.answers
    layers = round(text.num_hidden_layers * cached)
    cache = batch * (length + work.answer_length) * 2 * key_value_width(text) * layers * element
    layer = batch * length * (6 * text.hidden_size + 3 * intermediate_size(text)) * element
    layer += Quantised.of(shape, work.model.quantization).largest * element  # dequantised
    return cache + layer + _vision(shape, batch, tokens, element)


def _waiting(work: Workload, micro: int, tokens: Tokens) -> int:
    """Bytes of pixels in float32 that the loader processes of a rank hold at once."""
    training = work.train.workers * AHEAD * micro
    return max(training, work.answers) * tokens.values * FLOAT32


def _vision(shape: ModelShape, batch: int, tokens: Tokens, element: int) -> int:
    """Bytes while the vision tower runs: pixels in float32 and in its precision, and all layers' hidden states."""
    vision = shape.vision
    size, patch = number_in(vision, "image_size"), number_in(vision, "patch_size")
    width, layers = number_in(vision, "hidden_size"), number_in(vision, "num_hidden_layers", "depth")
    seen = tokens.crops * ((size // patch) ** 2 + 1) if size and patch else tokens.patches
    pixels = tokens.values * (FLOAT32 + element)
    # Hidden states of all layers, and about ten vectors per token in the layer that is computed.
    return batch * (seen * width * (layers + 10) * element + pixels)

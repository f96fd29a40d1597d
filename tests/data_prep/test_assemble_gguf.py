"""A language model in a GGUF file is the model that the file was written from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.assemble.language import load_language
from pipeline.errors import UserError
from tests.data_prep.assembling import PLAIN_CHATML, save_language

gguf = pytest.importorskip("gguf", reason="the extra small is not installed")
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def as_llama_cpp(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection in the order of llama.cpp's rotary embedding: pairs beside each other."""
    rows, width = values.shape
    return values.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def save_gguf(folder: Path, template: str | None) -> Path:
    """The tiny language model in `folder` as a GGUF file in a folder beside it.

    Tensors are in float32, the first MLP's gate is quantised. The vocabulary gets one token more, for a merge, without
    which no such file is.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, path = model.config, folder.parent / "gguf" / "model.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size + 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        _, _, inner = name.partition("layers.")
        number, _, rest = inner.partition(".")
        target = f"blk.{number}.{NAMES[rest]}" if inner else NAMES[name]
        array = value.numpy()
        if target == "token_embd.weight":
            array = np.concatenate([array, np.zeros_like(array[:1])])
        if "q_proj" in name or "k_proj" in name:
            array = as_llama_cpp(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if target == "blk.0.ffn_gate.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_it_was_written_from(tmp_path: Path) -> None:
    folder = save_language(tmp_path / "language")
    found = load_language(save_gguf(folder, PLAIN_CHATML).parent, "model.gguf")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("<|im_start|>user\nHow so?")["input_ids"]])
    assert found.tokenizer("<|im_start|>user\nHow so?")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(found.model(ids).logits[..., :-1], plain(ids).logits, atol=2e-2, rtol=2e-2)
    assert found.tokenizer.chat_template == PLAIN_CHATML and found.width == plain.config.hidden_size
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    found.model.save_pretrained(tmp_path / "saved")  # it does not count as quantised any more
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_gguf_file_without_a_template_or_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = save_language(tmp_path / "language", template=None)
    path = save_gguf(folder, None)
    with pytest.raises(UserError, match="has no chat template"):
        load_language(path.parent, path.name)
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"model\.gguf cannot be read"):
        load_language(path.parent, path.name)

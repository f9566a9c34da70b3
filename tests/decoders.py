"""Every decoder that transformers has, made tiny from its configuration's class: what we say that rows lose is what
the model's own logits say of each row alone.

`tests/test_decoders.py` tries them when asked for long tests; `tools/decoder_table.py` writes what they came to.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.test_packed import rows
from tunesmith.conversation.render import Rendered
from tunesmith.errors import TunesmithError, first_line

PACKED, APART, REFUSED, UNMADE = "packed", "one row at a time", "refused", "not made"
LARGEST = 20e6  # weights; what is more is not tiny
VOCABULARY = 272
WINDOW = 36  # tokens: more than the rows have that packing is tried with, fewer than those have that are compared
# What a configuration is given of these, where it has a field of that name (or another that means the same).
TINY: dict[str, Any] = {
    name: number
    for number, names in {
        VOCABULARY: "vocab_size unpadded_vocab_size vocab_size_per_layer_input ngram_vocab_size_base "
        "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab",
        512: "max_position_embeddings n_positions max_seq_len max_sequence_length max_target_positions context_length",
        64: "intermediate_size ffn_hidden_size d_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_dim dim_ff dff "
        "dense_intermediate_size intermediate_size_mlp shared_experts_intermediate_size mamba_d_ssm rel_extent",
        WINDOW: "sliding_window sliding_window_size attention_window_size local_attention window_size "
        "attention_chunk_size local_attention_window_len keep_window_size index_topk",
        32: "hidden_size hidden_size_global d_model embedding_size word_embed_proj_dim attention_hidden_size emb_dim "
        "output_embedding_size backbone_hidden_size",
        16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "q_lora_rank kv_lora_rank hidden_size_per_layer_input mamba_d_head mamba_head_dim chunk_size mamba_chunk_size "
        "block_size router_hidden_size input_embedding_size pronunciation_embed_dim "
        "shape_embed_dim num_centroids moe_shared_expert_intermediate_size",
        8: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim index_head_dim linear_key_head_dim swa_head_dim "
        "linear_value_head_dim linear_head_dim dim_head kv_channels state_size mamba_d_state ssm_state_size "
        "o_lora_rank hc_lowrank ffn_round_up_to_multiple_of",
        4: "num_hidden_layers decoder_layers encoder_layers num_layers num_encoder_layers num_attention_heads "
        "decoder_attention_heads encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "attention_heads swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
        "index_n_heads linear_num_heads linear_num_value_heads linear_num_key_heads mamba_n_heads mamba_num_heads "
        "n_mamba_heads rotary_dim laurel_rank adapter_rank d_rel centroid_intermediate_top_k ",
        2: "num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k swa_num_key_value_heads "
        "zero_expert_num o_groups sliding_window_pattern global_attn_every_n_layers layer_group_size attn_layer_period "
        "heads_per_ngram eos_token_id",
        1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups attn_layer_offset "
        "num_kv_shared_layers make_ngram_vocab_size_divisible_by split_ngram_parts bos_token_id",
        0: "pad_token_id",
    }.items()
    for name in names.split()
} | {"is_decoder": True, "use_cache": False}
# What is given where the field is empty by default, too.
ALWAYS = ("head_dim", "num_key_value_heads", "n_shared_experts", "num_experts_per_tok")
BOTH_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
# What some families want besides.
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": BOTH_ROPES},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "feed_forward_size": 64,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "hash_seed": 0,
    },
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": WINDOW // 4,
    },
    "xlnet": {"d_head": 8},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"num_heads": 4},
}


def every() -> list[str]:
    """The types that transformers makes a causal language model of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def settings(default: Any) -> dict[str, Any]:
    """A configuration's fields, and those of its parts, with small numbers in place of its default ones."""
    from transformers import PretrainedConfig

    fields = default.to_dict()
    found = {
        name: value
        for name, value in TINY.items()
        if name in default.attribute_map or name in ALWAYS or fields.get(name) is not None
        if name in fields or name in default.attribute_map
    }
    if fields.get("kv_lora_rank"):  # every head has keys of its own
        found["num_key_value_heads"] = TINY["num_attention_heads"]
    for name, part in vars(default).items():
        if isinstance(part, PretrainedConfig):
            found[name] = {"model_type": part.model_type} | settings(part)
    return found | OWN.get(default.model_type, {})


def make(kind: str) -> Any:
    """A tiny seeded model of a type, its weights so large that every token counts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **settings(AutoConfig.for_model(kind)))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"has {size / 1e6:,.0f} million weights when made small")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss(model: Any, row: Rendered) -> Tensor:
    """The sum of a row's losses in nats, by the model's own logits."""
    ids = torch.tensor([row.ids])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(row) :].float()
    losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return (losses * torch.tensor(row.weights[1:])).sum()


def gradient(total: Tensor, model: Any) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in pairs])


def tried(kind: str) -> tuple[str, str]:
    """How rows of a type's models are computed, and why not another way.

    Raises:
        AssertionError: a loss or the gradient is not the model's own.
    """
    from tunesmith.models.packed import PackedForward

    given = rows(12)
    try:
        model = make(kind)
    except Exception as error:
        return UNMADE, f"{type(error).__name__}: {first_line(error)}"
    plain = copy.deepcopy(model)
    try:
        expected, why = torch.stack([loss(plain, row) for row in given]), ""
        theirs = gradient(expected.sum(), plain)
    except Exception as error:
        expected, why = torch.tensor(torch.nan), f"its own forward or backward: {first_line(error)}"
    try:
        forward = PackedForward(model, given)
    except TunesmithError as error:
        return (UNMADE, why) if why else (REFUSED, error.what)
    if not expected.isfinite().all():
        return UNMADE, why or "its losses are not finite with random weights"
    batch = forward.pack(given)
    found = torch.zeros(len(given)).index_add(0, batch.owner_N, forward.nll(batch))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    mine = gradient(found.sum(), model)
    assert (mine - theirs).norm() < 0.01 * theirs.norm(), f"gradients: {mine.norm()} {theirs.norm()}"
    return (PACKED, forward.why.partition("fused: ")[2]) if forward.packed else (APART, forward.why.partition(": ")[2])

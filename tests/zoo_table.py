"""The rows of `zoo`: configuration, class and options of each architecture; what it is called with; fixed sizes."""

from __future__ import annotations

from typing import Any

BATCH, LENGTH, LIMIT, VOCABULARY = 2, 7, 64, 99

_TEXT = "input_ids attention_mask"
_PAIR = "input_ids attention_mask token_type_ids"
_SEQ2SEQ = "input_ids attention_mask decoder_input_ids"
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {
    **_IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 52,
    "max_position_embeddings": LIMIT,
}  # fmt: skip
_GPT = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 52, "n_positions": LIMIT}
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_MOE = {**_LLAMA, "num_experts_per_tok": 2, "sliding_window": None}
_DEBERTA = {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_T5 = {**_IDS, "d_model": 32, "d_kv": 8, "d_ff": 52, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {
    **_IDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 52, "decoder_ffn_dim": 52, "max_position_embeddings": LIMIT,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2, "encoder_layerdrop": 0.1, "decoder_layerdrop": 0.1,
}  # fmt: skip
_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 52, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4,
    "drop_path_rate": 0.1,
}  # fmt: skip
_AUDIO = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 52,
    "conv_dim": (16, 16), "conv_kernel": (8, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.1, "classifier_proj_size": 12,
    "mask_time_prob": 0.5, "mask_time_length": 2, "mask_feature_prob": 0.5, "mask_feature_length": 2,
}  # fmt: skip
_PIXELS: tuple[str, tuple[int, ...]] = ("pixel_values", (BATCH, 3, 16, 16))
_LARGE: tuple[str, tuple[int, ...]] = ("pixel_values", (BATCH, 3, 32, 32))

_Row = tuple[str, str, dict[str, Any], str, tuple[int, ...], str]


def _row(
    config: str, model: str, options: dict[str, Any], names: str = _TEXT, shape: tuple[int, ...] = (), fixed: str = ""
) -> _Row:
    return f"{config}Config", model, options, names, shape, fixed


ROWS: dict[str, _Row] = {
    "bert": _row("Bert", "BertForSequenceClassification", _BERT, _PAIR),
    "bert-mlm": _row("Bert", "BertForMaskedLM", _BERT, _PAIR),
    "bert-qa": _row("Bert", "BertForQuestionAnswering", _BERT, _PAIR),
    "distilbert": _row(
        "DistilBert",
        "DistilBertForSequenceClassification",
        {**_IDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 52, "max_position_embeddings": LIMIT},
    ),
    "roberta": _row("Roberta", "RobertaForSequenceClassification", {**_BERT, "max_position_embeddings": LIMIT + 2}),
    "xlm-roberta": _row("XLMRoberta", "XLMRobertaForSequenceClassification", {**_BERT, "max_position_embeddings": 66}),
    "albert": _row("Albert", "AlbertForSequenceClassification", {**_BERT, "embedding_size": 16}, _PAIR),
    "electra": _row("Electra", "ElectraForSequenceClassification", {**_BERT, "embedding_size": 16}, _PAIR),
    "deberta": _row("Deberta", "DebertaForSequenceClassification", _DEBERTA, _PAIR),
    "deberta-v2": _row("DebertaV2", "DebertaV2ForSequenceClassification", _DEBERTA, _PAIR),
    "deberta-v3like": _row(
        "DebertaV2",
        "DebertaV2ForSequenceClassification",
        {**_DEBERTA, "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
         "position_biased_input": False, "type_vocab_size": 0},
    ),
    "mpnet": _row("MPNet", "MPNetForSequenceClassification", {**_BERT, "max_position_embeddings": 66}),
    "mobilebert": _row(
        "MobileBert",
        "MobileBertForSequenceClassification",
        {**_BERT, "embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
        _PAIR,
    ),
    "squeezebert": _row("SqueezeBert", "SqueezeBertForSequenceClassification", {**_BERT, "embedding_size": 32}, _PAIR),
    "longformer": _row("Longformer", "LongformerForSequenceClassification", {**_BERT, "attention_window": 4}),
    "big_bird": _row("BigBird", "BigBirdForSequenceClassification", {**_BERT, "attention_type": "original_full"}),
    "funnel": _row(
        "Funnel",
        "FunnelForSequenceClassification",
        {**_IDS, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 52},
        fixed="length",
    ),
    "fnet": _row("FNet", "FNetForSequenceClassification", _BERT, "input_ids token_type_ids"),
    "convbert": _row(
        "ConvBert", "ConvBertForSequenceClassification", {**_BERT, "embedding_size": 16, "conv_kernel_size": 3}, _PAIR
    ),
    "modernbert": _row(
        "ModernBert",
        "ModernBertForSequenceClassification",
        {**_BERT, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 4},
    ),
    "xlnet": _row(
        "XLNet", "XLNetForSequenceClassification", {**_IDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 52}
    ),
    "gpt2": _row("GPT2", "GPT2LMHeadModel", _GPT),
    "gpt_neo": _row(
        "GPTNeo",
        "GPTNeoForCausalLM",
        {**_IDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
         "intermediate_size": 52, "window_size": 4, "max_position_embeddings": LIMIT},
    ),
    "gpt_neox": _row("GPTNeoX", "GPTNeoXForCausalLM", _BERT),
    "gptj": _row("GPTJ", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "opt": _row(
        "OPT",
        "OPTForCausalLM",
        {**_IDS, "hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 52, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": LIMIT, "layerdrop": 0.1},
    ),
    "bloom": _row("Bloom", "BloomForCausalLM", {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": _row("Llama", "LlamaForCausalLM", _LLAMA),
    "llama-cls": _row("Llama", "LlamaForSequenceClassification", _LLAMA),
    "mistral": _row("Mistral", "MistralForCausalLM", {**_LLAMA, "sliding_window": 4}),
    "mixtral": _row(  # in bfloat16 torch's grouped product wants rows of a multiple of 16 bytes
        "Mixtral",
        "MixtralForCausalLM",
        {**_MOE, "intermediate_size": 56, "num_local_experts": 3, "router_jitter_noise": 0.1},
    ),
    "qwen2": _row("Qwen2", "Qwen2ForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": _row("Qwen3", "Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "qwen3_moe": _row(
        "Qwen3Moe", "Qwen3MoeForCausalLM", {**_MOE, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 28}
    ),
    "gemma": _row("Gemma", "GemmaForCausalLM", {**_LLAMA, "head_dim": 8}),
    "gemma2": _row("Gemma2", "Gemma2ForCausalLM", {**_LLAMA, "head_dim": 8, "sliding_window": 4}),
    "gemma3_text": _row("Gemma3Text", "Gemma3ForCausalLM", {**_LLAMA, "head_dim": 8, "sliding_window": 4}),
    "phi": _row("Phi", "PhiForCausalLM", _BERT),
    "phi3": _row("Phi3", "Phi3ForCausalLM", _LLAMA),
    "falcon": _row("Falcon", "FalconForCausalLM", {**_BERT, "ffn_hidden_size": 52}),
    "mpt": _row(
        "Mpt", "MptForCausalLM", {**_IDS, "d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2,
                                  "max_seq_len": LIMIT},
    ),
    "starcoder2": _row("Starcoder2", "Starcoder2ForCausalLM", {**_LLAMA, "sliding_window": 4}),
    "smollm3": _row("SmolLM3", "SmolLM3ForCausalLM", _LLAMA),
    "olmo2": _row("Olmo2", "Olmo2ForCausalLM", _LLAMA),
    "stablelm": _row("StableLm", "StableLmForCausalLM", _LLAMA),
    "cohere": _row("Cohere", "CohereForCausalLM", _LLAMA),
    "mamba": _row(
        "Mamba",
        "MambaForCausalLM",
        {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 5},
        "input_ids",
        fixed="length",
    ),
    "t5": _row("T5", "T5ForConditionalGeneration", _T5, _SEQ2SEQ),
    "t5-encoder": _row("T5", "T5EncoderModel", _T5),
    "bart": _row("Bart", "BartForConditionalGeneration", _BART, _SEQ2SEQ),
    "marian": _row("Marian", "MarianMTModel", _BART, _SEQ2SEQ),
    "vit": _row("ViT", "ViTForImageClassification", _VIT, *_PIXELS),
    "deit": _row("DeiT", "DeiTForImageClassification", _VIT, *_PIXELS),
    "beit": _row("Beit", "BeitForImageClassification", {**_VIT, "drop_path_rate": 0.1}, *_PIXELS),
    "swin": _row("Swin", "SwinForImageClassification", _SWIN, *_LARGE),
    "swinv2": _row("Swinv2", "Swinv2ForImageClassification", _SWIN, *_LARGE),
    "dinov2": _row("Dinov2", "Dinov2ForImageClassification", {**_VIT, "drop_path_rate": 0.1}, *_PIXELS),
    "segformer": _row(
        "Segformer",
        "SegformerForSemanticSegmentation",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4],
         "decoder_hidden_size": 20, "drop_path_rate": 0.1},
        *_LARGE,
    ),
    "mobilevit": _row(
        "MobileViT",
        "MobileViTForImageClassification",
        {"hidden_sizes": [24, 28, 32], "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 40], "num_attention_heads": 4,
         "image_size": 64, "expand_ratio": 2.0},
        "pixel_values",
        (BATCH, 3, 64, 64),
    ),
    "convnext": _row(
        "ConvNext",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "image_size": 32, "drop_path_rate": 0.1},
        *_LARGE,
    ),
    "levit": _row(
        "Levit",
        "LevitForImageClassification",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
         "key_dim": [4, 4, 4], "down_ops": [["Subsample", 4, 4, 4, 2, 2],
                                                                   ["Subsample", 4, 6, 4, 2, 2]]},
        "pixel_values",
        (BATCH, 3, 64, 64),
    ),
    "pvt": _row(
        "Pvt",
        "PvtForImageClassification",
        {"image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32],
         "num_attention_heads": [1, 2, 2, 4], "drop_path_rate": 0.1},
        "pixel_values",
        (BATCH, 3, 64, 64),
    ),
    "yolos": _row("Yolos", "YolosForObjectDetection", {**_VIT, "image_size": [16, 16], "num_detection_tokens": 5},
                  *_PIXELS),
    "clip": _row(
        "CLIP", "CLIPModel", {"text_config": _BERT, "vision_config": _VIT, "projection_dim": 20},
        "input_ids attention_mask pixel_values", _PIXELS[1],
    ),
    "siglip": _row(
        "Siglip", "SiglipModel", {"text_config": _BERT, "vision_config": _VIT},
        "input_ids attention_mask pixel_values", _PIXELS[1],
    ),
    "whisper": _row(
        "Whisper",
        "WhisperForConditionalGeneration",
        {**{k: v for k, v in _BART.items() if k != "max_position_embeddings"}, "num_mel_bins": 10,
         "max_source_positions": 12, "max_target_positions": LIMIT, "apply_spec_augment": True,
         "mask_time_length": 2, "mask_time_prob": 0.5},
        "input_features decoder_input_ids",
        (BATCH, 10, 24),
    ),
    "wav2vec2": _row("Wav2Vec2", "Wav2Vec2ForSequenceClassification", _AUDIO, "input_values", (BATCH, 400)),
    "hubert": _row("Hubert", "HubertForSequenceClassification", _AUDIO, "input_values", (BATCH, 400)),
    "audio-spectrogram-transformer": _row(
        "AST",
        "ASTForAudioClassification",
        {**{k: v for k, v in _VIT.items() if k != "image_size"}, "max_length": 24, "num_mel_bins": 12,
         "frequency_stride": 4, "time_stride": 4},
        "input_values",
        (BATCH, 24, 12),
        fixed="samples",
    ),
}  # fmt: skip

"""Tensor names of public vision models: a map for each file format, from our names (`vit.py`) to theirs.

N is a block's index, * stands for both `weight` and `bias`. NAME[q], NAME[k] and NAME[v] are the thirds of a tensor
NAME in which query, key and value are concatenated along the first dimension.

References
[1] CLIP, SIGLIP, DINOV2: transformers, models/{clip,siglip,dinov2}/ and, for DINOv2, conversion_mapping.py.
[2] DINOV2_FILE: https://github.com/facebookresearch/dinov2, dinov2/models/vision_transformer.py and layers/.
[3] TORCHVISION: torchvision, models/vision_transformer.py.
"""

VISION_MODEL = {  # what CLIP and SigLIP share
    "position": "vision_model.embeddings.position_embedding.weight",
    "blocks.N.norm1.*": "vision_model.encoder.layers.N.layer_norm1.*",
    "blocks.N.attn.q.*": "vision_model.encoder.layers.N.self_attn.q_proj.*",
    "blocks.N.attn.k.*": "vision_model.encoder.layers.N.self_attn.k_proj.*",
    "blocks.N.attn.v.*": "vision_model.encoder.layers.N.self_attn.v_proj.*",
    "blocks.N.attn.out.*": "vision_model.encoder.layers.N.self_attn.out_proj.*",
    "blocks.N.norm2.*": "vision_model.encoder.layers.N.layer_norm2.*",
    "blocks.N.mlp.up.*": "vision_model.encoder.layers.N.mlp.fc1.*",
    "blocks.N.mlp.down.*": "vision_model.encoder.layers.N.mlp.fc2.*",
    "post_norm.*": "vision_model.post_layernorm.*",
}
CLIP = VISION_MODEL | {
    "patch.weight": "vision_model.embeddings.patch_embedding.weight",
    "cls": "vision_model.embeddings.class_embedding",
    "pre_norm.*": "vision_model.pre_layrnorm.*",  # CLIP's own spelling
}
SIGLIP = VISION_MODEL | {  # some models lack the head
    "patch.*": "vision_model.embeddings.patch_embedding.*",
    "head.probe": "vision_model.head.probe",
    "head.attn.q.*": "vision_model.head.attention.in_proj_*[q]",
    "head.attn.k.*": "vision_model.head.attention.in_proj_*[k]",
    "head.attn.v.*": "vision_model.head.attention.in_proj_*[v]",
    "head.attn.out.*": "vision_model.head.attention.out_proj.*",
    "head.norm.*": "vision_model.head.layernorm.*",
    "head.mlp.up.*": "vision_model.head.mlp.fc1.*",
    "head.mlp.down.*": "vision_model.head.mlp.fc2.*",
}
DINOV2 = {
    "patch.*": "embeddings.patch_embeddings.projection.*",
    "cls": "embeddings.cls_token",
    "position": "embeddings.position_embeddings",
    "blocks.N.norm1.*": "encoder.layer.N.norm1.*",
    "blocks.N.attn.q.*": "encoder.layer.N.attention.attention.query.*",
    "blocks.N.attn.k.*": "encoder.layer.N.attention.attention.key.*",
    "blocks.N.attn.v.*": "encoder.layer.N.attention.attention.value.*",
    "blocks.N.attn.out.*": "encoder.layer.N.attention.output.dense.*",
    "blocks.N.scale1.gain": "encoder.layer.N.layer_scale1.lambda1",
    "blocks.N.norm2.*": "encoder.layer.N.norm2.*",
    "blocks.N.mlp.up.*": "encoder.layer.N.mlp.fc1.*",
    "blocks.N.mlp.down.*": "encoder.layer.N.mlp.fc2.*",
    "blocks.N.scale2.gain": "encoder.layer.N.layer_scale2.lambda1",
    "post_norm.*": "layernorm.*",
}
DINOV2_FILE = {
    "patch.*": "patch_embed.proj.*",
    "cls": "cls_token",
    "position": "pos_embed",
    "blocks.N.norm1.*": "blocks.N.norm1.*",
    "blocks.N.attn.q.*": "blocks.N.attn.qkv.*[q]",
    "blocks.N.attn.k.*": "blocks.N.attn.qkv.*[k]",
    "blocks.N.attn.v.*": "blocks.N.attn.qkv.*[v]",
    "blocks.N.attn.out.*": "blocks.N.attn.proj.*",
    "blocks.N.scale1.gain": "blocks.N.ls1.gamma",
    "blocks.N.norm2.*": "blocks.N.norm2.*",
    "blocks.N.mlp.up.*": "blocks.N.mlp.fc1.*",
    "blocks.N.mlp.down.*": "blocks.N.mlp.fc2.*",
    "blocks.N.scale2.gain": "blocks.N.ls2.gamma",
    "post_norm.*": "norm.*",
}
TORCHVISION = {
    "patch.*": "conv_proj.*",
    "cls": "class_token",
    "position": "encoder.pos_embedding",
    "blocks.N.norm1.*": "encoder.layers.encoder_layer_N.ln_1.*",
    "blocks.N.attn.q.*": "encoder.layers.encoder_layer_N.self_attention.in_proj_*[q]",
    "blocks.N.attn.k.*": "encoder.layers.encoder_layer_N.self_attention.in_proj_*[k]",
    "blocks.N.attn.v.*": "encoder.layers.encoder_layer_N.self_attention.in_proj_*[v]",
    "blocks.N.attn.out.*": "encoder.layers.encoder_layer_N.self_attention.out_proj.*",
    "blocks.N.norm2.*": "encoder.layers.encoder_layer_N.ln_2.*",
    "blocks.N.mlp.up.*": "encoder.layers.encoder_layer_N.mlp.0.*",
    "blocks.N.mlp.down.*": "encoder.layers.encoder_layer_N.mlp.3.*",
    "post_norm.*": "encoder.ln.*",
}
TORCHVISION_2022 = TORCHVISION | {  # the first published files
    "blocks.N.mlp.up.*": "encoder.layers.encoder_layer_N.mlp.linear_1.*",
    "blocks.N.mlp.down.*": "encoder.layers.encoder_layer_N.mlp.linear_2.*",
}

# Tensors in checkpoints that are not part of the ViT, by kind (`vit_checkpoints.py`). A trailing dot marks a prefix.
IGNORED_TENSORS = {
    "clip_vision_model": ("vision_model.embeddings.position_ids",),
    "siglip_vision_model": ("vision_model.embeddings.position_ids",),
    "clip": ("vision_model.embeddings.position_ids", "text_model.", "text_projection.", "visual_projection.",
             "logit_scale"),
    "siglip": ("vision_model.embeddings.position_ids", "text_model.", "logit_scale", "logit_bias"),
    "dinov2": ("embeddings.mask_token",),
    "dinov2 file": ("mask_token",),
    "torchvision file": ("heads.",),
}  # fmt: skip


def expand(names: dict[str, str], depth: int) -> dict[str, str]:
    """Fills N and * in a map: {our parameter: their tensor}."""
    expanded = {}
    for ours, theirs in names.items():
        for n in map(str, range(depth if "N" in ours else 1)):
            for kind in ("weight", "bias") if "*" in ours else ("",):
                expanded[ours.replace("N", n).replace("*", kind)] = theirs.replace("N", n).replace("*", kind)
    return expanded

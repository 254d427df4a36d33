"""Built-in shapes: the sizes of real models, for measurements without their weights, and a tiny model for tests.

Each entry holds options of the parts' config.json files, and of the tokenizer: `size` ids, `length` tokens.
Source: the published config.json files of Stable Diffusion 1.5 and 2.1, 1.5's inpainting model and the x4 upscaler,
OpenAI's ViT-L/14 and OpenCLIP's ViT-H/14.
"""

SENTENCES = (
    "a photo of a face on the beach",
    "a pencil sketch of a face in the snow with a hat",
    "a watercolor of a face in the forest with red hair",
    "a mosaic of a cat in the city at night",
)

POCKET = {  # the embedded model, whose vocabulary is in the package
    "unet": dict(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        cross_attention_dim=160,
        attention_head_dim=(2, 3, 5),
        norm_num_groups=16,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "vae": dict(
        block_out_channels=(16, 32, 64), latent_channels=8, norm_num_groups=8, sample_size=64, scaling_factor=1.0
    ),
    "text_encoder": dict(
        hidden_size=160,
        intermediate_size=640,
        num_attention_heads=5,
        num_hidden_layers=4,
        max_position_embeddings=32,
        projection_dim=160,
    ),
    "image_encoder": dict(
        hidden_size=160,
        intermediate_size=640,
        num_attention_heads=5,
        num_hidden_layers=4,
        image_size=64,
        patch_size=8,
        projection_dim=160,
    ),
    "schedule": dict(),
    "tokenizer": dict(folder="pocket/tokenizer"),
}

SD15 = {
    "unet": dict(sample_size=64, cross_attention_dim=768),
    "vae": dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512),
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768),
    "schedule": dict(),
    "tokenizer": dict(size=49408, length=77),
}
SD2 = {  # the text encoder of all models of Stable Diffusion 2
    "text_encoder": dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=23,
        hidden_act="gelu",
    ),
    "tokenizer": dict(size=49408, length=77, pad="!"),
}

SHAPES = {
    "sd15": SD15,
    "sd21": {
        **SD2,
        "unet": dict(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
            upcast_attention=True,
        ),
        "vae": dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=768),
        "schedule": dict(prediction_type="v_prediction"),
    },
    "sd15-inpainting": {**SD15, "unet": {**SD15["unet"], "in_channels": 9}},
    "x4": {  # the x4 upscaler
        **SD2,
        "unet": dict(
            sample_size=128,
            in_channels=7,
            cross_attention_dim=1024,
            attention_head_dim=8,
            block_out_channels=(256, 512, 512, 1024),
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            only_cross_attention=(True, True, True, False),
            num_class_embeds=1000,
            use_linear_projection=True,
        ),
        "vae": dict(block_out_channels=(128, 256, 512), layers_per_block=2, sample_size=256, scaling_factor=0.08333),
        "schedule": dict(prediction_type="v_prediction", beta_start=1e-4, beta_end=0.02),
    },
    "pocket": POCKET,  # weights from nothing by "new:pocket"
    # The model of `make pocket`: pictures of twice the side, latents of the same size.
    "pocket128": {
        **POCKET,
        "unet": {**POCKET["unet"], "in_channels": 16, "out_channels": 16},
        "vae": {**POCKET["vae"], "block_out_channels": (32, 48, 64, 96), "latent_channels": 16, "sample_size": 128},
        "image_encoder": {**POCKET["image_encoder"], "image_size": 128, "patch_size": 16},
    },
    "tiny": {
        "unet": dict(
            sample_size=16,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        "vae": dict(block_out_channels=(16, 32), norm_num_groups=8, sample_size=32),
        "text_encoder": dict(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=16,
            projection_dim=32,
        ),
        "image_encoder": dict(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_hidden_layers=3,
            image_size=32,
            patch_size=8,
            projection_dim=32,
        ),
        "schedule": dict(),
        "tokenizer": dict(texts=SENTENCES, size=600, length=16),
    },
}

TOWERS = {
    "vit-l": dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        patch_size=14,
        projection_dim=768,
    ),
    "vit-h": dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_attention_heads=16,
        num_hidden_layers=32,
        patch_size=14,
        projection_dim=1024,
        hidden_act="gelu",
    ),
}

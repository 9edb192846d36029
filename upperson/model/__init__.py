"""UP-Person over any open_clip ViT CLIP: S-Prefix, K/V LoRA and L-Adapter in every block."""

"""What is trained: U-Nets, transformers, Stable Diffusion checkpoints and VAEs, with their optimizer, average and adapters."""

"""What is trained: U-Nets, Stable Diffusion checkpoints and VAEs, with their optimizer, average and adapters."""

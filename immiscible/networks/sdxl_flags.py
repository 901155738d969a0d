"""Flags of diffusers' SDXL scripts that have another form here."""

from __future__ import annotations

EARLIER = "--timestep_sampling asymmetric with --asymmetric_tau at portion x 1000 and --asymmetric_k at the multiplier"
XL_FOREIGN = {  # name -> what takes its place
    **dict.fromkeys(
        ("timestep_bias_strategy", "timestep_bias_portion", "timestep_bias_multiplier", "timestep_bias_begin", "timestep_bias_end"),
        f"a law of timesteps takes its place; strategy earlier is {EARLIER}; for later give --timestep_sampling logit_normal with a "
        f"--logit_mean above 0, for a range logit_normal with a small --logit_std",
    ),
    "debug_loss": "every loss stands in metrics.jsonl, by --logging_steps 1 that of each step",
    "enable_npu_flash_attention": "NPUs were never tried with these scripts; without it attention is torch's own",
}

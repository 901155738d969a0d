"""How good a run is, while it trains: its samples' distances, whether they are copies, the loss per noise level on others, and leakage.

The measured number depends on the feature network, so every network names the number that it gives, and that name goes into every
table. What is drawn here is drawn from fixed seeds that are not the run's: every evaluation of every run samples from the same noises
and takes the loss on the same images, noises and timesteps. Nothing here leaves a trace in training: weights, gradients, modes and
global generators are afterwards what they were.
"""

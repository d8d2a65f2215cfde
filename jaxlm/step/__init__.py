"""The heart: the training state, the losses and the optimizers that make one step of it."""

"""Masked-LM pretraining: mask on the device, predict the masked tokens, save a checkpoint."""

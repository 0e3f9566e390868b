"""Reinforcement learning of decoders from rewards on what they write."""

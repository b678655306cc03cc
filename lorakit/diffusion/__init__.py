"""Noise, timesteps, losses and samplers; knows no model family."""

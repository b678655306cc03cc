"""What transformers that predict velocities have in common: config, files, text encoders and small layers."""

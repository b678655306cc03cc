"""Anima: the transformer of Cosmos-Predict2 with Qwen3 and an adapter to it as text encoder."""

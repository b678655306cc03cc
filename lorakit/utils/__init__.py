"""Helpers that know nothing of training: files, random numbers, texts."""

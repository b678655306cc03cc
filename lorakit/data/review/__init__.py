"""Warnings about images and captions."""

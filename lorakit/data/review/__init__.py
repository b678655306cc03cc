"""Warnings about images and captions that are probably a mistake."""

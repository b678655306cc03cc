"""Captions of images for lorakit, by any vision-language model of transformers."""

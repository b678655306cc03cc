"""Datasets: examples, captions, buckets, the cache of encoded images and texts, and batches."""

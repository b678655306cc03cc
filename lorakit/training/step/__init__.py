"""The pieces of one optimizer step."""

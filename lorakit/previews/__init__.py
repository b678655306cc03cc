"""Preview images: prompts, sampling, and the files they are saved in."""

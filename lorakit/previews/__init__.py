"""Drawing pictures with a model: prompts, samplers, and the files that pictures go to."""

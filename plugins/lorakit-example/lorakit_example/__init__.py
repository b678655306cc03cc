"""The plugin of lorakit's tutorial: the network `attention_only`, the optimizer `radam`, the observer `loss_curve`."""

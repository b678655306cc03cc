"""Networks: LoRA-LierLa and LoRA-C3Lier."""

"""Networks, as PyTorch modules or as engines, and the denoising loop that runs them."""

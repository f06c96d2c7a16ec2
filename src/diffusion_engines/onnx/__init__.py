"""From PyTorch modules to checked, simplified ONNX graphs."""

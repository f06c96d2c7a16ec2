"""What the backends tensorrt and tensorrt_rtx share: their Python APIs are the same."""

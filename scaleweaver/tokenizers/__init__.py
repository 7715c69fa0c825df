"""Image tokenizers: pictures to codes of every scale and back."""

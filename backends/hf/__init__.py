"""The hf backend: a Hugging Face folder with exact zeros in place."""

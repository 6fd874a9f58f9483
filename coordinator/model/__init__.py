"""GGUF files and Hugging Face folders in, typed facts out."""

"""Model folders on disk: safetensors, bitsandbytes and GGUF in, Hugging Face folders out."""

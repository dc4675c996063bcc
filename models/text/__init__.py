"""Text to token ids and back: tokenizers, chat templates, and which tokens of a chat are labelled."""

"""The HTTP server: the API that OpenAI's clients speak, on the runtime's scheduler."""

"""The HTTP endpoint: OpenAI's protocol, prompts made of it, answers read from tokens, the server."""
